"""AdapterPool: many adapters and their heads on one frozen backbone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

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
from ..images.labelled import LabelledImages, load_labelled_images
from .clustering import (
    LARGEST_EXACT,
    average_linkage_groups,
    groups_by_sample,
    similarity_of_changes,
    split_by_sample,
    split_group,
)
from .fitted_heads import with_fitted_head
from .randomized import RandomizedAdapter, randomize


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
        #: by `max_groups`
        self._groups: dict[int, list[list[int]]] = {}

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
        support: str | Path | LabelledImages | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        progress: bool = False,
    ) -> AdapterPool:
        """Read adapters from folders of PEFT folders, repo ids (`org/a`, `org/b@rev`, `org/c/sub-folder`), text files
        of such names, Hub collections (`collection:org/slug`), searches (`search:tag,tag`) and authors
        (`author:org`), one source or a list of them.

        A whole checkpoint of the base model's architecture (`ViTForImageClassification`, ...) is a member like an
        adapter: its change is its weights minus the base model's, exact to rounding, and its head and class names are
        its own.

        The base model is taken from the adapters, which must agree, unless `base_model` (with `base_revision`) or
        `backbone` is given. Every adapter is read and checked now, and read again when it is used; its file must stay
        as it is. With `on_error="skip"` an adapter that cannot be used is left out, with a warning and an entry in
        `pool.skipped`; so is one whose base model is another than most adapters name.

        Adapters of CLIP and SigLIP without a head get one from `class_names` put into `prompt` (see
        [`adapters.class_names.name_classes`]). With `require_heads`, as inversion needs it, the class names of a card
        serve too, and an adapter that has no head then, or one that does not fit, cannot be used. With `support`, a
        few labelled images (a folder of class folders, or what else `load_labelled_images` reads), every adapter
        without a head gets one for their classes: the nearest prototype of what it sees of them.

        Raises:
            AdapterError: an adapter is missing, damaged, or made for another base model; or all are skipped.
            ConfigError: `on_error` is neither `"raise"` nor `"skip"`, or the class names or the prompt are no good.
        """
        hub = HubOptions(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        bad = BadAdapters(on_error)
        infos = pull_adapters(sources, bad, progress=progress, **hub)
        infos = name_classes(infos, class_names, [name for name, _ in bad.skipped])
        named = False  # by the adapters, not by the user
        if infos and backbone is None:
            if base_model is None:
                base_model, agreed, infos = agree_on_base(infos, bad, base_revision)
                base_revision = base_revision or agreed
                named = True
            try:
                options: dict[str, Any] = {"revision": base_revision, "device": device, "dtype": dtype, **hub}
                backbone = Backbone.from_pretrained(base_model, **options)
            except AdapterError as error:
                if not named:
                    raise
                raise AdapterError(f"{error} Where it lies elsewhere, pass base_model=... (--base-model)") from error
        adapters: list[Adapter | StoredAdapter] = []
        expected: dict[str, dict[str, torch.Tensor]] = {}
        backbone = cast(Backbone, backbone)  # None only where `infos` is empty, which is refused below
        for info in tqdm(infos, desc="adapters", disable=not progress):
            with bad.handled(info.where):
                adapters.append(StoredAdapter(info, backbone, expected))
        if class_names is not None or (require_heads and support is None):
            required = require_heads and support is None
            adapters = give_heads(adapters, backbone, bad, prompt=prompt, required=required, **hub)
        if support is not None:
            adapters = cls._fitted(backbone, adapters, support)
        bad.warn(used=len(adapters))
        return cls(backbone, adapters, bad.skipped)

    @classmethod
    def _fitted(
        cls, backbone: Backbone, adapters: Sequence[Adapter | StoredAdapter], support: str | Path | LabelledImages
    ) -> list[Adapter | StoredAdapter]:
        """Those without a head get one for the classes of `support`. Raises `AdapterError` as `require_heads`."""
        if not isinstance(support, LabelledImages):
            support = load_labelled_images(support, backbone.image_size, int(backbone.processor.resample))
        headed = []
        for adapter in adapters:
            if adapter.headless:
                with cls(backbone, [adapter]).folded(0) as worn:
                    adapter = with_fitted_head(adapter, worn, support)
            adapter.require_head(backbone)
            headed.append(adapter)
        return headed

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
    def folded(
        self, adapters: Sequence[Adapter] | AdapterPool | int | None = None, scale: float = 1.0
    ) -> Iterator[Backbone]:
        """The backbone with one adapter, or the exact average of several (all by default), folded into its weights.

        The change is multiplied by `scale`. The forward costs what the bare backbone costs. The original weights come
        back bit by bit. An adapter that is no change of weights (`Adapter.peft_layers`) is applied as PEFT's own
        layers instead, alone and unscaled only.

        Raises:
            AdapterError: several adapters, or a scale, and one of the adapters is no change of weights.
        """
        if isinstance(adapters, int):
            adapters = [self[adapters]]
        adapters = self if adapters is None else adapters
        total, layers = (_sum_changes(adapters), {}) if len(adapters) > 1 or scale != 1 else _only_changes(adapters[0])
        parameters = dict(self.backbone.model.named_parameters())
        saved: dict[str, torch.Tensor] = {}

        def change(name: str, delta: torch.Tensor) -> None:
            saved.setdefault(name, parameters[name].data.clone())
            parameters[name].data += delta.to(parameters[name]) / (len(adapters) / scale)

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
        """Adapters that belong together by the similarity of their weight changes, see [`average_linkage_groups`]; of
        more than a thousand see [`groups_by_sample`]. Computed once."""
        if max_groups not in self._groups:
            if len(self) > LARGEST_EXACT:
                self._groups[max_groups] = groups_by_sample(self._similarity_of, len(self), max_groups)
            else:
                self._groups[max_groups] = average_linkage_groups(self.similarity(), max_groups)
        return [list(group) for group in self._groups[max_groups]]

    def halves(self, group: list[int]) -> list[list[int]] | None:
        """The two halves that a group falls into, None where it is uniform, see [`split_group`]."""
        if len(group) > LARGEST_EXACT:
            return split_by_sample(self._similarity_of, group)
        if len(self) > LARGEST_EXACT:
            halves = split_group(self._similarity_of(group), list(range(len(group))))
            return halves and [[group[i] for i in half] for half in halves]
        return split_group(self.similarity(), group)

    def _similarity_of(self, indices: list[int]) -> torch.Tensor:
        return similarity_of_changes(self.subset(indices), len(indices))

    def randomized(self, seed: int = 0) -> AdapterPool:
        """A control: every weight change replaced by a random one of the same rank and Frobenius norm."""
        generator, members = torch.Generator().manual_seed(seed), []
        for i, member in enumerate(self._members):
            members.append(RandomizedAdapter(member, generator.get_state()))
            randomize(self[i], generator)  # goes on to the state of the next one
        return AdapterPool(self.backbone, members)


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
