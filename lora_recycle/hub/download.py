"""Files of one commit of a Hub repo, with the bytes that the Hub states. Nothing here is ever executed.

What the client does itself, and what is therefore not here: it caches, locks the cache between threads and processes,
resumes downloads, compares their sizes, and tries some requests again where the Hub is busy. It repeats neither the
request that resolves a revision nor a download that was answered with 503, and does not look at checksums.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from huggingface_hub import (
    HfApi,
    RepoFile,
    RepoFolder,
    get_cached_repo_tree,
    get_session,
    hf_hub_download,
    is_offline_mode,
    snapshot_download,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from tqdm.auto import tqdm

from ..errors import AdapterError
from ..runtime.files import file_sha256


#: Seconds between the attempts of a request that the client does not repeat.
WAITS = (1, 2, 4)
#: Most seconds that the Hub may ask for before the next attempt. It counts requests over five minutes.
MAX_WAIT = 300
_TRANSIENT = (408, 429, 500, 502, 503, 504)

Answer = TypeVar("Answer")


class HubOptions(TypedDict, total=False):
    """How files are fetched: what `from_pretrained` takes of the Hub's client, handed on as it is."""

    token: Any  # a string, True for the stored one, False for none
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool


def fetch(
    repo: str,
    files: Mapping[str, int],
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    *,
    repo_type: str = "model",
    progress: bool = False,
) -> Path:
    """Folder in the Hub's cache that is named after a commit and holds those of `files` that the commit has.

    The revision is resolved once, so that all files are of one commit. What the Hub says of their sizes is looked at
    before the first byte is fetched. They come side by side; each is compared with the checksum that the Hub states,
    and one that differs is fetched once more.

    Args:
        files (`Mapping[str, int]`): file name or pattern (`shards/*.safetensors`) to the most bytes of such a file.
        force_download (`bool`, *optional*, defaults to `False`): fetch again what the cache holds.
        repo_type (`str`, *optional*, defaults to `"model"`): or `"dataset"`.
        progress (`bool`, *optional*, defaults to `False`): whether the client shows its bars.

    Raises:
        AdapterError: with what to do, where the repo, the revision, the permission or the connection is missing,
            where a file is too large, or where the bytes stay wrong.
    """
    where = f"{repo}@{revision}" if revision else repo
    options: dict[str, Any] = {
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "repo_type": repo_type,
    }
    commit = resolve_commit(repo, revision, **options)
    options |= {} if progress else {"tqdm_class": _NoBar}
    options |= {"force_download": True} if force_download else {}
    try:
        folder = repeated(lambda: _download(repo, commit, files, options))
        present = [p.relative_to(folder).as_posix() for pattern in files for p in folder.glob(pattern) if p.is_file()]
        asked = None if local_files_only or is_offline_mode() else HfApi(token=token)
        wrong = _remove_damaged(folder, repo, repo_type, present, asked)
        if wrong and asked:
            for name in wrong:
                repeated(partial(hf_hub_download, repo, name, revision=folder.name, **options))
            wrong = _remove_damaged(folder, repo, repo_type, wrong, asked)
    except AdapterError:
        raise
    except (HTTPError, OSError, ValueError) as error:
        raise AdapterError(f"{where}: {explain(error, local_files_only)}") from error
    if wrong:
        raise AdapterError(
            f"{where}: {', '.join(wrong)} of commit {folder.name} has not the checksum that the Hub states"
            f"{', even when fetched again' if asked else ''}. It was removed from the cache; pull it again later."
        )
    return folder


