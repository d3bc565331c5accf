"""AdapterPool: many adapters and their heads on one frozen backbone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn
from tqdm.auto import tqdm

from ..adapters.adapter import Adapter
from ..adapters.class_names import ClassNames, name_classes
from ..adapters.low_rank import as_factors, cut, decompose
from ..adapters.peft_wrap import wear_layers
from ..adapters.pull import AdapterInfo
from ..adapters.sources import BadAdapters, agree_on_base, pull_adapters
from ..adapters.stored import StoredAdapter, marked_as_changed
from ..adapters.weight_deltas import ChangeSum
from ..adapters.zero_shot_heads import PROMPT, give_heads
from ..backbones.backbone import Backbone
from ..errors import AdapterError
from ..hub.download import HubOptions
from .clustering import average_linkage_groups, similarity_of_changes


class AdapterPool:
    """Adapters of one base model.

    A sequence: `pool[i]` is one adapter, and a loop over the pool gives one after another. Adapters of files are read
    when they are asked for, and only the last one is held. `pool.infos` says what they all are, without reading.

    Args:
        backbone ([`Backbone`]): the frozen network that they adapt.
        adapters (`list`): at least one [`Adapter`] (in memory) or [`StoredAdapter`] (in its file).
        skipped (`list[tuple[str, str]]`, *optional*): name and reason of each adapter that could not be used.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapters: Sequence[Adapter | StoredAdapter | RandomizedAdapter],
        skipped: Sequence[tuple[str, str]] = (),
    ):
        if not adapters:
            raise AdapterError("A pool needs at least one adapter.")
        self.backbone, self.skipped, self._members = backbone, list(skipped), list(adapters)
        self._last: tuple[object, Adapter] | None = None
        self._similarity: torch.Tensor | None = None

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
        collections (`collection:org/slug`), searches (`search:tag,tag`) and authors (`author:org`), one source or a
        list of them.

        The base model is taken from the adapters, which must agree, unless `base_model` (with `base_revision`) or
        `backbone` is given. Every adapter is read and checked now, and read again when it is used; its file must stay
        as it is. With `on_error="skip"` an adapter that cannot be used is left out, with a warning and an entry in
        `pool.skipped`; so is one whose base model is another than most adapters name.

        Adapters of CLIP and SigLIP without a head get one from `class_names` put into `prompt` (see
        [`adapters.class_names.name_classes`]). With `require_heads`, as inversion needs it, the class names of a card
        serve too, and an adapter that has no head then, or one that does not fit, cannot be used.

        Raises:
            AdapterError: an adapter is missing, damaged, or made for another base model; or all are skipped.
            ConfigError: `on_error` is neither `"raise"` nor `"skip"`, or the class names or the prompt are no good.
        """
        hub = HubOptions(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        bad = BadAdapters(on_error)
        infos = pull_adapters(sources, bad, progress=progress, **hub)
        infos = name_classes(infos, class_names, [name for name, _ in bad.skipped])
        if infos and backbone is None:
            if base_model is None:
                base_model, agreed, infos = agree_on_base(infos, bad, base_revision)
                base_revision = base_revision or agreed
            backbone = Backbone.from_pretrained(base_model, revision=base_revision, device=device, dtype=dtype, **hub)
        adapters: list[Adapter | StoredAdapter] = []
        expected: dict[str, dict[str, torch.Tensor]] = {}
        backbone = cast(Backbone, backbone)  # None only where `infos` is empty, which is refused below
        for info in tqdm(infos, desc="adapters", disable=not progress):
            with bad.handled(info.where):
                adapters.append(StoredAdapter(info, backbone, expected))
        if require_heads or class_names is not None:
            adapters = give_heads(adapters, backbone, bad, prompt=prompt, required=require_heads, **hub)
        bad.warn(used=len(adapters))
        return cls(backbone, adapters, bad.skipped)

    #: The same: adapters of the Hub and of folders are named, and mixed, in one way.
    from_hub = from_pretrained

    @property
    def infos(self) -> list[AdapterInfo]:
        """What each adapter is: name, commit, checksum, type, labels."""
        return [member.info for member in self._members]

    def require_heads(self) -> None:
        """Raise `AdapterError` where an adapter has no head, or one that does not fit."""
        for member in self._members:
            member.require_head(self.backbone)

    def __repr__(self) -> str:
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"AdapterPool({len(self)} adapters of {self.backbone.name!r}{skipped})"

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Adapter:
        """Read one adapter.

        Raises:
            AdapterError: its file changed since the pool was made, or an adapter is folded into the backbone now.
        """
        member = self._members[index]
        if self._last is None or self._last[0] is not member:
            self._last = None  # before the next one takes memory
            with torch.inference_mode(False):  # the next one who asks may need gradients through it
                self._last = member, member.load()
        return self._last[1]

    def __iter__(self) -> Iterator[Adapter]:
        return (self[i] for i in range(len(self)))

    def subset(self, indices: Sequence[int]) -> AdapterPool:
        return AdapterPool(self.backbone, [self._members[i] for i in indices])

    @contextlib.contextmanager
    def folded(self, adapters: Sequence[Adapter] | AdapterPool | int | None = None) -> Iterator[Backbone]:
        """The backbone with one adapter, or the exact average of several (all by default), folded into its weights.

        The forward costs what the bare backbone costs. The original weights come back bit by bit. An adapter that
        is no change of weights (`Adapter.peft_layers`) is applied as PEFT's own layers instead, alone only.

        Raises:
            AdapterError: several adapters, of which one is no change of weights.
        """
        if isinstance(adapters, int):
            adapters = [self[adapters]]
        adapters = self if adapters is None else adapters
        total, layers = (_sum_changes(adapters), {}) if len(adapters) > 1 else _only_changes(adapters[0])
        parameters = dict(self.backbone.model.named_parameters())
        saved: dict[str, torch.Tensor] = {}

        def change(name: str, delta: torch.Tensor) -> None:
            saved.setdefault(name, parameters[name].data.clone())
            parameters[name].data += delta.to(parameters[name]) / len(adapters)

        with marked_as_changed(self.backbone):
            try:
                for module in total.modules:
                    change(f"{module}.weight", total.delta(module))
                for name, delta in total.vector_deltas.items():
                    change(name, delta)
                with wear_layers(self.backbone.model, layers):
                    yield self.backbone
            finally:
                for name, value in saved.items():
                    parameters[name].data.copy_(value)

    def average(
        self, rank: int | None = None, indices: Sequence[int] | None = None
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The exact mean of the weight changes, module to (B, A), cut to `rank` by SVD.

        Averaging the factors themselves would not be the average of what the adapters do. Changes of biases and norms
        are left out, a LoRA cannot carry them. Adapters are read one by one; memory is that of one change of all
        weights at most.

        Raises:
            AdapterError: one of them is no change of weights.
        """
        return {module: cut(*factors, rank) for module, factors in self.whole_averages(indices)}

    def whole_averages(
        self, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
        """`average` module by module, cut nowhere: B (out, R) and A (R, in) of falling columns and rows, whose squared
        norms multiply to the squares of the singular values."""
        chosen = self if indices is None else self.subset(indices)
        total = _sum_changes(chosen)
        for module in total.modules:
            factors = total.factors(module)
            if factors is None:
                u, s, vh = torch.linalg.svd(total.delta(module) / len(chosen), full_matrices=False)
                yield module, as_factors(u, s, vh)
            else:
                yield module, decompose(factors[0] / len(chosen), factors[1])

    def similarity(self) -> torch.Tensor:
        """Cosine between the adapters' weight changes, mean over the layers that both change: (T, T).

        Layers that only one of the two changes say nothing about how alike they are. Computed once, as starts,
        teachers and the methods that go by groups all ask.
        """
        if self._similarity is None:
            self._similarity = similarity_of_changes(self, len(self))
        return self._similarity

    def groups(self, max_groups: int = 8) -> list[list[int]]:
        """Adapters that belong together by the similarity of their weight changes, see [`average_linkage_groups`]."""
        return average_linkage_groups(self.similarity(), max_groups)

    def randomized(self, seed: int = 0) -> AdapterPool:
        """A control: every weight change replaced by a random one of the same rank and Frobenius norm."""
        generator, members = torch.Generator().manual_seed(seed), []
        for i, member in enumerate(self._members):
            members.append(RandomizedAdapter(member, generator.get_state()))
            _randomize(self[i], generator)  # goes on to the state of the next one
        return AdapterPool(self.backbone, members)


@dataclasses.dataclass
class RandomizedAdapter:
    """A random adapter of the norms of `source`, drawn again from the generator's `state` whenever it is asked for."""

    source: Adapter | StoredAdapter | RandomizedAdapter
    state: torch.Tensor

    @property
    def info(self) -> AdapterInfo:
        return self.source.info

    @property
    def headless(self) -> bool:
        return self.source.headless

    def require_head(self, backbone: Backbone) -> None:
        self.source.require_head(backbone)

    def load(self) -> Adapter:
        generator = torch.Generator()
        generator.set_state(self.state)
        return _randomize(self.source.load(), generator)


def _randomize(adapter: Adapter, generator: torch.Generator) -> Adapter:
    factors = {}
    for module, (b, a) in adapter.factors.items():
        rank = min(b.shape[1], 16)
        new_b = torch.randn(b.shape[0], rank, generator=generator)
        new_a = torch.randn(rank, a.shape[1], generator=generator)
        scale = torch.linalg.norm(b @ a) / torch.linalg.norm(new_b @ new_a)
        factors[module] = (new_b * scale, new_a)
    return dataclasses.replace(adapter, factors=factors, vector_deltas={}, peft_layers={})


def _only_changes(adapter: Adapter) -> tuple[ChangeSum, dict[str, nn.Module]]:
    total = ChangeSum()
    total.add(adapter)
    return total, adapter.peft_layers


def _sum_changes(adapters: Iterable[Adapter]) -> ChangeSum:
    total = ChangeSum()
    for adapter in adapters:
        if adapter.peft_layers:
            raise AdapterError(
                f"{adapter.info.name}: adapters of type {adapter.info.peft_type} change no weights, so they have no "
                "average. It can be inverted; leave it out (pool.subset) where an average is needed."
            )
        total.add(adapter)
    return total
