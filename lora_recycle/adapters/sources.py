"""Many adapters at once: what names them (ids, folders, lists, collections, searches), and their parallel download."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HTTPError
from tqdm.auto import tqdm

from ..errors import AdapterError, ConfigError
from ..hub.download import HubOptions, explain, repeated
from ..runtime.terminal import counted
from ..runtime.untrusted_files import read_text
from .checkpoint_files import CHECKPOINT
from .places import Place, find_adapters
from .pull import AdapterInfo, describe_place, find_places


COLLECTION, SEARCH, AUTHOR = "collection:", "search:", "author:"
#: Adapters that are pulled at the same time.
WORKERS = 8


class AdapterId(NamedTuple):
    """One adapter: a local folder, or a repo id with a branch, tag, pull request or commit."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


class BadAdapters:
    """What happens to adapters that cannot be used: the first one stops the run, or all are skipped and told.

    Args:
        on_error (`str`): `"raise"` or `"skip"`. Raises `ConfigError` for anything else.
    """

    def __init__(self, on_error: str):
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error must be raise or skip, got {on_error!r}.")
        self.on_error = on_error
        self.skipped: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def handled(self, name: str) -> Iterator[None]:
        """Around work on one adapter: where adapters are skipped, an `AdapterError` ends the block, not the run."""
        try:
            yield
        except AdapterError as error:
            if self.on_error == "raise":
                raise
            self.skipped.append((name, str(error)))

    def warn(self, used: int) -> None:
        """Say which adapters were skipped. Raises `AdapterError` where no usable one is left."""
        if not used and self.skipped:
            every = counted(len(self.skipped), "adapter")
            raise AdapterError(f"None of the {every} can be used. {self.skipped[0][1]}")
        if self.skipped:
            reasons = "\n".join(f"- {reason}" for _, reason in self.skipped)
            every = counted(used + len(self.skipped), "adapter")
            warnings.warn(f"{len(self.skipped)} of {every} skipped:\n{reasons}")


