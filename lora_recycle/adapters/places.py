"""Where adapters and whole checkpoints lie: in a folder or repo itself, in its sub-folders, in a run's checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..backbones.base_config import CONFIG_FILE as MODEL_CONFIG
from ..backbones.base_models import WEIGHTS as MODEL_WEIGHTS
from ..errors import AdapterError
from ..hub.download import HubOptions, fetch, list_files
from ..hub.repo_files import CARD_FILE, CODES_FILE, CONFIG_FILE, WEIGHTS_FILE
from ..runtime.untrusted import parse_json
from ..runtime.untrusted_files import MAX_TEXT_BYTES, read_text
from ..runtime.untrusted_tensors import MAX_FILE_BYTES
from .files import BIN_FILES, REPO_FILES


#: All that is ever downloaded of a checkpoint, and the most bytes that each file may have.
CHECKPOINT_FILES = {MODEL_CONFIG: MAX_TEXT_BYTES, MODEL_WEIGHTS: MAX_FILE_BYTES, CARD_FILE: MAX_TEXT_BYTES}
#: How deep a local folder is searched.
MAX_FOLDERS_DEEP = 8

_ADAPTER_BIN, _MODEL_BIN = BIN_FILES
_ADAPTER_WEIGHTS, _MODEL_FILES = {WEIGHTS_FILE, CODES_FILE, _ADAPTER_BIN}, {MODEL_WEIGHTS, _MODEL_BIN}
_CLASSIFIER = re.compile(r"\w+ForImageClassification(WithTeacher)?")
_RUN = re.compile(r"checkpoint-(\d{1,12})")
_SHOWN = 5


@dataclass(frozen=True)
class Place:
    """Where one adapter, or one whole checkpoint, lies.

    Args:
        folder (`Path`): a local one, or one in the snapshot of a commit, with the files that are read.
        name (`str`): what it is called: `org/name`, `org/name/sub-folder`, or the folder's name.
        revision (`str`, *optional*): the commit, None for a local folder.
        is_checkpoint (`bool`): whether it holds all weights of a model, not an adapter.
        is_bin (`bool`): whether its weights are there only as pickled ones, which are not read.
    """

    folder: Path
    name: str
    revision: str | None = None
    is_checkpoint: bool = False
    is_bin: bool = False

    @property
    def where(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def split_name(name: str) -> tuple[str, str]:
    """`org/name/some/folder` to `org/name` and `some/folder`, which is empty for the repo itself.

    Raises:
        AdapterError: the sub-folder leaves the repo.
    """
    owner, _, rest = name.partition("/")
    repo, _, sub = rest.partition("/")
    parts = sub.rstrip("/").split("/") if sub else []
    if any(part in ("", ".", "..") or re.search(r"[\\*?\[\]\0]", part) for part in parts):
        raise AdapterError(f"{name}: no such folder or repo: the sub-folder {sub!r} leaves the repo {owner}/{repo}.")
    return f"{owner}/{repo}" if repo else name, "/".join(parts)


def join_name(repo: str, subfolder: str | None) -> str:
    """The reverse of [`split_name`], of a repo id or a local folder."""
    return f"{repo.rstrip('/')}/{subfolder}" if subfolder else repo


def place_of_folder(folder: Path) -> Place | None:
    """What a local folder itself is; None where it is neither an adapter nor a checkpoint."""
    kind = _kind({path.name for path in folder.iterdir() if path.is_file()})
    parent = folder.absolute().parent.name
    name = f"{parent}/{folder.name}" if _RUN.fullmatch(folder.name) and parent else folder.name
    return None if kind is None else Place(folder, name, None, *kind)


def find_adapters(folder: str | Path) -> list[Path]:
    """The folder itself if it is an adapter or a checkpoint, else those of its sub-folders that are, sorted.

    Of the folders `checkpoint-500`, `checkpoint-1000`, ... of one run the last one counts. A checkpoint in a
    sub-folder counts only if it is an image classifier; a base model beside its adapters does not count.

    Raises:
        AdapterError: the folder is missing or holds no adapter, or a link to one that lies elsewhere.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder.")
    if place_of_folder(folder):
        return [folder]
    found = [path for path in _walk(folder, folder.resolve()) if not (_is_checkpoint(path) and _is_bare(path))]
    if not found:
        raise AdapterError(
            f"{folder}: no adapter here; neither it nor its sub-folders hold {CONFIG_FILE}, or the {MODEL_CONFIG} and "
            f"{MODEL_WEIGHTS} of an image classifier."
        )
    kept = _last_of_runs([path.relative_to(folder).as_posix() for path in found])
    return [folder / name for name in kept]


