"""A meta-LoRA as a folder: PEFT's files, our sidecar and the fitted task, which belong together or are refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Protocol

from peft import LoraConfig, PeftModel

from ..adapters.experts import EXPERT_FILES, DomainEntries
from ..adapters.files import checksums
from ..adapters.peft_wrap import Layers
from ..adapters.quantization import CODE_BITS, check_bits, store_weights
from ..backbones.backbone import Backbone
from ..errors import AdapterError, StorageError
from ..fewshot.domains import SHARED
from ..fewshot.heads import FewShotHead
from ..hub.card_files import read_card
from ..hub.cards import NO_CARD, meta_lora_card
from ..hub.embedded import backbone_name
from ..hub.repo_files import (
    CARD_FILE,
    CODES_FILE,
    EXPERTS_FOLDER,
    PICTURE_FILE,
    SIDECAR_FILE,
    TASK_FILE,
    WEIGHTS_FILE,
    expert_folder,
    optional_file,
)
from ..runtime.files import remove_abandoned, replacing_files
from ..runtime.outputs import OutputKind, check_output, holds_json
from ..runtime.terminal import utf8
from ..version import __version__
from .domains import DomainNetworks
from .merge_layers import worn_for_saving
from .sidecar import FORMAT_VERSION
from .task import FewShotTask, save_task


#: What `save_pretrained` and `distill` write to a folder.
OUTPUT = OutputKind("a meta-LoRA", lambda folder: holds_json(folder / SIDECAR_FILE, "lora_recycle_version"))
#: What a folder holds only where it is written anew.
_OPTIONAL = (WEIGHTS_FILE, CODES_FILE, TASK_FILE, PICTURE_FILE)


class SavableModel(Protocol):
    """What is saved of a meta-LoRA."""

    backbone: Backbone
    peft_model: PeftModel | None
    settings: dict[str, Any]
    picture: bytes | None
    head: FewShotHead
    _task: FewShotTask | None
    domain_networks: DomainNetworks | None
    _merged: Layers
    _merged_domain: str


def write_meta_lora(
    model: SavableModel, folder: str | Path, bits: int | None = None, *, keep_card: bool = True
) -> None:
    """Write a model to a folder that is new, empty, or holds a meta-LoRA already.

    All files are written beside their places first. The sidecar takes its place before any other, with the checksums
    of what is to come, and the weights after all others: where that is cut short, the folder is reported as damaged,
    and never read as a mixture.

    Args:
        bits: for each weight, as of `save_pretrained`.
        keep_card: a README.md that is there stays, with PEFT's header; otherwise it is written anew.

    Raises:
        AdapterError: the card in the folder cannot be read.
        ConfigError: another number of bits.
        StorageError: the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    if bits is not None:
        check_bits(bits)
    check_output(folder, OUTPUT)
    remove_abandoned(folder, "files")
    with replacing_files(folder, _place, removes=[*_OPTIONAL, *_expert_files(folder)]) as new:
        earlier = _card_in(folder) if keep_card else None
        if earlier is not None:
            (new / CARD_FILE).write_bytes(utf8(earlier))  # PEFT only adds to a card that is there
        domains = _write_experts(model, new, bits)
        _write_adapter(model, SHARED, model.peft_model, new)
        store_weights(new, bits)
        if model._task is not None:
            save_task(new / TASK_FILE, model._task)
        if model.picture is not None:
            (new / PICTURE_FILE).write_bytes(model.picture)
        settings = model.settings | _own_settings(model) | {"checksums": checksums(new)}
        settings = {key: value for key, value in settings.items() if key != "domains"} | domains
        if earlier is None:
            (new / CARD_FILE).write_bytes(utf8(_card(model, folder.name, settings, bits)))
        (new / SIDECAR_FILE).write_text(json.dumps(settings, indent=1, allow_nan=False), encoding="utf-8")
    _remove_empty_folders(folder)


def _place(name: str) -> tuple[bool, bool, str]:
    return name != SIDECAR_FILE, name in (WEIGHTS_FILE, CODES_FILE), name


