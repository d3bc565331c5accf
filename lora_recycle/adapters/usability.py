"""Whether adapters can be used, told from their files and the names and shapes of their base model alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

from ..backbones.backbone import Backbone
from ..backbones.base_models import CONFIG_FILES, BaseModel
from ..errors import AdapterError
from ..hub.download import HubOptions
from ..hub.repo_files import SIDECAR_FILE
from .adapter import Adapter
from .experts import pull_experts, read_domains
from .files import read_sidecar_json
from .load import WeightsNeeded, check_numbers
from .pull import AdapterInfo, read_tensors
from .sources import named_base
from .stored import StoredAdapter
from .zero_shot_heads import check_text_tower, head_of_base, no_text_head


@dataclasses.dataclass(frozen=True)
class Usability:
    """Whether one adapter can be used.

    Args:
        usable (`bool`, *optional*): None where its base model is not available, or only its weights would tell.
        reason (`str`, *optional*): why it cannot, or why that is not known.
    """

    usable: bool | None
    reason: str | None = None

    def __str__(self) -> str:
        word = {True: "yes", False: "no", None: "not known"}[self.usable]
        return word if self.reason is None else f"{word}, because {self.reason}"


@dataclasses.dataclass
class _Base:
    """A base model without its weights, and the configs of PEFT that were met on it, see [`load_adapter`]."""

    files: BaseModel
    backbone: Backbone
    expected: dict = dataclasses.field(default_factory=dict)


def check_usable(
    infos: Sequence[AdapterInfo], base_model: str | None = None, base_revision: str | None = None, **hub: Any
) -> list[Usability]:
    """What a pool for inversion would say of each adapter: the same checks, on a base model whose weights are not
    fetched. A meta-LoRA needs no head. How far a checkpoint is from its base only the weights would tell.

    Args:
        base_model (`str`, *optional*): of all of them, with `base_revision`, in place of those that they name.
        hub: `token`, `cache_dir` and `local_files_only`.
    """
    bases: dict[tuple[str, str | None], _Base | AdapterError] = {}
    given = None if base_model is None else (base_model, base_revision)
    return [_usability(info, given, bases, cast(HubOptions, hub)) for info in infos]


def _usability(
    info: AdapterInfo,
    given: tuple[str, str | None] | None,
    bases: dict[tuple[str, str | None], _Base | AdapterError],
    hub: HubOptions,
) -> Usability:
    try:
        name = given or (named_base(info), info.base_revision)
        if name not in bases:
            bases[name] = _base(*name, hub)
        base = bases[name]
        if isinstance(base, AdapterError):
            check_numbers(info, read_tensors(info))
            return Usability(None, str(base))
        _check(info, base, hub)
    except WeightsNeeded as error:
        return Usability(None, str(error))
    except AdapterError as error:
        return Usability(False, str(error))
    return Usability(True)


def _base(name: str, revision: str | None, hub: HubOptions) -> _Base | AdapterError:
    try:
        files = BaseModel.pull(name, revision, CONFIG_FILES, **hub)
        return _Base(
            files, Backbone(files.empty_tower(), files.image_processor(), files.name, files.commit, files.own_head())
        )
    except AdapterError as error:
        return error


def _check(info: AdapterInfo, base: _Base, hub: HubOptions) -> None:
    """Raise `AdapterError` as a pool, or a model with experts, does."""
    adapter: Adapter | StoredAdapter = StoredAdapter(info, base.backbone, base.expected)
    if (info.path / SIDECAR_FILE).is_file():
        domains = read_domains(read_sidecar_json(info.path, info.where), info.where)
        for expert in pull_experts(info, domains, hub) if domains else ():
            StoredAdapter(expert, base.backbone, base.expected)
        return
    if own := head_of_base(adapter, base.backbone):
        adapter = adapter.with_head(own)
    if not (adapter.headless and adapter.info.labels):
        adapter.require_head(base.backbone)
        return
    try:
        check_text_tower(base.files)
    except AdapterError as error:
        raise no_text_head(info, error) from error