def list_files(
    repo: str,
    commit: str,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> list[str]:
    """Paths of all files of a commit that was fetched before; what of it is cached where the Hub may not be asked.

    `force_download` changes nothing: what lies in a commit never changes.

    Raises:
        AdapterError: the Hub does not answer.
    """
    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    try:
        return sorted(repeated(lambda: _listing(repo, commit, repo_type="model", **options)))
    except (HTTPError, OSError, ValueError) as error:
        raise AdapterError(f"{repo}@{commit}: {explain(error, local_files_only)}") from error


def resolve_commit(
    repo: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    repo_type: str = "model",
) -> str:
    """The commit that a branch, tag or pull request (by default the main branch) leads to now, or, without a
    connection, when it was last looked up. Raises `AdapterError` with what to do where there is none."""
    options: dict[str, Any] = {
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "repo_type": repo_type,
    }
    try:
        return repeated(lambda: HfApi().resolve_revision(repo, revision=revision, **options)).resolved
    except (HTTPError, RevisionResolutionError, OSError, ValueError) as error:  # ValueError: no id, or no JSON
        where = f"{repo}@{revision}" if revision else repo
        raise AdapterError(f"{where}: {explain(error, local_files_only)}") from error


def repeated(request: Callable[[], Answer]) -> Answer:
    """The answer to a request that the client makes only once: tried again where the Hub is busy or unreachable."""
    _limit_waits()
    for wait in WAITS:
        try:
            return request()
        except (HTTPError, RevisionResolutionError) as error:
            cause = error.__cause__ if isinstance(error, RevisionResolutionError) else error
            if not isinstance(cause, HTTPError):
                raise  # offline by choice
            seconds = wait
            if isinstance(cause, HfHubHTTPError):
                if cause.response.status_code not in _TRANSIENT:
                    raise
                header = cause.response.headers.get("Retry-After", "")
                seconds = int(header) if header.isdecimal() else wait  # at most MAX_WAIT, or it would not be there
        time.sleep(seconds)
    return request()


def _limit_waits() -> None:
    """See to it that neither the client nor this module sleeps for as long as a server likes."""
    session = get_session()
    hooks = session.event_hooks
    if _drop_long_waits not in hooks.get("response", ()):
        session.event_hooks = {**hooks, "response": [*hooks.get("response", ()), _drop_long_waits]}


def _drop_long_waits(response: Any) -> None:
    """Take out headers that ask to wait for more than `MAX_WAIT` seconds: the usual few attempts are made instead."""
    for name, pattern in (("Retry-After", r"\s*(\d+)\s*"), ("RateLimit", r".*\bt\s*=\s*(\d+).*")):
        found = re.fullmatch(pattern, response.headers.get(name, ""))
        if found and (len(found[1]) > 9 or int(found[1]) > MAX_WAIT):
            del response.headers[name]


def explain(error: BaseException, local_files_only: bool = False) -> str:
    """What an error of the client means to the user, in one line, and what to do about it."""
    if isinstance(error, GatedRepoError):
        return "gated; accept its terms on the Hub and pass a token of that account (`hf auth login`)."
    if isinstance(error, RevisionNotFoundError):
        return "the repo has no such revision."
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return "no such folder or repo (a private repo needs a token, `hf auth login`)."
    if isinstance(error, (LocalEntryNotFoundError, RevisionResolutionError)):
        half = isinstance(error, IncompleteSnapshotError)
        lacking = "only a part of it is in the local cache" if half else "no such folder or repo in the local cache"
        if local_files_only or is_offline_mode():
            return f"{lacking}; pull it once without {'local_files_only' if local_files_only else 'HF_HUB_OFFLINE'}."
        return f"{lacking}, and the Hub cannot be reached ({_reason(error.__cause__ or error)}). Check the connection."
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return f"the Hub does not accept the token ({_reason(error)}); log in again with `hf auth login`."
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answers {_reason(error)}."
    return f"the download failed ({_reason(error)}). Try again."


def _reason(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"{error.response.status_code} {error.server_message or error.response.reason_phrase}".strip()
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _download(repo: str, commit: str, files: Mapping[str, int], options: dict[str, Any]) -> Path:
    """The commit's folder in the cache, with what it lacked; where the Hub is down, what the cache has."""
    snapshot: dict[str, Any] = {"repo_id": repo, "revision": commit, "allow_patterns": list(files)}
    try:
        sizes = _listing(repo, commit, **options)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except HTTPError as error:  # without their sizes no files are fetched
        try:
            return Path(snapshot_download(**snapshot, **options | {"local_files_only": True}))
        except LocalEntryNotFoundError:
            raise error from None
    _check_listing(sizes, files, f"{repo}@{commit}")
    return Path(snapshot_download(**snapshot, **options))


def _listing(
    repo: str, commit: str, *, repo_type: str, token: Any, cache_dir: Any, local_files_only: bool, **_: Any
) -> dict[str, int]:
    """Size of each file of a commit, as the Hub states it; empty where it may not be asked.

    The client keeps the listing of a commit that it has downloaded, so that what is cached costs no request.
    """
    where: dict[str, Any] = {"repo_id": repo, "repo_type": repo_type, "revision": commit}
    entries: Iterable[RepoFile | RepoFolder]
    try:
        entries = get_cached_repo_tree(**where, cache_dir=cache_dir)
    except CachedRepoTreeNotFoundError:
        if local_files_only or is_offline_mode():
            return {}
        entries = HfApi(token=token).list_repo_tree(**where, recursive=True)
    return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}


def _check_listing(sizes: dict[str, int], files: Mapping[str, int], where: str) -> None:
    """Raises `AdapterError` for a file to be fetched that is too large, or whose name leads out of the repo."""
    for name, size in sizes.items():
        limits = [most for pattern, most in files.items() if fnmatch(name, pattern)]
        if limits and (".." in name.split("/") or name.startswith("/")):
            raise AdapterError(f"{where}: {name!r} leads out of the repo; nothing was downloaded.")
        if limits and size > max(limits):
            raise AdapterError(f"{where}: {name} has {size} bytes, more than {max(limits)}; nothing was downloaded.")


def _remove_damaged(folder: Path, repo: str, repo_type: str, files: Sequence[str], hub: HfApi | None) -> list[str]:
    """Remove those of `files` whose bytes have another checksum than the Hub states, so that no program uses them."""
    stated = _stated_checksums(folder, repo, repo_type, files, hub)
    wrong = [name for name, digits in stated.items() if digits != _checksum(folder / name, len(digits))]
    for path in (folder / name for name in wrong):
        while path.is_symlink():
            link, path = path, path.parent / os.readlink(path)
            link.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    return wrong


def _stated_checksums(
    folder: Path, repo: str, repo_type: str, names: Sequence[str], hub: HfApi | None
) -> dict[str, str]:
    """File to SHA-256 (of LFS files) or git's SHA-1, as the Hub stated it: a blob of the cache is named after it.

    A cache without links (on Windows, say) does not tell, so that the Hub is asked, if it may be.
    """
    stated = {name: Path(os.readlink(folder / name)).name for name in names if (folder / name).is_symlink()}
    unknown = [name for name in names if name not in stated]
    if unknown and hub:
        for info in hub.get_paths_info(repo, unknown, revision=folder.name, repo_type=repo_type):
            if isinstance(info, RepoFile):
                stated[info.path] = info.lfs.sha256 if info.lfs else info.blob_id
    # a mirror may use other tags than checksums
    return {name: digits for name, digits in stated.items() if re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", digits)}


def _checksum(path: Path, digits: int) -> str:
    """SHA-256 (64 digits), or SHA-1 as git makes it of a file (40)."""
    if digits == 64:
        return file_sha256(path)
    with path.open("rb") as file:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _NoBar(tqdm):
    """Bars of many downloads side by side would write over each other; the caller shows one for all."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **(options | {"disable": True}))