def _write_experts(model: SavableModel, folder: Path, bits: int | None) -> dict[str, Any]:
    """Each expert in its folder; gives what the sidecar says of them."""
    if model.domain_networks is None:
        return {}
    entries = []
    for number, network in enumerate(model.domain_networks, 1):
        own = folder / expert_folder(number)
        _write_adapter(model, network.expert.name, network.peft_model, own)
        (own / CARD_FILE).unlink()  # PEFT's; the root's card describes the experts too
        store_weights(own, bits)
        entries.append(dataclasses.replace(network.entry, checksums=checksums(own)))
    return {"domains": DomainEntries(entries, model.domain_networks.reference_spread).to_dict()}


def _expert_files(folder: Path) -> list[str]:
    """Files of experts that lie there now."""
    found = sorted(folder.glob(f"{EXPERTS_FOLDER}/*"))
    if outside := [path for path in (folder / EXPERTS_FOLDER, *found) if path.is_symlink()]:
        raise StorageError(f"{outside[0]}: is a link, and experts are only written to folders. Take it out.")
    numbered = [own.name for own in found if own.is_dir() and own.name.isdecimal()]
    return [f"{EXPERTS_FOLDER}/{number}/{name}" for number in numbered for name in EXPERT_FILES]


def _remove_empty_folders(folder: Path) -> None:
    for path in (*folder.glob(f"{EXPERTS_FOLDER}/*/"), folder / EXPERTS_FOLDER):
        with contextlib.suppress(OSError):
            path.rmdir()  # only an empty one goes


def _write_adapter(model: SavableModel, domain: str, peft_model: PeftModel | None, folder: Path) -> None:
    assert peft_model is not None, "of a frozen backbone there is nothing to write"
    config: Any = peft_model.peft_config["default"]  # of the class of its type
    config.base_model_name_or_path = backbone_name(config.base_model_name_or_path)
    given, merged = config.target_modules, model._merged if model._merged_domain == domain else {}
    config.target_modules = _targets(peft_model)
    try:
        with worn_for_saving(peft_model, merged) as worn:
            # no embedding layers: PEFT would ask the Hub whether the base's vocabulary grew
            worn.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    finally:
        config.target_modules = given


def _targets(peft_model: PeftModel) -> str | list[str]:
    """Which modules the saved config names: of a LoRA as a pattern that only the headless backbone's names match.

    Plain names would match in `...ForImageClassification` too, where they stand behind `vit.`: its head is untrained
    and it would find no tensors of the adapter, and so would answer at random after a warning. PEFT and transformers
    raise where a pattern matches nothing.
    """
    config: Any = peft_model.peft_config["default"]
    if not isinstance(config, LoraConfig):
        return sorted(config.target_modules)  # PEFT writes a set in any order
    tuner: Any = peft_model.base_model
    paths = set(tuner.targeted_module_names)
    one_a_layer = {re.sub(r"(?<=\.)\d+(?=\\\.|$)", r"\\d+", re.escape(path)) for path in paths}
    pattern = "|".join(sorted(one_a_layer))
    matched = {name for name, _ in peft_model.get_base_model().named_modules() if re.fullmatch(pattern, name)}
    return pattern if matched == paths else "|".join(sorted(map(re.escape, paths)))


def _own_settings(model: SavableModel) -> dict[str, Any]:
    return {
        "head": model.head.name,
        "metric": model.settings.get("metric", "cosine"),
        "temperature": model.settings.get("temperature", 0.1),
        "image_processor": model.backbone.processor_settings(),
        "format_version": FORMAT_VERSION,
        "lora_recycle_version": __version__,
        "num_classes": None if model._task is None else len(model._task.label_names),
    }


def _card(model: SavableModel, name: str, settings: dict[str, Any], bits: int | None) -> str:
    assert model.peft_model is not None
    config: Any = model.peft_model.peft_config["default"]
    base = config.base_model_name_or_path, config.revision, getattr(config, "r", None)
    coded = bits if bits in CODE_BITS else None
    try:
        return meta_lora_card(name, *base, settings, model.picture is not None, coded)
    except NO_CARD:
        own = _own_settings(model)  # what a stranger's sidecar says beside it is no card's
        return meta_lora_card(name, *base, own, model.picture is not None, coded)


def _card_in(folder: Path) -> str | None:
    path = optional_file(folder, CARD_FILE, str(folder))
    try:
        return None if path is None else str(read_card(path))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{folder}: {CARD_FILE} cannot be read ({error}). Take it out to have a new one."
        ) from error