def pull_adapters(
    sources: str | Path | Sequence[str | Path],
    bad: BadAdapters,
    *,
    progress: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> list[AdapterInfo]:
    """Pull the adapters that `sources` name (see [`adapter_ids`]) side by side, in the order of their names there.

    Raises:
        AdapterError: a source cannot be read, or an adapter is bad and `bad` does not skip it.
    """
    hub = HubOptions(
        token=token, cache_dir=cache_dir, local_files_only=local_files_only, force_download=force_download
    )
    ids = adapter_ids(sources, token, local_files_only)
    infos = []
    workers = ThreadPoolExecutor(WORKERS)
    try:
        futures = [workers.submit(_pull_all, one, hub) for one in ids]
        # read in the order of the sources, so that the same error comes first every time
        remote = sum(not Path(one.name).is_dir() for one in ids)
        quiet = not progress or remote < 2  # folders and a single adapter take no time worth a bar
        bar = tqdm(zip(ids, futures, strict=True), desc="pull", total=len(ids), disable=quiet, leave=False)
        for one, future in bar:
            with bad.handled(str(one)):
                for found in future.result():
                    with bad.handled(found.where):
                        infos.append(found.info())
    finally:
        workers.shutdown(cancel_futures=True)
    return infos


@dataclasses.dataclass(frozen=True)
class _Pulled:
    """An adapter, or why it is none: one of several in a repo does not spoil the others."""

    where: str
    found: AdapterInfo | AdapterError

    def info(self) -> AdapterInfo:
        if isinstance(self.found, AdapterError):
            raise self.found
        return self.found


def _pull_all(one: AdapterId, hub: HubOptions) -> list[_Pulled]:
    """All adapters and checkpoints of a folder or a repo. Raises `AdapterError` where there is none."""
    return [_pulled(place) for place in find_places(one.name, one.revision, hub)]


def _pulled(place: Place) -> _Pulled:
    try:
        return _Pulled(place.where, describe_place(place))
    except AdapterError as error:
        return _Pulled(place.where, error)


def named_base(info: AdapterInfo) -> str:
    """The base model that an adapter names: for one of the Hub a repo id, since a path is its author's.

    Raises:
        AdapterError: it names none, or an adapter of the Hub names a path.
    """
    if info.base_model is None:
        raise unnamed_base(info)
    if info.revision and (".." in info.base_model or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", info.base_model)):
        raise AdapterError(
            f"{info.where}: adapter_config.json names the local path {info.base_model[:200]!r} as its base model, "
            "which means nothing on this machine. Pass base_model=... (--base-model)"
        )
    return info.base_model


def agree_on_base(
    infos: Sequence[AdapterInfo], bad: BadAdapters, base_revision: str | None = None
) -> tuple[str, str | None, list[AdapterInfo]]:
    """The base model that most of the adapters name, its revision, and the adapters that name both.

    An adapter of another base is bad. `base_revision` takes precedence over theirs; then only the names must agree.

    Raises:
        AdapterError: none names a base model, or one is bad and `bad` does not skip it.
    """

    def base(info: AdapterInfo) -> tuple[str, str | None]:
        return str(info.base_model), None if base_revision or info.base_revision == "main" else info.base_revision

    def agrees(info: AdapterInfo) -> bool:
        if info.peft_type != CHECKPOINT:
            return base(info) == chosen
        return info.base_model in (None, chosen[0])  # it names no revision; its weights are compared when it is read

    named = Counter(base(info) for info in infos if info.base_model and info.peft_type != CHECKPOINT)
    whole = Counter(info.base_model for info in infos if info.base_model and info.peft_type == CHECKPOINT)
    counts = {one: count + whole[one[0]] for one, count in named.items()}
    counts |= {(name, None): count for name, count in whole.items() if all(name != one for one, _ in named)}
    if not counts:
        raise unnamed_base(infos[0])
    chosen = max(counts, key=lambda one: counts[one])  # the first of those that are named as often
    first = next(info for info in infos if info.base_model and agrees(info))
    named_base(first)
    agreeing = []
    for info in infos:
        with bad.handled(info.where):
            if not agrees(info):
                raise AdapterError(
                    f"{first.name} is made for {AdapterId(*chosen)} and {info.name} for {AdapterId(*base(info))}: a "
                    "pool has one base model. Leave one out, or pass base_model=... (and base_revision=...) if they "
                    "are the same."
                )
            agreeing.append(info)
    return *chosen, agreeing


def unnamed_base(info: AdapterInfo) -> AdapterError:
    """What is wrong with an adapter whose base model nobody names."""
    if info.peft_type == CHECKPOINT:
        said = "neither its card nor its config.json names the base model that it was tuned from"
    else:
        said = "adapter_config.json names no base model"
    return AdapterError(f"{info.where}: {said}. Pass base_model=... (--base-model)")


def adapter_ids(
    sources: str | Path | Sequence[str | Path], token: str | bool | None = None, local_files_only: bool = False
) -> list[AdapterId]:
    """The adapters that one or several sources name, each once. A source is one of

    - a folder: an adapter or a checkpoint, or a folder of them, which is searched
    - `org/name` or `org/name@revision`: a repo of the Hub, with one or several of them
    - `org/name/sub-folder`, with or without `@revision`: one in a sub-folder of a repo
    - `ids.txt`: a text file with one source in each line; what follows `#` is a comment
    - `collection:org/slug`: the models of a collection
    - `search:tag,tag`: the models that have all these tags, for example
      `search:base_model:adapter:google/vit-base-patch16-224,peft`, sorted by name
    - `author:name`: all PEFT adapters of an organisation or a user, sorted by name

    Raises:
        AdapterError: a source is missing, empty or cannot be looked up.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    ids = [one for source in sources for one in _ids_of(str(source), token, local_files_only)]
    return list(dict.fromkeys(ids))


def _ids_of(source: str, token: Any, local_files_only: bool, in_list: str | None = None) -> list[AdapterId]:
    if Path(source).is_dir():
        return [AdapterId(str(path)) for path in find_adapters(source)]
    for prefix, look_up in ((COLLECTION, _in_collection), (SEARCH, _in_search), (AUTHOR, _of_author)):
        if source.startswith(prefix):
            names = _looked_up(source, look_up, source.removeprefix(prefix), token, local_files_only)
            return [AdapterId(name) for name in names]
    if source.endswith(".txt") or Path(source).is_file():
        if in_list:
            raise AdapterError(f"{in_list}: names another file, {source}; a list holds adapters only.")
        return [one for line in _lines(source) for one in _ids_of(line, token, local_files_only, source)]
    return [one_id(source)]


def one_id(source: str) -> AdapterId:
    """A folder, or a repo id with its revision after an `@`. Raises `AdapterError` where nothing follows the `@`."""
    if Path(source).is_dir():
        return AdapterId(source)
    name, at, revision = source.partition("@")  # a repo id has no @, a revision may
    if at and not revision:
        raise AdapterError(f"{source}: no revision after the @.")
    return AdapterId(name, revision or None)


def _lines(path: str) -> list[str]:
    if not path.endswith(".txt"):
        raise AdapterError(f"{path}: is a file; name an adapter's folder, or a .txt file with one id in each line.")
    try:
        text = read_text(Path(path))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: no readable list of adapters ({error}).") from error
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    if not any(lines):
        raise AdapterError(f"{path}: names no adapters; one id in each line is expected.")
    return [line for line in lines if line]


def _looked_up(
    source: str, look_up: Callable[[str, Any], list[str]], what: str, token: Any, local_files_only: bool
) -> list[str]:
    if local_files_only or is_offline_mode():
        raise AdapterError(f"{source}: only the Hub can tell. Offline, name the adapters themselves.")
    try:
        names = look_up(what, token)
    except (HTTPError, OSError, ValueError) as error:
        raise AdapterError(f"{source}: {explain(error)}") from error
    if not names:
        raise AdapterError(f"{source}: no models there (those of a private repo need a token).")
    return names


def _in_collection(slug: str, token: Any) -> list[str]:
    collection = repeated(lambda: HfApi().get_collection(slug, token=token))
    return [item.item_id for item in collection.items if item.item_type == "model"]


def _in_search(tags: str, token: Any) -> list[str]:
    wanted = [tag.strip() for tag in tags.split(",") if tag.strip()]
    if not wanted:
        raise ValueError("no tags to search for")
    return sorted(model.id for model in HfApi().list_models(filter=wanted, token=token))


def _of_author(name: str, token: Any) -> list[str]:
    if not name:
        raise ValueError("no name of an organisation or a user")
    return sorted(model.id for model in HfApi().list_models(author=name, filter="peft", token=token))
