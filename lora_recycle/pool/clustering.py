"""Which adapters belong together: similarities of their weight changes, and the groups that these fall into."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from ..adapters.adapter import Adapter
from ..surrogate.dataset import evenly_spread


#: Numbers of one block of factors (or of changes), about: 16 MB. Blocks are what is in memory at a time.
BLOCK_NUMBERS = 2**22
#: Where the similarity of two merges falls by more than this factor, the tree is cut.
CUT = 1.5
#: Adapters whose similarities are all computed; of more a sample of so many is grouped.
LARGEST_EXACT = 1000
#: Members of each group of the sample that other adapters are compared with, at most, and how many of those at a time.
REFERENCES, _TOGETHER = 64, 1024
#: Rows of one block of factors; the products of two blocks are (ROWS, ROWS).
BLOCK_ROWS = 512


def similarity_of_changes(adapters: Iterable[Adapter], count: int) -> torch.Tensor:
    """Cosine between weight changes, mean over the modules that both change: (T, T) of `count` = T adapters.

    Each adapter is taken once, and its factors, scaled to norm 1, are laid aside in a temporary folder, which takes
    as much disk as the adapters do (a change of full rank twice the weights that it changes). The products of all
    pairs are exact and quadratic in T.
    """
    total = torch.zeros(count, count)
    modules: dict[str, _Factors] = {}
    with tempfile.TemporaryDirectory(prefix="lora-recycle-") as folder:
        for owner, adapter in enumerate(adapters):
            for module, (b, a) in adapter.factors.items():
                if module not in modules:
                    modules[module] = _Factors(Path(folder) / str(len(modules)), len(b), a.shape[1])
                modules[module].append(owner, b, a)
        present = torch.zeros(count, len(modules))
        for i, name in enumerate(sorted(modules)):
            present[modules[name].owners, i] = 1
            modules[name].add_products(total)
    shared = present @ present.T
    return total.div_(shared.clamp_min_(1))


class _Factors:
    """The factors of all adapters for one module, (B^T | A) as rows of a file."""

    def __init__(self, path: Path, out: int, width: int):
        self.path, self.out, self.width = path, out, width
        self.owners: list[int] = []
        self.ranks: list[int] = []

    def append(self, owner: int, b: torch.Tensor, a: torch.Tensor) -> None:
        norm = ((b.T @ b) * (a @ a.T)).sum(dtype=torch.float64).clamp_min(1e-30).sqrt()
        rows = torch.cat([(b / norm.to(b)).T, a], 1)
        with self.path.open("ab") as file:
            rows.float().cpu().numpy().tofile(file)
        self.owners.append(owner)
        self.ranks.append(len(rows))

    def add_products(self, total: torch.Tensor) -> None:
        """Add the inner product of each pair of changes to its place in (T, T)."""
        size, mean_rank = self.out * self.width, sum(self.ranks) / len(self.ranks)
        dense = mean_rank**2 * (self.out + self.width) > size  # then the changes themselves are less work
        owners, blocks = torch.tensor(self.owners), self._blocks(dense)
        for i, block in enumerate(blocks):
            left, one = self._read(block, dense), owners[block]
            for other in blocks[i:]:
                right, two = left if other is block else self._read(other, dense), owners[other]
                products = self._products(left, right, dense).double()
                if not dense:
                    ranks = [torch.tensor(self.ranks[part]) for part in (block, other)]
                    products = _sum_rows(_sum_rows(products, ranks[0]).T, ranks[1]).T
                products = products.float()
                total[one[:, None], two] += products
                if other is not block:
                    total[two[:, None], one] += products.T

    def _blocks(self, dense: bool) -> list[slice]:
        """Parts of the list of adapters that are small enough to be held; at least one adapter each."""
        blocks, start, rows = [], 0, 0
        for i, rank in enumerate(self.ranks):
            rows += rank
            numbers = (i + 1 - start) * self.out * self.width if dense else rows * (self.out + self.width)
            if i > start and (numbers > BLOCK_NUMBERS or (rows > BLOCK_ROWS and not dense)):
                blocks.append(slice(start, i))
                start, rows = i, rank
        return [*blocks, slice(start, len(self.ranks))]

    def _read(self, block: slice, dense: bool) -> torch.Tensor:
        """(R, out + in) rows of the factors, or (N, out x in) changes where `dense`."""
        first, count = sum(self.ranks[: block.start]), sum(self.ranks[block])
        columns = self.out + self.width
        numbers = np.fromfile(self.path, np.float32, count * columns, offset=4 * first * columns)
        rows = torch.from_numpy(numbers).view(count, columns)
        if not dense:
            return rows
        return torch.stack([(r[:, : self.out].T @ r[:, self.out :]).flatten() for r in rows.split(self.ranks[block])])

    def _products(self, left: torch.Tensor, right: torch.Tensor, dense: bool) -> torch.Tensor:
        if dense:
            return left @ right.T
        # <B1 A1, B2 A2> = sum of (B1^T B2) * (A1 A2^T)
        return (left[:, : self.out] @ right[:, : self.out].T) * (left[:, self.out :] @ right[:, self.out :].T)


def _sum_rows(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """(R, K) to (N, K): sums of `counts` (N,) consecutive rows."""
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    return values.new_zeros(len(counts), values.shape[1]).index_add_(0, owner, values)


def average_linkage_groups(similarity: torch.Tensor, max_groups: int = 8) -> list[list[int]]:
    """Groups of indices from a similarity matrix (T, T), by average linkage, largest group first.

    The tree is cut where the similarity of the merged groups falls by the largest factor; where the merges fall evenly
    all stay one group.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(similarity) < 3:
        return [list(range(len(similarity)))]
    # each pair once: whole matrices in double precision would be most of the memory that many adapters take
    pairs = torch.cat([1 - similarity[i, i + 1 :] for i in range(len(similarity))])
    tree = linkage(pairs.clamp_min_(0).numpy(), method="average")
    merged_at = (1 - torch.tensor(tree[:, 2])).clamp_min(1e-4)  # similarity of each merge, falling
    top = merged_at[-(max_groups + 1) :]
    ratio = top[:-1] / top[1:]
    best = int(ratio.argmax())
    count = len(top) - best if ratio[best] > CUT else 1
    label = fcluster(tree, count, criterion="maxclust")
    groups = [[i for i, v in enumerate(label) if v == g] for g in sorted(set(label))]
    return sorted(groups, key=lambda group: (-len(group), group))


