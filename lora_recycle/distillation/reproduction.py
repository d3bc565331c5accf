"""Rebuild a meta-LoRA from its sidecar and compare the two."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..adapters.pull import AdapterInfo, pull_adapter
from ..adapters.sources import BadAdapters, named_base, one_id, pull_adapters
from ..adapters.zero_shot_heads import PROMPT
from ..errors import AdapterError, DataError
from ..hub.embedded import BACKBONE_NAME, pool_path, resolve_meta_lora
from ..hub.repo_files import SIDECAR_FILE, WEIGHTS_FILE
from ..inversion.config import InversionConfig
from ..inversion.inverter import LoRAInverter
from ..modeling.serialization import OUTPUT as META_LORA
from ..modeling.sidecar import read_sidecar
from ..pool.pool import AdapterPool
from ..runtime.files import file_sha256
from ..runtime.outputs import check_output, claim_output
from ..surrogate.dataset import OUTPUT as SURROGATE
from ..surrogate.dataset import SurrogateDataset
from .config import DistillationConfig
from .saving import save_meta_lora
from .trainer import MetaLoRATrainer


_DTYPES = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}


Device = str | torch.device | None


@dataclasses.dataclass
class Reproduction:
    """How a rebuilt meta-LoRA compares.

    Args:
        folder: the rebuilt one.
        identical: its weights' file has the same bytes.
        max_difference: the largest absolute difference of a number; infinite where the tensors are others.
        shards: how many shards of surrogate data have the recorded checksum, and of how many; None where the sidecar
            records none.
        conditions: each version, property of the machine or of the base model that is another: name, recorded value,
            value here.
    """

    folder: Path
    identical: bool
    max_difference: float
    shards: tuple[int, int] | None
    conditions: list[tuple[str, Any, Any]]


def reproduce(
    meta_lora: str | Path,
    output: str | Path,
    *,
    pool: Sequence[str | Path] = (),
    surrogate: str | Path | None = None,
    device: Device = None,
    progress: bool = True,
) -> Reproduction:
    """Make a meta-LoRA again: invert its source adapters, unless `surrogate` is given, and distil them.

    It computes with as many threads as the sidecar says, since the order of sums depends on their number.

    Args:
        meta_lora: folder or repo id (`org/name@revision`) of a meta-LoRA with its sidecar; `demo` for the shipped one.
        output: folder that surrogate data and the new meta-LoRA go to; a run that was interrupted goes on.
        pool: where source adapters lie that came from folders, in any form that [`AdapterPool.from_pretrained`] takes.
            Those of the Hub are fetched at their commits. The shipped pool is known.
        surrogate: folder or repo id of the surrogate data that it was made from.

    Raises:
        AdapterError: there is no sidecar, it does not say how the meta-LoRA was made, or the weights are coded.
        DataError: a source adapter is not available with the recorded bytes.
        StorageError: `output` holds something else than an earlier reproduction, or cannot be written.
    """
    name, revision = one_id(str(resolve_meta_lora(meta_lora)))
    info, output = pull_adapter(name, revision=revision), Path(output)
    if info.bits is not None:
        raise AdapterError(
            f"{info.where}: its weights are stored in {info.bits} bits, which no longer are the bytes that training "
            "gave. Name the meta-LoRA that it was made from."
        )
    settings = _recipe(info)
    check_output(output / "surrogate", SURROGATE)
    check_output(output / "meta_lora", META_LORA)
    with _threads((settings.get("hardware") or {}).get("threads")):
        distillation = DistillationConfig.from_dict(settings["distillation"], where=f"{info.where}: {SIDECAR_FILE}")
        adapters = _pool(info, settings, pool, torch.float32, device)
        data = _surrogate(info, settings, adapters, pool, surrogate, output, progress) if distillation.steps else None
        trainer = MetaLoRATrainer(adapters, data, distillation)
        claim_output(output / "meta_lora", META_LORA)
        trainer.train(output / "meta_lora" / "work", progress=progress)
        model = trainer.to_model()
        save_meta_lora(model, output / "meta_lora")
    return _compare(info, settings, model.settings, output / "meta_lora")


def _recipe(info: AdapterInfo) -> dict[str, Any]:
    """The sidecar, checked to hold what is needed."""
    where = f"{info.where}: {SIDECAR_FILE}"
    settings = read_sidecar(info.path / SIDECAR_FILE)
    kinds: dict[str, Any] = {"sources": list, "distillation": dict, "inversion": (dict, type(None)), "versions": dict}
    kinds |= {key: (dict, type(None)) for key in ("hardware", "backbone", "inversion_data_sha256")}
    for key, kind in kinds.items():
        if not isinstance(settings.get(key), kind):
            raise AdapterError(f"{where} does not say how it was made: {key} is missing or damaged.")
    for source in settings["sources"]:
        if not isinstance(source, dict) or not all(isinstance(source.get(key), str) for key in ("name", "sha256")):
            raise AdapterError(f"{where}: a source must have a name and a sha256, got {source!r:.200}.")
    return settings


def _pool(info: AdapterInfo, settings: dict, given: Sequence, dtype: torch.dtype, device: Device) -> AdapterPool:
    """The source adapters in their order, with the heads that they were inverted with."""
    sources = settings["sources"]
    known = list(given) or ([pool_path()] if info.base_model == BACKBONE_NAME else [])
    local: dict[str, Path] = {}
    if any(not source.get("revision") for source in sources):
        infos = pull_adapters(known, BadAdapters("raise")) if known else []
        local = {one.sha256: one.path for one in infos}
    names = []
    for source in sources:
        if not source.get("revision") and source["sha256"] not in local:
            raise DataError(
                f"{info.where}: was made of {source['name']} (sha256 {source['sha256'][:12]}...), a folder that is "
                f"not among {', '.join(map(str, known)) or 'the adapters given'}. Name the pool that it was made of."
            )
        names.append(f"{source['name']}@{source['revision']}" if source.get("revision") else local[source["sha256"]])
    prompted = {s["name"]: s["labels"] for s in sources if s.get("prompt") and s.get("labels")}
    prompt = next((s["prompt"] for s in sources if s.get("prompt")), PROMPT)
    base = None if info.base_model is None else named_base(info)
    options: dict[str, Any] = {"base_revision": info.base_revision, "class_names": prompted or None, "prompt": prompt}
    pool = AdapterPool.from_pretrained(names, base, device=device, dtype=dtype, **options)
    for source, got in zip(sources, pool.infos, strict=True):
        if got.sha256 != source["sha256"]:
            raise DataError(f"{got.where}: has not the bytes that {info.where} was made of; its repo was rewritten.")
    return pool


def _surrogate(
    info: AdapterInfo,
    settings: dict,
    pool: AdapterPool,
    given: Sequence[str | Path],
    surrogate: str | Path | None,
    output: Path,
    progress: bool,
) -> SurrogateDataset:
    if surrogate is not None:
        name, revision = one_id(str(surrogate))
        return SurrogateDataset.from_pretrained(name, revision=revision, progress=progress)
    if settings["inversion"] is None:
        raise AdapterError(f"{info.where}: {SIDECAR_FILE} has no recipe of the surrogate data. Pass the data itself.")
    config = InversionConfig.from_dict(settings["inversion"], where=f"{info.where}: {SIDECAR_FILE}")
    precision = settings.get("inversion_precision")
    dtype = _DTYPES.get(precision[0] if isinstance(precision, list) and precision else "torch.float32", torch.float32)
    if dtype != torch.float32:
        pool = _pool(info, settings, given, dtype, pool.backbone.device)
    return LoRAInverter(pool, config).run(output / "surrogate", progress=progress)


def _compare(info: AdapterInfo, settings: dict, now: dict, folder: Path) -> Reproduction:
    there, here = load_file(info.path / WEIGHTS_FILE), load_file(folder / WEIGHTS_FILE)
    same_form = there.keys() == here.keys() and all(there[key].shape == here[key].shape for key in there)
    gaps = [(there[key].float() - here[key].float()).abs().max().item() for key in there] if same_form else []
    checksums = [
        (s.get("surrogate_sha256"), t.get("surrogate_sha256"))
        for s, t in zip(settings["sources"], now["sources"], strict=True)
    ]
    known = [one == other for one, other in checksums if one is not None]
    conditions = []
    for group in ("versions", "hardware", "backbone", "inversion_data_sha256"):
        recorded, current = settings.get(group) or {}, now[group] or {}
        conditions += [
            (f"{group}: {key}", recorded[key], current.get(key))
            for key in recorded
            if recorded[key] != current.get(key)
        ]
    return Reproduction(
        folder,
        identical=file_sha256(folder / WEIGHTS_FILE) == info.sha256,
        max_difference=max(gaps, default=float("inf")),
        shards=(sum(known), len(known)) if known else None,
        conditions=conditions,
    )


@contextlib.contextmanager
def _threads(number: Any) -> Iterator[None]:
    before = torch.get_num_threads()
    if isinstance(number, int) and 1 <= number <= 1024:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
