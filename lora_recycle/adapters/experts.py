"""The experts in a meta-LoRA's repo: what its sidecar says of them, and their files. Nothing of it is trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterError
from ..fewshot.domains import ROLES, SHARED, Expert
from ..hub.download import HubOptions, fetch
from ..hub.repo_files import CODES_FILE, CONFIG_FILE, MAX_EXPERTS, SIDECAR_FILE, WEIGHTS_FILE, expert_folder
from ..runtime.untrusted_files import MAX_TEXT_BYTES
from ..runtime.untrusted_tensors import MAX_FILE_BYTES
from .files import compare_checksums
from .places import join_name, split_name
from .pull import AdapterInfo, describe_adapter


#: All files of an expert that are ever read, and the most bytes that each may have.
EXPERT_FILES = {CONFIG_FILE: MAX_TEXT_BYTES, WEIGHTS_FILE: MAX_FILE_BYTES, CODES_FILE: MAX_FILE_BYTES}
_MAX_NAME, _MAX_SPREAD = 80, 2.0


@dataclass(frozen=True)
class ExpertEntry:
    """What a sidecar says of one expert.

    Args:
        expert: what the choice needs.
        adapters: name and SHA-256 of each adapter that it was made of.
        checksums: SHA-256 of its files, as of [`adapters.files.checksums`].
    """

    expert: Expert
    adapters: list[dict[str, Any]]
    checksums: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As the sidecar holds it."""
        return {**vars(self.expert), "adapters": self.adapters, "checksums": self.checksums}


@dataclass(frozen=True)
class DomainEntries:
    """The part `domains` of a sidecar. The n-th expert lies in `experts/<n>`.

    Args:
        reference_spread: how far the bare backbone spreads procedural pictures, see [`choose_domain`].
    """

    experts: list[ExpertEntry]
    reference_spread: float

    def to_dict(self) -> dict[str, Any]:
        """As the sidecar holds it."""
        return {"reference_spread": self.reference_spread, "experts": [entry.to_dict() for entry in self.experts]}


def read_domains(settings: dict[str, Any], where: str) -> DomainEntries | None:
    """The part `domains` of a sidecar, None where it has none. Raises `AdapterError` where it is damaged."""
    found = settings.get("domains")
    if found is None:
        return None
    try:
        return _parsed(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"{where}: {SIDECAR_FILE}: the part `domains` is damaged ({str(error)[:200]}). Fetch the meta-LoRA again."
        ) from error


def _parsed(found: Any) -> DomainEntries:
    """Raises `KeyError`, `TypeError` or `ValueError` where it is not what `to_dict` gives."""
    spread, rows = _number(found["reference_spread"], _MAX_SPREAD), found["experts"]
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_EXPERTS:
        raise ValueError(f"experts must be a list of 1 to {MAX_EXPERTS}")
    entries = [_entry(row) for row in rows]
    names = [entry.expert.name for entry in entries]
    if len({SHARED, *names}) <= len(names):
        raise ValueError(f"the names of its experts must differ from each other and from {SHARED!r}")
    return DomainEntries(entries, spread)


def _entry(row: dict[str, Any]) -> ExpertEntry:
    name, role, adapters, checksums = row["name"], row["role"], row["adapters"], row["checksums"]
    if not isinstance(name, str) or not name.isprintable() or not 1 <= len(name) <= _MAX_NAME:
        raise ValueError(f"the name of an expert must be 1 to {_MAX_NAME} characters")
    if role not in ROLES:
        raise ValueError(f"the role of {name} must be one of {', '.join(ROLES)}")
    known = isinstance(adapters, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("sha256"), str)
        for one in adapters
    )
    if not known or not isinstance(checksums, dict):
        raise ValueError(f"{name} must name its adapters and its checksums")
    share = _number(row["share"], 1.0)
    if share >= 1:
        raise ValueError(f"the share of {name} must be below 1")
    return ExpertEntry(Expert(name, role, share), adapters, checksums)


def _number(value: Any, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"expected a number, got {str(value)[:80]}")
    if not 0 < value <= most:
        raise ValueError(f"expected a number above 0 and at most {most}, got {value}")
    return float(value)


def pull_experts(info: AdapterInfo, domains: DomainEntries, hub: HubOptions) -> list[AdapterInfo]:
    """Describe the experts that the sidecar of a pulled meta-LoRA announces; from the Hub they are fetched now.

    Raises:
        AdapterError: one is missing, damaged, not the one that was saved with the rest, of another base model, or lies
            outside of the repo.
    """
    numbers = range(1, len(domains.experts) + 1)
    if info.revision is not None and not all((info.path / expert_folder(n) / CONFIG_FILE).is_file() for n in numbers):
        repo, sub = split_name(info.name)
        folders = [join_name(sub, expert_folder(n)) if sub else expert_folder(n) for n in numbers]
        wanted = {f"{folder}/{name}": most for folder in folders for name, most in EXPERT_FILES.items()}
        fetch(repo, wanted, info.revision, **hub)  # into the folder that the commit has already
    return [_pulled(info, number, entry) for number, entry in zip(numbers, domains.experts, strict=True)]


def _pulled(info: AdapterInfo, number: int, entry: ExpertEntry) -> AdapterInfo:
    name = expert_folder(number)
    folder, where = info.path / name, f"{info.where}: {name} ({entry.expert.name})"
    if not folder.resolve().is_relative_to(info.path.resolve()):
        raise AdapterError(f"{where}: is a link that leaves the repo, to {folder.resolve()}.")
    if not folder.is_dir():
        raise AdapterError(f"{where}: the expert is missing, though {SIDECAR_FILE} announces it. Fetch it again.")
    expert = describe_adapter(folder, f"{info.name}/{name}", info.revision)
    compare_checksums(entry.checksums, folder, where, expert.config, expert.sha256)
    if (expert.base_model, expert.base_revision) != (info.base_model, info.base_revision):
        raise AdapterError(
            f"{where}: is made for {expert.base_model!r} at {expert.base_revision}, the meta-LoRA for "
            f"{info.base_model!r} at {info.base_revision}."
        )
    return expert
