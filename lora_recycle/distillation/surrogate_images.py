"""The surrogate images of all adapters as one long list, on disk."""

from __future__ import annotations

import torch

from ..backbones.backbone import Backbone
from ..backbones.token_selection import take_patches
from ..errors import DataError
from ..pool.pool import AdapterPool
from ..runtime.terminal import counted
from ..surrogate.dataset import SurrogateDataset
from ..surrogate.shards import ShardRows, check_alike


class SurrogateImages:
    """Rows of shards one after the other; only those asked for are read.

    Args:
        shards: in the order of the pool.
        checksums: of the shards' files.
        use_masks: forward only the kept patches where all shards hold them.
    """

    def __init__(self, shards: list[ShardRows], checksums: list[str], use_masks: bool = True):
        self.shards, self.checksums = shards, checksums
        #: number of the first image of each shard, and after the last the number of images
        self.starts = torch.tensor([0] + [len(shard) for shard in shards]).cumsum(0)
        #: whether only the kept patches are forwarded
        self.masked = use_masks and all("kept_tokens" in shard.tensors for shard in shards)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def of_shard(self, shard: int) -> torch.Tensor:
        """Numbers of the images of one shard: int64 (n,)."""
        return torch.arange(int(self.starts[shard]), int(self.starts[shard + 1]))

    def read(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """int64 (B,) image numbers to what the tensor `name` of the shards holds of them, (B, ...)."""
        owner = torch.searchsorted(self.starts, index, right=True) - 1
        order = owner.argsort(stable=True)
        owners, counts = owner[order].unique_consecutive(return_counts=True)
        rows = (index - self.starts[owner])[order].split(counts.tolist())
        tensors = [self.shards[shard].tensors[name] for shard in owners.tolist()]
        parts = [tensor.read(part) for tensor, part in zip(tensors, rows, strict=True)]
        return torch.cat(parts)[order.argsort()]

    def hidden(self, backbone: Backbone, index: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, tokens, D) of images (B,), of the patches that the student sees of them."""
        inputs, kept = self.inputs(index, backbone.patch_size)
        return backbone(backbone.normalize(inputs), None if kept is None else kept.to(backbone.device))[0]

    def inputs(self, index: torch.Tensor, patch_size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is forwarded of images (B,): uint8 (B, 3, H, W) and None, or kept patches (B, k, 3, p, p) and which."""
        pixels = self.read("pixels", index)
        if not self.masked:
            return pixels, None
        kept = self.read("kept_tokens", index).long()
        return take_patches(pixels, kept, patch_size), kept


def match_shards(pool: AdapterPool, surrogate: SurrogateDataset, use_masks: bool = True) -> SurrogateImages:
    """The surrogate data in the order of the pool. Raises `DataError` where an adapter has none."""
    by_hash = {entry["adapter"]["sha256"]: i for i, entry in enumerate(surrogate.manifest["shards"])}
    missing = [info.name for info in pool.infos if info.sha256 not in by_hash]
    if missing:
        raise DataError(
            f"{surrogate.folder} holds no images of the adapter {missing[0]} ({len(missing)} missing). "
            "Was it made from another pool? Run invert on this one."
        )
    order = [by_hash[info.sha256] for info in pool.infos]
    shards = [surrogate.shard_rows(i, verify=True) for i in order]
    check_alike(shards)
    _check_fits(shards, pool, use_masks)
    return SurrogateImages(shards, [surrogate.manifest["shards"][i]["sha256"] for i in order], use_masks)


def _check_fits(shards: list[ShardRows], pool: AdapterPool, use_masks: bool) -> None:
    """Raise `DataError` where the backbone takes images of another size, or has fewer patches than masks name."""
    pixels, size = shards[0].tensors["pixels"], pool.backbone.image_size
    for shard in shards if use_masks else ():
        kept = shard.tensors.get("kept_tokens")
        if kept is not None and (last := int(kept.read_range(0, len(kept)).max())) >= pool.backbone.num_patches:
            raise DataError(
                f"{kept.path}: kept_tokens names patch {last}, but {pool.backbone.name} has the patches 0 to "
                f"{pool.backbone.num_patches - 1}. Run invert on this pool."
            )
    if pixels.shape[2:] != (size, size):
        raise DataError(
            f"{pixels.path}: its images have {pixels.shape[2]} x {pixels.shape[3]} pixels, but {pool.backbone.name} "
            f"takes {size} x {size}. Run invert on this pool."
        )


def leave_out(
    pool: AdapterPool, surrogate: SurrogateDataset, min_confidence: float
) -> tuple[AdapterPool, list[tuple[str, str]]]:
    """The adapters whose surrogate images are fit to be learnt from, and (adapter, reason) of the others.

    Unfit are those whose inversion failed, and those that give the classes of their own images a mean probability
    below `min_confidence`. Raises `DataError` where none is left.
    """
    scores = {entry["adapter"]["sha256"]: entry["confidence"] for entry in surrogate.manifest["shards"]}
    failed = {entry["sha256"]: entry["reason"] for entry in surrogate.manifest.get("failed", ())}
    kept, excluded = [], []
    for i, info in enumerate(pool.infos):
        score = scores.get(info.sha256)
        if score is None and info.sha256 in failed:
            excluded.append((info.where, f"its inversion failed: {failed[info.sha256]}"))
        elif score is not None and score < min_confidence:
            excluded.append((info.where, f"its images reach a confidence of {score:.2f} only, below {min_confidence}"))
        else:
            kept.append(i)
    if not kept:
        raise DataError(
            f"{surrogate.folder}: none of the {counted(len(pool), 'adapter')} is fit to be learnt from; "
            f"{excluded[0][0]}: {excluded[0][1]}. Lower `min_confidence`, or invert with more iterations."
        )
    return (pool.subset(kept) if excluded else pool), excluded