def places_in_repo(name: str, revision: str | None, hub: HubOptions) -> list[Place]:
    """The adapters and checkpoints of `org/name` or `org/name/sub-folder` at one commit, their files fetched.

    That is the one at the top, or where there is none those of the sub-folders, by the rules of [`find_adapters`].

    Raises:
        AdapterError: as [`fetch`]; or there is neither an adapter nor a checkpoint.
    """
    repo, sub = split_name(name)
    top = _fetched(repo, sub, [""], REPO_FILES, revision, hub)
    commit, where = top.name, f"{name}@{top.name}"
    files = _names_below(sub, [p.relative_to(top).as_posix() for p in (top / sub).rglob("*") if p.is_file()])
    if not {CONFIG_FILE, WEIGHTS_FILE} <= files.get("", set()):  # the usual case needs no look at the rest
        files = _names_below(sub, list_files(repo, commit, **hub)) or files
    kinds = {folder: kind for folder, names in files.items() if (kind := _kind(names))}
    inner = [folder for folder in kinds if not _inside_another(folder, kinds)]
    whole = [folder for folder in inner if folder and kinds[folder][0]]
    if whole:
        _fetched(repo, sub, whole, {MODEL_CONFIG: MAX_TEXT_BYTES}, commit, hub)
        inner = [folder for folder in inner if folder not in whole or not _is_bare(top / sub / folder)]
    chosen = _last_of_runs(inner)
    if not chosen:
        raise AdapterError(
            f"{where}: no adapter here: {CONFIG_FILE} is missing, in the sub-folders too, and so are the "
            f"{MODEL_CONFIG} and {MODEL_WEIGHTS} of an image classifier."
        )
    for wanted, is_checkpoint in ((REPO_FILES, False), (CHECKPOINT_FILES, True)):
        folders = [folder for folder in chosen if kinds[folder][0] == is_checkpoint and (folder or is_checkpoint)]
        if folders:
            _fetched(repo, sub, folders, wanted, commit, hub)
    return [Place(top / sub / one, join_name(name.rstrip("/"), one), commit, *kinds[one]) for one in chosen]


def only_place(places: list[Place], name: str) -> Place:
    """The one place. Raises `AdapterError` where there are several."""
    if len(places) > 1:
        names = ", ".join(place.name for place in places[:_SHOWN]) + (", ..." if len(places) > _SHOWN else "")
        raise AdapterError(f"{name}: holds {len(places)} adapters ({names}). Name one of them.")
    return places[0]


def _kind(names: set[str]) -> tuple[bool, bool] | None:
    """Whether the files of a folder are a checkpoint's, not an adapter's, and whether they are only pickled ones."""
    whole = MODEL_CONFIG in names and bool(names & _MODEL_FILES)
    if CONFIG_FILE in names and (names & _ADAPTER_WEIGHTS or not whole):  # the second: an error says what is missing
        return False, _ADAPTER_BIN in names and not names & {WEIGHTS_FILE, CODES_FILE}
    return (True, MODEL_WEIGHTS not in names) if whole else None


def _is_checkpoint(folder: Path) -> bool:
    return bool((place := place_of_folder(folder)) and place.is_checkpoint)


def _is_bare(folder: Path) -> bool:
    """Whether a checkpoint's `config.json` names no image classifier, of transformers or of timm."""
    try:
        settings = parse_json(read_text(folder / MODEL_CONFIG))
    except (OSError, ValueError):
        return True
    if not isinstance(settings, dict):
        return True
    classes = settings.get("architectures")
    named = isinstance(classes, list) and any(isinstance(c, str) and _CLASSIFIER.fullmatch(c) for c in classes)
    return not (named or (settings.get("architecture") and settings.get("num_classes")))


def _walk(folder: Path, root: Path, depth: int = 0) -> Iterator[Path]:
    """The adapters and checkpoints below `folder`; what lies inside of one is its own affair."""
    for child in sorted(path for path in folder.iterdir() if path.is_dir()):
        real = child.resolve()
        inside = real.is_relative_to(root)
        # a hidden folder is one that a writer has not finished, and what a link leads to in here is found there
        if child.name.startswith(".") or (child.is_symlink() and inside):
            continue
        if place_of_folder(child):
            if not inside:
                raise AdapterError(
                    f"{root}: {child.name} is a link that leaves the folder, to {real}. To use that adapter, name "
                    "its own folder."
                )
            yield child
        elif inside and depth < MAX_FOLDERS_DEEP:
            yield from _walk(child, root, depth + 1)


def _last_of_runs(folders: Iterable[str]) -> list[str]:
    """The folders, sorted, of `checkpoint-*` beside each other the one with the highest number."""
    kept, last = [], dict[str, tuple[int, str]]()
    for folder in folders:
        parent, _, name = folder.rpartition("/")
        run = _RUN.fullmatch(name)
        if run is None:
            kept.append(folder)
        else:
            last[parent] = max(last.get(parent, (-1, "")), (int(run[1]), folder))
    return sorted([*kept, *(folder for _, folder in last.values())])


def _inside_another(folder: str, folders: Iterable[str]) -> bool:
    return any(folder != other and f"{folder}/".startswith(f"{other}/" if other else "") for other in folders)


def _names_below(sub: str, files: Iterable[str]) -> dict[str, set[str]]:
    """Folder below `sub` to the names of its files; hidden folders are left out."""
    found: dict[str, set[str]] = {}
    for path in files:
        if sub and not path.startswith(f"{sub}/"):
            continue
        folder, _, name = path.removeprefix(f"{sub}/" if sub else "").rpartition("/")
        if not any(part.startswith(".") for part in folder.split("/")):
            found.setdefault(folder, set()).add(name)
    return found


def _fetched(
    repo: str, sub: str, folders: Iterable[str], files: dict[str, int], revision: str | None, hub: HubOptions
) -> Path:
    """The snapshot with `files` of each of the folders below `sub`."""
    paths = ["/".join(part for part in (sub, folder) if part) for folder in folders]
    wanted = {f"{path}/{name}" if path else name: most for path in paths for name, most in files.items()}
    try:
        return fetch(repo, wanted, revision, **hub)
    except AdapterError as error:
        if not sub:
            raise
        reason = str(error).removeprefix(repo)  # the name as the user gave it
        raise AdapterError(f"{repo}/{sub}{reason}") from error
