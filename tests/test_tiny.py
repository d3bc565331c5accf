"""The adapters that other tests stand on are the same everywhere, and know their classes."""

import hashlib

import torch
from safetensors.torch import load_file


def test_the_tiny_adapters_are_the_same_on_every_processor(tiny_pool_path):
    """Their checksums are seeds of the inversion: with another last digit, all that is drawn from them is another."""
    found = []
    for folder in sorted(tiny_pool_path.iterdir()):
        tensors = load_file(folder / "adapter_model.safetensors")
        halves = b"".join(tensors[name].view(torch.int16).numpy().tobytes() for name in sorted(tensors))
        found.append(hashlib.sha256(halves).hexdigest()[:8])
    assert found == ["e6e2a340", "6d79bcf4", "f3b9b096", "e75de442"]


@torch.no_grad()
def test_the_tiny_adapters_know_their_classes(tiny_pool, toy_data):
    for i, adapter in enumerate(tiny_pool):
        rows = (toy_data.labels >= i) & (toy_data.labels < i + 4)
        with tiny_pool.folded(i) as backbone:
            hidden, _ = backbone(backbone.normalize(toy_data.pixels[rows]))
        assert torch.equal(adapter.logits(backbone, hidden).argmax(1), toy_data.labels[rows] - i)
