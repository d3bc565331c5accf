"""AdapterPool: many adapters and their heads on one frozen backbone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .backbones import Backbone
from .errors import AdapterError
from .hub.adapters import load_adapter
from .hub.class_names import ClassNames, name_classes
from .hub.sources import BadAdapters, agree_on_base, pull_adapters
from .text_heads import PROMPT, give_heads
from .weight_changes import Adapter, to_adapter, wear_layers


def truncate(b: torch.Tensor, a: torch.Tensor, rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of B A at `rank` (Eckart-Young), both factors carrying the root of the spectrum.

    B A is formed only where that is the smaller computation.
    """
    if b.shape[1] < min(b.shape[0], a.shape[1]):
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        u, vh = q_b @ u, vh @ q_a.T
    else:
        u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
    rank = min(len(s), rank or len(s))
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


class AdapterPool:
    """Adapters of one base model.

    Args:
        backbone ([`Backbone`]): the frozen network that they adapt.
        adapters (`list[Adapter]`): at least one.
        skipped (`list[tuple[str, str]]`, *optional*): name and reason of each adapter that could not be used.
    """

    def __init__(self, backbone: Backbone, adapters: Sequence[Adapter], skipped: Sequence[tuple[str, str]] = ()):
        if not adapters:
            raise AdapterError("A pool needs at least one adapter.")
        self.backbone, self.adapters, self.skipped = backbone, list(adapters), list(skipped)

    @classmethod
    def from_pretrained(
        cls,
        sources: str | Path | Sequence[str | Path],
        base_model: str | Path | None = None,
        *,
        base_revision: str | None = None,
        backbone: Backbone | None = None,
        on_error: str = "raise",
        class_names: ClassNames | None = None,
        prompt: str = PROMPT,
        require_heads: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        progress: bool = False,
    ) -> AdapterPool:
        """Read adapters from folders of PEFT folders, repo ids (`org/a`, `org/b@rev`), text files of such names, Hub
        collections (`collection:org/slug`) and searches (`search:tag,tag`), one source or a list of them.

        The base model is taken from the adapters, which must agree, unless `base_model` (with `base_revision`) or
        `backbone` is given. With `on_error="skip"` an adapter that cannot be used is left out, with a warning and an
        entry in `pool.skipped`; so is one whose base model is another than most adapters name.

        Adapters of CLIP and SigLIP without a head get one from `class_names` (see [`hub.class_names.name_classes`])
        put into `prompt`. With `require_heads`, as inversion needs it, the class names of a card serve too, and an
        adapter that has no head then, or one that does not fit, cannot be used.

        Raises:
            AdapterError: an adapter is missing, damaged, or made for another base model; or all are skipped.
            ConfigError: `on_error` is neither `"raise"` nor `"skip"`, or the class names or the prompt are no good.
        """
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        bad = BadAdapters(on_error)
        infos = pull_adapters(sources, bad, progress=progress, **hub)
        infos = name_classes(infos, class_names, [name for name, _ in bad.skipped])
        if infos and backbone is None:
            if base_model is None:
                base_model, agreed, infos = agree_on_base(infos, bad, base_revision)
                base_revision = base_revision or agreed
            backbone = Backbone.from_pretrained(base_model, revision=base_revision, device=device, dtype=dtype, **hub)
        adapters = []
        for info in tqdm(infos, desc="adapters", disable=not progress):
            with bad.handled(info.where):
                adapters.append(to_adapter(load_adapter(info, backbone.model), backbone))
        if require_heads or class_names is not None:
            adapters = give_heads(adapters, backbone, bad, prompt=prompt, required=require_heads, **hub)
        bad.warn(used=len(adapters))
        return cls(backbone, adapters, bad.skipped)

    #: The same: adapters of the Hub and of folders are named, and mixed, in one way.
    from_hub = from_pretrained

    def __len__(self) -> int:
        return len(self.adapters)

    def __getitem__(self, index: int) -> Adapter:
        return self.adapters[index]

    def subset(self, indices: Sequence[int]) -> AdapterPool:
        return AdapterPool(self.backbone, [self.adapters[i] for i in indices])

    @contextlib.contextmanager
    def folded(self, adapters: Sequence[Adapter] | int | None = None) -> Iterator[Backbone]:
        """The backbone with one adapter, or the exact average of several (all by default), folded into its weights.

        The forward costs what the bare backbone costs. The original weights come back bit by bit. An adapter that
        is no change of weights (`Adapter.layers`) is worn as PEFT's own layers instead, alone only.

        Raises:
            AdapterError: several adapters, of which one is no change of weights.
        """
        if isinstance(adapters, int):
            adapters = [self.adapters[adapters]]
        adapters = self.adapters if adapters is None else adapters
        if len(adapters) > 1:
            _require_weight_changes(adapters)
        parameters = dict(self.backbone.model.named_parameters())
        saved, worn = {}, contextlib.ExitStack()

        def change(name: str, delta: torch.Tensor) -> None:
            saved.setdefault(name, parameters[name].data.clone())
            parameters[name].data += delta.to(parameters[name]) / len(adapters)

        try:
            for module in sorted({m for adapter in adapters for m in adapter.factors}):
                present = [adapter.factors[module] for adapter in adapters if module in adapter.factors]
                change(f"{module}.weight", torch.cat([b for b, _ in present], 1) @ torch.cat([a for _, a in present]))
            for adapter in adapters:
                for name, delta in adapter.others.items():
                    change(name, delta)
                worn.enter_context(wear_layers(self.backbone.model, adapter.layers))
            yield self.backbone
        finally:
            worn.close()
            for name, value in saved.items():
                parameters[name].data.copy_(value)

    def average(
        self, rank: int | None = None, indices: Sequence[int] | None = None
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The exact mean of the weight changes, module to (B, A), cut to `rank` by SVD.

        Averaging the factors themselves would not be the average of what the adapters do. Changes of biases and norms
        are left out, a LoRA cannot carry them.

        Raises:
            AdapterError: one of them is no change of weights.
        """
        chosen = self.adapters if indices is None else [self.adapters[i] for i in indices]
        _require_weight_changes(chosen)
        result = {}
        for module in sorted({m for adapter in chosen for m in adapter.factors}):
            present = [adapter.factors[module] for adapter in chosen if module in adapter.factors]
            b = torch.cat([b for b, _ in present], 1) / len(chosen)
            result[module] = truncate(b, torch.cat([a for _, a in present]), rank)
        return result

    def similarity(self) -> torch.Tensor:
        """Cosine between the adapters' weight changes, mean over the layers that both change: (T, T).

        No change is formed. Layers that only one of the two changes say nothing about how alike they are.
        """
        total, shared = torch.zeros(2, len(self), len(self), dtype=torch.float64)
        for module in sorted({m for adapter in self.adapters for m in adapter.factors}):
            owners = [i for i, adapter in enumerate(self.adapters) if module in adapter.factors]
            factors = [self.adapters[i].factors[module] for i in owners]
            b, a = torch.cat([b for b, _ in factors], 1), torch.cat([a for _, a in factors])
            products = ((b.T @ b) * (a @ a.T)).double()  # <B1 A1, B2 A2> = sum (B1^T B2) * (A1 A2^T)
            ranks = torch.tensor([b.shape[1] for b, _ in factors])
            owner = F.one_hot(torch.tensor(owners).repeat_interleave(ranks), len(self)).double()
            gram = owner.T @ products @ owner
            norm = gram.diagonal().clamp_min(1e-30).sqrt()
            total += gram / norm[:, None] / norm
            present = owner.amax(0)
            shared += present[:, None] * present
        return (total / shared.clamp_min(1)).float()

    def groups(self, max_groups: int = 8) -> list[list[int]]:
        """Adapters that belong together by the similarity of their weight changes (average linkage).

        The tree is cut where the similarity of the merged groups falls by the largest factor; a pool whose merges
        fall evenly stays one group.
        """
        from scipy.cluster.hierarchy import fcluster, linkage
        from scipy.spatial.distance import squareform

        if len(self) < 3:
            return [list(range(len(self)))]
        distance = (1 - self.similarity()).clamp_min(0).fill_diagonal_(0)
        tree = linkage(squareform(distance.double().numpy(), checks=False), method="average")
        merged_at = (1 - torch.tensor(tree[:, 2])).clamp_min(1e-4)  # similarity of each merge, falling
        top = merged_at[-(max_groups + 1) :]
        ratio = top[:-1] / top[1:]
        best = int(ratio.argmax())
        count = len(top) - best if ratio[best] > 1.5 else 1
        label = fcluster(tree, count, criterion="maxclust")
        found = [[i for i, v in enumerate(label) if v == g] for g in sorted(set(label))]
        return sorted(found, key=lambda group: (-len(group), group))

    def randomized(self, seed: int = 0) -> AdapterPool:
        """A control: every weight change replaced by a random one of the same rank and Frobenius norm."""
        generator = torch.Generator().manual_seed(seed)
        adapters = []
        for adapter in self.adapters:
            factors = {}
            for module, (b, a) in adapter.factors.items():
                rank = min(b.shape[1], 16)
                new_b = torch.randn(b.shape[0], rank, generator=generator)
                new_a = torch.randn(rank, a.shape[1], generator=generator)
                scale = torch.linalg.norm(b @ a) / torch.linalg.norm(new_b @ new_a)
                factors[module] = (new_b * scale, new_a)
            adapters.append(dataclasses.replace(adapter, factors=factors, others={}, layers={}))
        return AdapterPool(self.backbone, adapters)


def _require_weight_changes(adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        if adapter.layers:
            raise AdapterError(
                f"{adapter.info.name}: adapters of type {adapter.info.peft_type} change no weights, so they have no "
                "average. It can be inverted; leave it out (pool.subset) where an average is needed."
            )
