"""Token pruning: what CLS looks at, and that dropped patches are really gone."""

import pytest
import torch
from helpers_tiny import tiny_backbone, tiny_vit

from lora_recycle.backbones.token_selection import (
    keep_tokens,
    num_kept,
    record_cls_attention,
    sdpa_with_cls_row,
    select_top,
)


def eager_rows(x):
    """(layers, B, T): attention of CLS, mean over heads, as transformers' eager attention gives it."""
    model = tiny_vit()
    model.set_attn_implementation("eager")
    return torch.stack([a[:, :, 0].mean(1) for a in model(x, output_attentions=True).attentions])


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
def test_the_recorded_row_is_that_of_eager_attention(layer):
    view, x = tiny_backbone(), torch.randn(3, 3, 32, 32)
    with record_cls_attention(view.layers[layer]) as attention:
        view(x)
    torch.testing.assert_close(attention.row, eager_rows(x)[layer])
    torch.testing.assert_close(attention.row.sum(1), torch.ones(3))
    first = attention.row
    view(torch.randn(3, 3, 32, 32))  # outside of the context nothing is recorded
    assert attention.row is first and not any(hasattr(m, "cls_attention") for m in view.layers.modules())


def test_select_top_and_num_kept():
    scores = torch.tensor([[0.1, 0.5, 0.2, 0.4], [0.9, 0.0, 0.8, 0.7]])
    assert select_top(scores, 2).tolist() == [[1, 3], [0, 2]]
    assert [num_kept(16, r) for r in (0.01, 0.25, 0.5, 0.98, 1.0)] == [1, 4, 8, 16, 16]


def test_keep_tokens_by_hand():
    hidden = torch.arange(6.0).view(1, 6, 1)  # two prefix tokens, patches 2 to 5
    assert keep_tokens(hidden, torch.tensor([[1, 3]]), 2).flatten().tolist() == [0, 1, 3, 5]


@torch.no_grad()
def test_pruning_keeps_the_patches_that_cls_looks_at():
    view, x = tiny_backbone(), torch.randn(3, 3, 32, 32)
    _, kept = view(x, prune={0: 0.5})
    assert torch.equal(kept, select_top(eager_rows(x)[0][:, 1:], 8))


@torch.no_grad()
def test_pruning_a_kept_set_gives_positions_in_the_image():
    view, x = tiny_backbone(), torch.randn(2, 3, 32, 32)
    start = torch.tensor([[1, 3, 5, 7, 9, 11], [0, 2, 4, 6, 8, 10]])
    hidden, kept = view(x, start, prune={0: 0.25})
    assert hidden.shape[1] == 5 and kept.shape == (2, 4)
    assert all(set(k) <= set(s) for k, s in zip(kept.tolist(), start.tolist(), strict=True))
    wider, same = view(x, start, prune={0: 0.5})  # 8 of 16 patches: all 6 stay
    torch.testing.assert_close(wider, view(x, start)[0])
    assert torch.equal(same, start)


@torch.no_grad()
def test_shares_fall_from_layer_to_layer():
    view, x = tiny_backbone(), torch.randn(2, 3, 32, 32)
    _, half = view(x, prune={0: 0.5})
    hidden, quarter = view(x, prune={0: 0.5, 1: 0.25})
    assert hidden.shape[1] == 5 and quarter.shape == (2, 4)  # shares of all patches, not of those still there
    assert all(set(q) <= set(h) for q, h in zip(quarter.tolist(), half.tolist(), strict=True))


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_bfloat16_is_that_of_sdpa_with_its_gradients(scaling, autocast):
    whole, found = torch.randn(3, 2, 4, 9, 16), []
    module = tiny_vit().layers[0].attention
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = leaves = [part.to(dtype).requires_grad_() for part in whole]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            looked, _ = sdpa_with_cls_row(module, query, key, value, None, scaling=scaling)
        assert looked.shape == (2, 9, 4, 16) and looked.dtype == dtype
        assert ("ScaledDotProduct" in graph_of(looked)) == (dtype == torch.float32)
        looked.float().square().sum().backward()
        found.append([looked, *(leaf.grad for leaf in leaves)])
    for exact, rounded in zip(*found, strict=True):
        assert (exact - rounded.float()).norm() < 0.02 * exact.norm()


def graph_of(tensor):
    names, waiting = "", [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        names += node.name()
        waiting += [child for child, _ in node.next_functions if child is not None]
    return names
