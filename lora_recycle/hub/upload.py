"""Files to a repo of the Hub in one commit: all of them arrive, or none."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..errors import PushError


# absolute paths of any system, and what is relative to a home or to the current folder
_LOCAL_PATH = re.compile(r"[/\\]|~[\w.-]*[/\\]|\.{1,2}([/\\]|$)|[A-Za-z]:[/\\]|file:")
_CLASS_NAMES = ("labels", "label_names")


def push_files(
    repo_id: str,
    files: dict[str, Path | bytes],
    *,
    repo_type: str = "model",
    replaces: Sequence[str] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with lora-recycle",
    create_pr: bool = False,
) -> str:
    """Commit `files` to a repo, which is made if it is new, and return the URL.

    Pushing the same files again makes no commit. After a failure a repo or branch that was made for this push is
    removed again.

    Args:
        files (`dict[str, Path | bytes]`): path in the repo to a local file or its content.
        replaces (`Sequence[str]`): patterns of what earlier pushes wrote; files like them that are not in `files` are
            deleted in the same commit.
        private (`bool`, *optional*): for a new repo. True for one that is public already is an error.
        revision (`str`, *optional*): branch, made from main if it is new.
        create_pr (`bool`, *optional*, defaults to `False`): open a pull request; its URL is returned.

    Raises:
        PushError: the Hub or the connection refused, the repo is public though `private`, or has a `config.json`.
    """
    api = HfApi(token=token)
    repo: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type}
    where = f"{repo_id}@{revision}" if revision else repo_id
    try:
        with contextlib.ExitStack() as undo:
            head = _prepare(api, repo, private, None if create_pr else revision, undo)
            present = api.list_repo_files(**repo, revision=head)
            if repo_type == "model" and "config.json" in present:
                raise PushError(
                    f"{where}: holds config.json, so it is a model of its own, and transformers would ignore an "
                    "adapter in it. Push to another repo."
                )
            info = api.create_commit(
                **repo,
                operations=_operations(files, present, replaces),
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head,  # what was looked at is what is changed
            )
            undo.pop_all()
    except PushError:
        raise
    except Exception as error:  # the client raises a dozen types, all meaning that it did not work
        raise PushError(
            f"{where}: the push failed: {_reason(error)} The repo holds all of it or nothing; run it again."
        ) from error
    if create_pr and info.pr_url:
        return info.pr_url
    return str(info.repo_url) + (f"/tree/{revision}" if revision else "")


def without_local_paths(value: Any) -> Any:
    """A JSON value in which paths of this machine are cut to their last part. Names of classes stay as they are."""
    if isinstance(value, dict):
        return {k: inner if k in _CLASS_NAMES else without_local_paths(inner) for k, inner in value.items()}
    if isinstance(value, list):
        return [without_local_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    local = _LOCAL_PATH.match(value) or (re.search(r"[/\\]", value) and os.path.exists(value))
    return re.split(r"[/\\]+", value.rstrip("/\\"))[-1] if local else value


def _operations(
    files: dict[str, Path | bytes], present: Sequence[str], replaces: Sequence[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    gone = [f for f in present if f not in files and any(fnmatch(f, pattern) for pattern in replaces)]
    added = [CommitOperationAdd(path, data) for path, data in files.items()]
    return [*added, *(CommitOperationDelete(path) for path in gone)]


def _prepare(
    api: HfApi, repo: dict[str, Any], private: bool | None, branch: str | None, undo: contextlib.ExitStack
) -> str | None:
    """Make the repo and the branch where they are not there yet; the commit to build on."""
    try:
        info = api.repo_info(**repo)
    except RepositoryNotFoundError:
        api.create_repo(**repo, private=private)
        info = api.repo_info(**repo)
        undo.callback(_remove, api, repo, None, info.sha, api.delete_repo)
    if private and not info.private:
        raise PushError(f"{repo['repo_id']}: is public already. Make it private first, or push without `private`.")
    if branch is None:
        return info.sha
    try:
        return api.repo_info(**repo, revision=branch).sha
    except RevisionNotFoundError:
        api.create_branch(**repo, branch=branch)
        undo.callback(_remove, api, repo, branch, info.sha, lambda **repo: api.delete_branch(**repo, branch=branch))
        return info.sha


def _remove(api: HfApi, repo: dict[str, Any], branch: str | None, head: str | None, remove: Callable) -> None:
    """Take back what this push made, unless something was committed to it: the answer alone may have been lost."""
    with contextlib.suppress(Exception):  # the error that led here is the one to report
        if api.repo_info(**repo, revision=branch).sha == head:
            remove(**repo)


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = re.sub(r"For more information check: \S+", "", str(error).strip()) or type(error).__name__
    text = " ".join(text.split()).rstrip(".")
    hint = " Log in with `hf auth login`, or pass a token that may write there." if status in (401, 403) else ""
    return f"{text}.{hint}"
