"""Adapters that PEFT does not have are teachers by what they do to the weights: six of them, each written down."""

import copy

import pytest
import torch
from helpers_tiny import copied_state, tiny_backbone, uniform
from torch import nn

from lora_recycle import AdapterPool
from lora_recycle.adapters.checkpoints import save_checkpoint
from lora_recycle.errors import AdapterError, StorageError


GENERATOR = torch.Generator()


def draw(*shape, reach=0.1):
    return uniform(shape, reach, GENERATOR)


class Hydra(nn.Module):
    """arXiv 2309.06922: a branch beside the layer (LoRA) and one on its output; y = W x + B A x + D C W x."""

    def __init__(self, layer, rank=3):
        super().__init__()
        (out, width), self.layer = layer.weight.shape, layer
        self.b, self.a, self.d, self.c = draw(out, rank), draw(rank, width), draw(out, rank), draw(rank, out)

    def forward(self, x):
        y = self.layer(x)
        return y + x @ self.a.T @ self.b.T + y @ self.c.T @ self.d.T

    def merged(self):
        turn = torch.eye(len(self.d)) + self.d @ self.c
        return turn @ self.layer.weight + self.b @ self.a, turn @ self.layer.bias


class BlockLora(nn.Module):
    """Block-LoRA (arXiv 2501.16720): blocks of B that share one A; y = W x + (B1 + B2) A x."""

    def __init__(self, layer, rank=2, blocks=2):
        super().__init__()
        (out, width), self.layer = layer.weight.shape, layer
        self.blocks, self.a = [draw(out, rank) for _ in range(blocks)], draw(rank, width)

    def forward(self, x):
        return self.layer(x) + sum(x @ self.a.T @ block.T for block in self.blocks)

    def merged(self):
        return self.layer.weight + sum(self.blocks) @ self.a, self.layer.bias


class Mosa(nn.Module):
    """MoSA (arXiv 2312.02923): sparse adapters on disjoint entries, merged into one; y = (W + sum of masked) x."""

    def __init__(self, layer, experts=3):
        super().__init__()
        self.layer, owner = layer, torch.randint(0, experts, layer.weight.shape, generator=GENERATOR)
        self.experts = [draw(*layer.weight.shape) * (owner == i) for i in range(experts)]

    def forward(self, x):
        return self.layer(x) + sum(x @ expert.T for expert in self.experts)

    def merged(self):
        return self.layer.weight + sum(self.experts), self.layer.bias


class LoraSb(nn.Module):
    """LoRA-SB (arXiv 2411.19557): only an r x r matrix between two fixed ones learns; y = W x + B R A x."""

    def __init__(self, layer, rank=4):
        super().__init__()
        (out, width), self.layer = layer.weight.shape, layer
        self.b, self.r, self.a = draw(out, rank, reach=0.5), draw(rank, rank, reach=0.5), draw(rank, width, reach=0.5)

    def forward(self, x):
        return self.layer(x) + x @ self.a.T @ self.r.T @ self.b.T

    def merged(self):
        return self.layer.weight + self.b @ self.r @ self.a, self.layer.bias


class SparseFineTuning(nn.Module):
    """Composable Sparse Fine-Tuning (arXiv 2110.07560): a few entries of weight and bias are tuned by themselves."""

    def __init__(self, layer, share=0.1):
        super().__init__()
        self.layer = layer
        masks = [torch.rand(p.shape, generator=GENERATOR) < share for p in (layer.weight, layer.bias)]
        self.weight, self.bias = (draw(*mask.shape, reach=0.4) * mask for mask in masks)

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight + self.weight, self.layer.bias + self.bias)

    def merged(self):
        return self.layer.weight + self.weight, self.layer.bias + self.bias


class ZeroI2V(nn.Module):
    """ZeroI2V's linear adapter (arXiv 2310.01324): up(down(y)) + y behind a layer, without an activation."""

    def __init__(self, layer, rank=3):
        super().__init__()
        out, self.layer = len(layer.weight), layer
        self.down, self.up = nn.Linear(out, rank), nn.Linear(rank, out)
        for parameter in (*self.down.parameters(), *self.up.parameters()):
            parameter.data = draw(*parameter.shape)

    def forward(self, x):
        y = self.layer(x)
        return y + self.up(self.down(y))

    def merged(self):
        turn = torch.eye(len(self.layer.weight)) + self.up.weight @ self.down.weight
        return turn @ self.layer.weight, turn @ self.layer.bias + self.up(self.down.bias)


def tuned(kind):
    """A tiny backbone whose q, v and fc1 wear the adapter, and the weights of the model that it is merged into."""
    GENERATOR.manual_seed(0)
    wearing = tiny_backbone()
    merged = copied_state(wearing.model)
    for name, module in copy.copy(dict(wearing.model.named_modules())).items():
        if name.endswith(("q_proj", "v_proj", "fc1")):
            layer = kind(module)
            wearing.model.set_submodule(name, layer)
            merged[f"{name}.weight"], merged[f"{name}.bias"] = layer.merged()
    return wearing, merged


@torch.no_grad()
@pytest.mark.parametrize("kind", [Hydra, BlockLora, Mosa, LoraSb, SparseFineTuning, ZeroI2V])
def test_a_foreign_adapter_answers_as_its_own_model(tmp_path, kind):
    wearing, merged = tuned(kind)
    base, images = tiny_backbone(), torch.randn(3, 3, 32, 32)
    head = {"classifier.weight": draw(2, 32), "classifier.bias": draw(2)}
    folder = save_checkpoint(tmp_path / "tuned", merged | head, base, ["cat", "dog"])
    pool = AdapterPool.from_pretrained(folder, backbone=base, require_heads=True)
    tokens = wearing.model(pixel_values=images).last_hidden_state
    expected = tokens[:, 0] @ head["classifier.weight"].T + head["classifier.bias"]
    bare = base.model(pixel_values=images).last_hidden_state
    assert (tokens - bare).abs().max() > 0.1
    with pool.folded(0) as worn:
        torch.testing.assert_close(pool[0].logits(worn, worn(images)[0]), expected, rtol=1e-4, atol=1e-4)
    assert pool.infos[0].labels == ("cat", "dog") and pool.average(rank=4)


def test_weights_that_make_no_checkpoint_leave_no_folder(tmp_path):
    wearing, merged = tuned(Hydra)
    del merged["layers.0.mlp.fc1.weight"]
    with pytest.raises(AdapterError, match="tuned: model.safetensors lacks 1 tensor"):
        save_checkpoint(tmp_path / "tuned", merged, tiny_backbone())
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    with pytest.raises(StorageError, match="a.txt"):
        save_checkpoint(tmp_path / "full", merged, tiny_backbone())
