"""An exported network comes back as a backbone: the same tokens, at any size and cut after any block."""

import importlib
import io
import json
import warnings

import onnx
import pytest
import torch
from helpers_tiny import shake
from transformers import AutoImageProcessor, AutoModel, Dinov2Config, Dinov2Model

from lora_recycle.backbones.backbone import Backbone


second = importlib.import_module("second_backbone")
#: what transformers 5 calls the parts of an attention, and what the exported network and published files do
RENAMED = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
}


class Exported(torch.nn.Module):
    """A network whose input has another size than its positions are for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            mlp_ratio=2,
            image_size=70,
            use_mask_token=False,
            attn_implementation="eager",
        )
        self.backbone = shake(Dinov2Model(config))

    def forward(self, pixel_values):
        return self.backbone(pixel_values).last_hidden_state


@pytest.fixture(scope="module")
def network():
    return Exported().eval()


@pytest.fixture(scope="module")
def exported(network):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that such files come from is an old one
        torch.onnx.export(
            network,
            torch.zeros(1, 3, 42, 42),
            file,
            dynamo=False,
            opset_version=14,
            input_names=["image"],
            dynamic_axes={"image": {0: "batch"}},
        )
    model = onnx.load_from_string(file.getvalue())
    for names in [node.input for node in model.graph.node]:
        names[:] = [published(name) for name in names]
    for one in model.graph.initializer:
        one.name = published(one.name)
    return model


def published(name: str) -> str:
    for new, old in RENAMED.items() if name.startswith("backbone.") else ():
        name = name.replace(f"attention.{new}", f"attention.{old}")
    return name


def test_every_block_says_what_the_file_says(exported, capsys):
    second.check(exported)
    assert capsys.readouterr().out.count("block") == 3


def test_the_check_sees_a_wrong_weight(exported, monkeypatch):
    weights = second.read_weights(exported.graph)
    name = "encoder.layer.1.attention.attention.query.weight"
    monkeypatch.setattr(second, "read_weights", lambda graph: {**weights, name: weights[name].T.contiguous()})
    with pytest.raises(SystemExit, match="After block 2"):
        second.check(exported)


def test_the_weights_are_those_that_were_exported(network, exported):
    weights = second.read_weights(exported.graph)
    mine = {published(f"backbone.{name}")[9:]: tensor for name, tensor in network.backbone.state_dict().items()}
    assert weights.keys() == mine.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in mine.items())


def test_another_graph_is_refused(exported):
    other = onnx.GraphProto()
    other.CopyFrom(exported.graph)
    del other.node[:]
    with pytest.raises(SystemExit, match="no export of a DINOv2"):
        second.read_weights(other)


@pytest.mark.parametrize(("norm", "half"), [("trained", False), ("fresh", True)])
def test_a_cut_is_a_backbone(network, exported, tmp_path, norm, half):
    weights = second.read_weights(exported.graph)
    second.save_backbone(second.cut(weights, 2, 56, norm), 56, tmp_path, half)
    backbone = Backbone.from_pretrained(tmp_path)
    assert len(backbone.layers) == 2 and backbone.num_patches == 16 and backbone.dtype == torch.float32
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert list(processor.image_mean) == second.MEAN and processor.size["height"] == 56
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["dtype"] == ("float16" if half else "float32") and stored["architectures"] == ["Dinov2Model"]
    assert AutoModel.from_pretrained(tmp_path).dtype == (torch.float16 if half else torch.float32)

    pixels = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        hidden = network.backbone(backbone.normalize(pixels), output_hidden_states=True).hidden_states[2][:, 0]
        found = backbone.features(backbone.normalize(pixels))
    torch.testing.assert_close(found, second.normed(hidden, weights, norm), atol=1e-2 if half else 1e-4, rtol=0)
    by_block = second.cls_by_block(second.make_backbone(second.cut(weights, 3, 56), 56), pixels, batch_size=2)
    torch.testing.assert_close(by_block[1], hidden, atol=1e-4, rtol=0)


def test_positions_of_their_own_size_stay_as_they_are():
    positions = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(0))
    assert second.resize_positions(positions, 3) is positions
    larger = second.resize_positions(positions, 6)
    assert larger.shape == (1, 37, 4) and torch.equal(larger[:, 0], positions[:, 0])


@pytest.mark.parametrize(("blocks", "size"), [(0, 56), (4, 56), (2, 60), (2, 0)])
def test_a_cut_that_cannot_be_is_refused(exported, blocks, size):
    with pytest.raises(SystemExit, match="--blocks must be from 1 to 3|--image-size must be a multiple of 14"):
        second.cut(second.read_weights(exported.graph), blocks, size)
