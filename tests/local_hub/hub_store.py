"""Repos of the local Hub: files, commits that are all kept, branches, tags, pull requests."""

import hashlib
import json
import re
from dataclasses import dataclass, field


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pkl", ".npy", ".npz", ".onnx", ".parquet", ".arrow", ".zip", ".png")
LFS_BYTES = 10_000_000
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class HubError(Exception):
    """An answer that refuses: HTTP status, `X-Error-Code` (or None) and `X-Error-Message`."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str):
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


def is_lfs(path: str, sample: bytes, size: int) -> bool:
    """Whether the Hub wants a file through LFS: by suffix, size, or a zero byte at the start. Never an empty one."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_BYTES or b"\0" in sample[:512])


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class File:
    """Content of one file; what git itself holds of an LFS file is a pointer to it."""

    data: bytes
    lfs: bool
    sha256: str
    oid: str

    @classmethod
    def of(cls, data: bytes, lfs: bool) -> "File":
        sha256 = hashlib.sha256(data).hexdigest()
        return cls(data, lfs, sha256, git_oid(_pointer(sha256, len(data)) if lfs else data))

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def lfs_info(self, key: str) -> dict:
        """`{"lfs": ...}` with the hash under `key`, which the Hub names differently here and there; empty if plain."""
        size = len(self.data)
        pointer = {key: self.sha256, "size": size, "pointerSize": len(_pointer(self.sha256, size))}
        return {"lfs": pointer} if self.lfs else {}


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, File] = field(repr=False)


class Repo:
    """One repo. `refs` maps `refs/heads/<branch>`, `refs/tags/<tag>` and `refs/pr/<n>` to SHAs."""

    def __init__(self, kind: str, repo_id: str, author: str, date: str):
        self.kind, self.id = kind, repo_id
        self.private, self.gated = False, False
        #: path -> size that listings state instead of the true one
        self.claimed_sizes: dict[str, int] = {}
        self.created = date
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.lfs: dict[str, bytes] = {}
        self.commit({".gitattributes": File.of(ATTRIBUTES, False)}, "initial commit", author, date)

    @property
    def prefix(self) -> str:
        """What stands before the id in URLs that are not of the API."""
        return "" if self.kind == "models" else f"{self.kind}/"

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request or (short) SHA; `HubError` RevisionNotFound."""
        sha = self.refs.get(self.ref(revision) or "")
        if sha is None and re.fullmatch("[0-9a-f]{7,40}", revision):
            sha = next((known for known in self.commits if known.startswith(revision)), None)
        if sha is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[sha]

    def commit(
        self,
        changes: dict[str, File | None],
        title: str,
        author: str,
        date: str,
        ref: str = "refs/heads/main",
        message: str = "",
    ) -> Commit:
        """Move `ref` to a new commit that sets or (None) removes files."""
        parent = self.refs.get(ref)
        files = dict(self.commits[parent].files) if parent else {}
        for path, file in changes.items():
            if file is None:
                files.pop(path, None)
            else:
                files[path] = file
        tree = {path: file.oid for path, file in sorted(files.items())}
        told = json.dumps([self.kind, self.id, parent, tree, title, message, author, date])
        sha = hashlib.sha1(told.encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, message, author, date, files)
        self.refs[ref] = sha
        return self.commits[sha]

    def history(self, commit: Commit | None) -> list[Commit]:
        """A commit and its ancestors, newest first."""
        commits = []
        while commit is not None:
            commits.append(commit)
            commit = self.commits.get(commit.parent or "")
        return commits

    def last_change(self, path: str, commit: Commit) -> Commit:
        """The newest commit that changed a file, or anything in a folder."""

        def content(one: Commit) -> dict[str, str]:
            return {name: file.oid for name, file in one.files.items() if f"{name}/".startswith(f"{path}/")}

        commits = self.history(commit)
        older = zip(commits, commits[1:], strict=False)
        return next((new for new, old in older if content(new) != content(old)), commits[-1])
