"""Files of the paper's own code become PEFT folders that answer as that code does."""

import os

import pytest
import torch
from helpers_clip import CLASSES, RANK, paper_tensors, save_tiny_pair
from helpers_tiny import random_pixels
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionModel

from lora_recycle import AdapterPool, InversionConfig, LoRAInverter
from lora_recycle.adapters.files import POOLED_HEAD
from lora_recycle.adapters.paper_format import import_paper_file
from lora_recycle.errors import AdapterError, StorageError


@pytest.fixture
def base(tmp_path):
    save_tiny_pair(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def file(tmp_path):
    save_file(paper_tensors(), tmp_path / "lora_0.safetensors")
    return tmp_path / "lora_0.safetensors"


def by_hand(base, tensors, pixel_values):
    """The code's forward, written out: x W + B A x in q and v, then the head on the projected image."""
    model = CLIPModel.from_pretrained(base).eval()
    for i, layer in enumerate(model.vision_model.encoder.layers):
        for linear, k in ((layer.self_attn.q_proj, 2 * i), (layer.self_attn.v_proj, 2 * i + 1)):
            a, b = tensors[f"w_a_{k:03d}"], tensors[f"w_b_{k:03d}"]
            linear.register_forward_hook(lambda _, args, out, a=a, b=b: out + args[0] @ a.T @ b.T)
    pooled = model.vision_model(pixel_values=pixel_values).pooler_output
    projected = model.get_image_features(pixel_values=pixel_values).pooler_output
    return pooled, projected @ tensors[f"fc_24in_{CLASSES}out"].T


@torch.no_grad()
def test_the_imported_adapter_answers_as_the_code_that_saved_it(hub, base, file, tmp_path):
    hub.put("org/clip", base)
    folder = import_paper_file(file, "org/clip", tmp_path / "pool" / "lora_0")
    pool, images = AdapterPool.from_pretrained(folder, require_heads=True), random_pixels(4)
    pixel_values = pool.backbone.normalize(images)
    features, logits = by_hand(base, paper_tensors(), pixel_values)
    with pool.folded(0) as backbone:
        hidden, _ = backbone(pixel_values)
        torch.testing.assert_close(backbone.pool_features(hidden), features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pool[0].logits(backbone, hidden), logits, rtol=1e-5, atol=1e-5)
    bare = pool.backbone.features(pixel_values)
    assert (features - bare).abs().max() > 1e-2 and logits.std() > 1e-2
    assert (pool[0].info.name, pool[0].info.base_model, pool[0].num_classes) == ("lora_0", "org/clip", CLASSES)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_the_imported_adapter(base, file, tmp_path):
    folder = import_paper_file(file, base, tmp_path / "lora_0")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    pixel_values = torch.randn(2, 3, 32, 32)
    wearing = PeftModel.from_pretrained(CLIPVisionModel.from_pretrained(base), folder).eval()
    features, logits = by_hand(base, paper_tensors(), pixel_values)
    answer = wearing(pixel_values=pixel_values).pooler_output
    torch.testing.assert_close(answer, features, rtol=1e-5, atol=1e-5)
    head = load_file(folder / "adapter_model.safetensors")[POOLED_HEAD]
    torch.testing.assert_close(answer @ head.T, logits, rtol=1e-5, atol=1e-5)


def test_an_imported_adapter_is_inverted(base, file, tmp_path):
    pool = AdapterPool.from_pretrained(import_paper_file(file, base, tmp_path / "lora_0"))
    shard = LoRAInverter(pool, InversionConfig(iterations=2, images_per_class=1, keep_ratio=0.5, jitter=0)).invert(0)
    _, logits = by_hand(base, paper_tensors(), pool.backbone.normalize(shard.pixels))
    torch.testing.assert_close(shard.teacher_logits, logits.detach(), rtol=1e-4, atol=1e-5)


def test_without_a_head_it_is_an_adapter_without_a_head(base, tmp_path):
    tensors = {name: tensor for name, tensor in paper_tensors().items() if name.startswith("w_")}
    save_file(tensors, tmp_path / "bare.safetensors")
    folder = import_paper_file(tmp_path / "bare.safetensors", base, tmp_path / "bare")
    assert AdapterPool.from_pretrained(folder)[0].head is None
    assert AdapterPool.from_pretrained(folder, class_names=["cat", "dog"])[0].num_classes == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_b_003": None}, r"it lacks tensor\(s\) w_b_003"),
        ({"w_a_000": None}, r"it lacks tensor\(s\) w_a_000"),
        ({"w_a_004": (RANK, 32), "w_b_004": (32, RANK)}, r"for 2 layers .* it holds the unknown tensor\(s\) w_a_004"),
        ({"prompt": (1,)}, r"holds the unknown tensor\(s\) prompt"),
        ({"w_a_001": (2, 32)}, r"w_a_001 must be \(3, 32\), got \(2, 32\)"),
        ({"w_b_002": (RANK, 32)}, r"w_b_002 must be \(32, 3\), got \(3, 32\)"),
        ({"fc_24in_5out": (24, 5)}, r"fc_24in_5out must be \(5, 24\), got \(24, 5\)"),
        ({"fc_24in_5out": None, "fc_32in_5out": (5, 32)}, r"fc_32in_5out must be \(5, 24\), got \(5, 32\)"),
        ({"fc_24in_6out": (6, 24)}, "fc_24in_5out, fc_24in_6out: expected one head"),
        ({"w_a_000": torch.full((RANK, 32), torch.inf)}, "w_a_000 holds NaN or infinity"),
        ({"w_a_000": torch.ones(RANK, 32, dtype=torch.int32)}, "w_a_000 must be floating point"),
        ({f"w_{part}_{i:03d}": (1,) for part in "ab" for i in range(4)}, r"w_a_000 must be \(1, 32\), got \(1,\)"),
    ],
)
def test_other_tensors_are_named(base, tmp_path, changes, message):
    tensors = paper_tensors()
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value if isinstance(value, torch.Tensor) else torch.zeros(value)
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(AdapterError, match=f"odd.safetensors.*{message}"):
        import_paper_file(tmp_path / "odd.safetensors", base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "odd.safetensors"]


def test_files_and_bases_that_do_not_serve(base, file, tiny_backbone_path, tmp_path):
    pickled = tmp_path / "lora_0.pth"
    torch.save(paper_tensors(), pickled)
    with pytest.raises(AdapterError, match="lora_0.pth: no such .safetensors file. .* could run code"):
        import_paper_file(pickled, base, tmp_path / "out")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="cut.safetensors is truncated or damaged"):
        import_paper_file(cut, base, tmp_path / "out")
    huge = b'{"w_a_000":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    cut.write_bytes(len(huge).to_bytes(8, "little") + huge)
    os.truncate(cut, 4 * 10**12 + 8 + len(huge))  # a hole
    with pytest.raises(AdapterError, match="more than 2 GiB"):
        import_paper_file(cut, base, tmp_path / "out")
    with pytest.raises(AdapterError, match="is a vit model, but the paper's code tunes CLIP"):
        import_paper_file(file, tiny_backbone_path, tmp_path / "out")
    CLIPVisionModel.from_pretrained(base).save_pretrained(tmp_path / "tower")
    with pytest.raises(AdapterError, match="tower: is a clip_vision_model model, .* Name the CLIP model, whole"):
        import_paper_file(file, tmp_path / "tower", tmp_path / "out")
    with pytest.raises(
        StorageError, match=r"clip: holds other files \(config.json, .*\), which is not replaced. Name"
    ):
        import_paper_file(file, base, base)
    assert not (tmp_path / "out").exists()
