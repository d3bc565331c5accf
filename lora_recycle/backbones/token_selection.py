"""Token selection: pure functions on tensors, and the attention that shows which patches CLS looks at.

Eq. 5 of LoRA Recycle (arXiv 2412.02220): a patch is worth the attention that CLS pays it, averaged over heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


ATTENTION_NAME = "lora_recycle_sdpa"


class ClsAttention:
    """Holds the CLS row that the last attention computed while it was being recorded: (B, T), mean over heads.

    Where a model has no CLS token, the row is the mean over all tokens that look: what each is worth to the others.
    """

    row: torch.Tensor  # there once the attention has run
    recording = False
    has_cls = True


def sdpa_with_cls_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA that also keeps softmax(q_cls k^T), the one row of the map that token pruning needs.

    `query`, `key`, `value` are (B, heads, T, head_dim). The row carries no gradient.
    """
    recorder = getattr(module, "cls_attention", None)
    if recorder is not None and recorder.recording:
        with torch.no_grad():
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            looking = query[:, :, :1] if recorder.has_cls else query
            scores = (looking @ key.transpose(-1, -2)).float() * scale  # (B, heads, 1 or T, T)
            recorder.row = scores.softmax(-1).mean((1, 2))
    slow = query.requires_grad and query.dtype == torch.bfloat16 and query.device.type == "cpu"
    plain = attention_mask is None and not kwargs.get("dropout") and not getattr(module, "is_causal", True)
    if slow and plain:
        return _attention_by_products(query, key, value, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _attention_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attention as two matrix products: (B, heads, T, head_dim) three times to (B, T, heads, head_dim).

    On CPUs the gradient of SDPA in bfloat16 takes about ten times as long as these products', which have kernels of
    their own there; its forward, and float32, are no slower.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights = (query * scale @ key.transpose(-1, -2)).softmax(-1).to(value.dtype)  # autocast makes it float32
    return (weights @ value).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION_NAME, sdpa_with_cls_row)


@contextlib.contextmanager
def record_cls_attention(layer: torch.nn.Module, has_cls: bool = True) -> Iterator[ClsAttention]:
    """Record the CLS row of the attention inside one transformer layer, or without CLS the mean of all rows."""
    recorder = ClsAttention()
    recorder.recording, recorder.has_cls = True, has_cls
    attention: list[Any] = [m for m in layer.modules() if hasattr(m, "is_causal")]
    for module in attention:
        module.cls_attention = recorder
    try:
        yield recorder
    finally:
        for module in attention:
            del module.cls_attention


def num_kept(num_patches: int, keep_ratio: float) -> int:
    """Patches kept of `num_patches` at a keep ratio in (0, 1]: at least one."""
    return max(1, round(num_patches * keep_ratio))


def select_top(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The positions of the `k` largest scores of each row, ascending: (B, P) to int64 (B, k)."""
    return scores.topk(k, dim=-1, sorted=False).indices.sort(-1).values


def keep_tokens(hidden: torch.Tensor, kept: torch.Tensor, num_prefix: int) -> torch.Tensor:
    """Prefix tokens and the kept patches: (B, num_prefix + P, D), (B, k) to (B, num_prefix + k, D)."""
    index = (kept + num_prefix)[..., None].expand(-1, -1, hidden.shape[-1])
    return torch.cat([hidden[:, :num_prefix], hidden.gather(1, index)], dim=1)


def take_patches(images: torch.Tensor, kept: torch.Tensor, size: int) -> torch.Tensor:
    """The kept patches of images: (B, C, H, W), (B, k) to (B, k, C, size, size)."""
    grid = images.unfold(2, size, size).unfold(3, size, size)  # a view: (B, C, rows, columns, size, size)
    columns = grid.shape[3]
    image = torch.arange(len(images), device=kept.device)[:, None]
    return grid.permute(0, 2, 3, 1, 4, 5)[image, kept // columns, kept % columns]
