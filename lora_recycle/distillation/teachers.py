"""What the teachers say of the surrogate images, computed once before training."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..errors import DataError
from ..pool import AdapterPool
from ..relations import compress
from ..surrogate import Shard, SurrogateDataset


@dataclasses.dataclass
class TeacherGroup:
    """Surrogate images that the same adapters teach.

    `images` (N,) indexes the concatenated surrogate data; `features` float16 (N, D) have as inner products the mean
    cosine similarity over the group's adapters.
    """

    adapters: list[int]
    images: torch.Tensor
    features: torch.Tensor


def match_shards(pool: AdapterPool, surrogate: SurrogateDataset) -> list[Shard]:
    """The surrogate data's shards in the order of the pool. Raises `DataError` where an adapter has none."""
    by_hash = {entry["adapter"]["sha256"]: i for i, entry in enumerate(surrogate.manifest["shards"])}
    missing = [info.name for info in pool.infos if info.sha256 not in by_hash]
    if missing:
        raise DataError(
            f"{surrogate.folder} holds no images of the adapter {missing[0]} ({len(missing)} missing). "
            "Was it made from another pool? Run invert on this one."
        )
    return [surrogate.shard(by_hash[info.sha256], verify=True) for info in pool.infos]


@torch.inference_mode()
def teach(
    pool: AdapterPool, shards: list[Shard], groups: list[list[int]], progress: bool = True, batch_size: int = 128
) -> tuple[list[TeacherGroup], torch.Tensor]:
    """Every adapter's view of its group's images.

    Returns the groups, and int16 (T, N) what each adapter's head says of all images (-1 outside of its group).
    """
    counts = torch.tensor([len(shard) for shard in shards])
    starts = counts.cumsum(0) - counts
    predictions = torch.full((len(pool), int(counts.sum())), -1, dtype=torch.int16)
    backbone, found = pool.backbone, []
    bar = tqdm(total=len(pool), desc="teachers", unit="adapter", disable=not progress)
    for members in groups:
        images = torch.cat([torch.arange(int(counts[i])) + starts[i] for i in members])
        pixels = torch.cat([shards[i].pixels for i in members])
        blocks = []
        for i in members:
            block = []
            with pool.folded(i):
                for start in range(0, len(pixels), batch_size):
                    hidden, _ = backbone(backbone.normalize(pixels[start : start + batch_size]))
                    block.append(F.normalize(backbone.pool(hidden).float(), dim=-1).cpu())
                    if pool[i].head_weight is not None:
                        said = pool[i].logits(backbone.pool_for_head(hidden)).argmax(1)
                        predictions[i, images[start : start + batch_size]] = said.to(torch.int16).cpu()
            blocks.append((torch.cat(block) / len(members) ** 0.5).half())
            bar.update()
        found.append(TeacherGroup(members, images, compress(torch.cat(blocks, 1)).half()))
    bar.close()
    return found, predictions