#: Indices of K adapters to their similarity (K, K).
SimilarityOf: TypeAlias = Callable[[list[int]], torch.Tensor]


def groups_by_sample(similarity_of: SimilarityOf, count: int, max_groups: int = 8) -> list[list[int]]:
    """Groups of `count` adapters, more than `LARGEST_EXACT`, in time that grows with their number alone.

    [`average_linkage_groups`] of a sample that is spread evenly over them; every other adapter joins the group to
    whose members (`REFERENCES` of each at most) it is most similar on average, as average linkage has it. A group too
    small to be in the sample does not come out as one.
    """
    everyone = list(range(count))
    sample = evenly_spread(count, LARGEST_EXACT).tolist()
    groups = [[sample[i] for i in group] for group in average_linkage_groups(similarity_of(sample), max_groups)]
    whole = _with_the_rest(groups, everyone, similarity_of)
    return sorted(whole, key=lambda group: (-len(group), group))


def split_by_sample(similarity_of: SimilarityOf, group: list[int]) -> list[list[int]] | None:
    """[`split_group`] of a group of more than `LARGEST_EXACT` adapters, as [`groups_by_sample`] groups."""
    sample = [group[i] for i in evenly_spread(len(group), LARGEST_EXACT).tolist()]
    halves = split_group(similarity_of(sample), list(range(len(sample))))
    return halves and _with_the_rest([[sample[i] for i in half] for half in halves], group, similarity_of)


def _with_the_rest(groups: list[list[int]], everyone: list[int], similarity_of: SimilarityOf) -> list[list[int]]:
    """The groups of a sample with all others in them, each in the group that it is most similar to; sorted inside."""
    if len(groups) == 1:
        return [sorted(everyone)]
    grouped = {i for group in groups for i in group}
    rest, whole = [i for i in everyone if i not in grouped], [list(group) for group in groups]
    references = [[group[i] for i in evenly_spread(len(group), REFERENCES).tolist()] for group in groups]
    known = [i for members in references for i in members]
    for start in range(0, len(rest), _TOGETHER):
        block = rest[start : start + _TOGETHER]
        similarity = similarity_of([*known, *block])[len(known) :, : len(known)]
        parts = similarity.split([len(members) for members in references], dim=1)
        nearest = torch.stack([part.mean(1) for part in parts], 1).argmax(1)
        for adapter, group in zip(block, nearest.tolist(), strict=True):
            whole[group].append(adapter)
    return [sorted(group) for group in whole]


def split_group(similarity: torch.Tensor, group: list[int]) -> list[list[int]] | None:
    """The two halves that average linkage makes of a group last, the more uniform one first; None where the group is
    uniform itself.

    Each half has at least two adapters, and the least similar of its own merges is more similar than the halves are to
    each other, by the factor at which [`average_linkage_groups`] cuts.

    Args:
        similarity: (T, T), of all adapters.
        group: indices of one group.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(group) < 4:
        return None
    own = similarity[group][:, group]

    def merges(members: list[int]) -> list[float]:
        """Similarities of all merges of some members of the group, falling in the order of the tree."""
        pairs = torch.cat([1 - own[i, [j for j in members if j > i]] for i in members[:-1]])
        return (1 - torch.tensor(linkage(pairs.clamp_min(0).numpy(), method="average")[:, 2])).tolist()

    pairs = torch.cat([1 - own[i, i + 1 :] for i in range(len(own))])
    label = fcluster(linkage(pairs.clamp_min(0).numpy(), method="average"), 2, criterion="maxclust")
    halves = [[i for i, v in enumerate(label) if v == g] for g in sorted(set(label))]
    if len(halves) < 2 or min(map(len, halves)) < 2:
        return None
    apart = max(merges(list(range(len(own))))[-1], 1e-4)
    inner = [min(merges(half)) for half in halves]
    if min(inner) <= CUT * apart:
        return None
    ordered = sorted(zip(inner, halves, strict=True), key=lambda pair: -pair[0])
    return [[group[i] for i in half] for _, half in ordered]
