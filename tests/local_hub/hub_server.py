"""A Hugging Face Hub on this machine, for tests with the real clients; it also misbehaves on demand. See `Hub`."""

import re
import threading
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import hub_api_write  # noqa: F401  (registers its routes)
from hub_answers import Answer, Request, error_answer, fail, json_answer
from hub_api import dispatch
from hub_faults import Faults
from hub_store import File, HubError, Repo, is_lfs


OWNER_TOKEN = "hf_owner"
READER_TOKEN = "hf_reader"


class Seen(NamedTuple):
    """A request that arrived: method, and path without quotes and query."""

    method: str
    path: str


class Hub:
    """What one test sees of the local Hub: an empty store, requests that arrived, faults to order.

    Get it with the fixture `hub`: `HF_ENDPOINT` leads to it, the client's cache is empty, `HF_TOKEN` is
    `OWNER_TOKEN` and the client's waits between retries take no time (in this process; a subprocess does wait).

    **Users.** `OWNER_TOKEN` (user "owner") may read and write everything. `READER_TOKEN` (user "reader") may
    read what is public and write below "reader/". For no token at all, pass `token=False` to the client or
    `monkeypatch.delenv("HF_TOKEN")`. Any other token is refused with 401.

    **The store**, without HTTP (`repo_type` is "model" or "dataset" everywhere):

    - `put(repo_id, files)` commits a folder (`Path`) or `{path: bytes or str or None}` (None removes), makes
      the repo (and the branch, from main) if it is new, returns the SHA. It stores any path,
      also those that the real Hub refuses.
    - `files(repo_id, revision)` gives `{path: bytes}` with all that was pushed, `.gitattributes` included.
    - `repo(repo_id)` gives the `Repo` with `commits`, `refs`, `lfs`; `exists(repo_id)` tells whether it is there.
      Its `claimed_sizes` (`{path: bytes}`) are what listings state instead of the true sizes.
    - `gate(repo_id)` and `make_private(repo_id)`: only the owner downloads, or sees, it. Others get 401 (no
      token) or 403 / 404 with `X-Error-Code` GatedRepo / RepoNotFound.
    - `page_size` (1000): items on one page of a listing. Lower it to test paging.

    **Requests.** `requests` is the list of `Seen(method, path)`, failed ones included; `count(regex)` counts.

    **Faults.** Each takes a regex that is searched in `"METHOD /path"`, for example `r"adapter_model"`,
    `r"^HEAD "` or `r"POST .*/commit/"`, and hits the next `times` requests (1 unless said; None: all):

    - `fail_next(where, status=503, retry_after=None)` answers with an error, and `Retry-After` if given.
    - `cut_download(where, after_bytes=0)` breaks the connection after that much of the answer's body. A client
      that got something resumes and starts counting retries anew, so use `after_bytes=0, times=None` for a
      download that must fail. On `POST .*/commit/` the commit is made and only its answer is lost.
    - `cut_upload(where, after_bytes=0)` breaks the connection after that much of the request's body; nothing
      of it is kept. LFS objects go to `PUT /lfs/<repo>/<sha256>`.
    - `corrupt(where)` flips a bit in the last byte of a file: size, ETag and announced hash stay right.
    - `delay(where, seconds)` waits before the answer.
    - `on_request(where, callback)` calls `callback()` before the request is looked at, for example to `put`
      a new commit between two requests.

    HEAD requests and redirects have no body, so they do not use up cuts and corruptions. An LFS file is first
    asked for with HEAD at `/<repo>/resolve/<revision>/<path>`, which redirects, and then fetched from
    `/cdn/<repo>/<sha256>/<path>`; a regex of the file name fits both.

    An endpoint that the server lacks, or an exception in it or in a callback, fails the test at its end.
    """

    def __init__(self, endpoint: str, cdn: str):
        self.endpoint, self.cdn = endpoint, cdn
        self.page_size = 1000
        self.repos: dict[tuple[str, str], Repo] = {}
        self.collections: dict[str, dict] = {}
        self.requests: list[Seen] = []
        self.problems: list[str] = []
        self.lock = threading.RLock()
        self.faults = Faults()
        self._ticks = 0

    def put(
        self,
        repo_id: str,
        files: Path | dict[str, bytes | str | None],
        *,
        repo_type: str = "model",
        revision: str = "main",
        message: str = "put",
    ) -> str:
        if isinstance(files, Path):
            found = sorted(path for path in files.rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in found}
        with self.lock:
            repo = self.repos.get((f"{repo_type}s", repo_id)) or self.new_repo(f"{repo_type}s", repo_id, "owner")
            ref = repo.ref(revision) or f"refs/heads/{revision}"
            repo.refs.setdefault(ref, repo.refs["refs/heads/main"])
            changes = {path: _stored(repo, path, data) for path, data in files.items()}
            return repo.commit(changes, message, "owner", self.tick(), ref).sha

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> dict[str, bytes]:
        commit = self.repo(repo_id, repo_type=repo_type).resolve(revision)
        return {path: file.data for path, file in commit.files.items()}

    def repo(self, repo_id: str, *, repo_type: str = "model") -> Repo:
        return self.repos[f"{repo_type}s", repo_id]

    def exists(self, repo_id: str, *, repo_type: str = "model") -> bool:
        return (f"{repo_type}s", repo_id) in self.repos

    def gate(self, repo_id: str, *, repo_type: str = "model") -> None:
        self.repo(repo_id, repo_type=repo_type).gated = "auto"

    def make_private(self, repo_id: str, *, repo_type: str = "model") -> None:
        self.repo(repo_id, repo_type=repo_type).private = True

    def count(self, where: str) -> int:
        return sum(bool(re.search(where, f"{seen.method} {seen.path}")) for seen in list(self.requests))

    def fail_next(self, where: str, status: int = 503, retry_after: int | None = None, times: int | None = 1) -> None:
        self.faults.add("fail", where, times, (status, retry_after))

    def cut_download(self, where: str, after_bytes: int = 0, times: int | None = 1) -> None:
        self.faults.add("cut download", where, times, after_bytes)

    def cut_upload(self, where: str, after_bytes: int = 0, times: int | None = 1) -> None:
        self.faults.add("cut upload", where, times, after_bytes)

    def corrupt(self, where: str, times: int | None = 1) -> None:
        self.faults.add("corrupt", where, times)

    def delay(self, where: str, seconds: float, times: int | None = 1) -> None:
        self.faults.add("delay", where, times, seconds)

    def on_request(self, where: str, callback: Callable[[], object], times: int | None = 1) -> None:
        self.faults.add("call", where, times, callback)

    # what the endpoints use

    def new_repo(self, kind: str, repo_id: str, author: str) -> Repo:
        self.repos[kind, repo_id] = Repo(kind, repo_id, author, self.tick())
        return self.repos[kind, repo_id]

    def may_write(self, user: str | None, repo_id: str) -> bool:
        return user == "owner" or (user is not None and repo_id.startswith(f"{user}/"))

    def tick(self) -> str:
        """A date one second after the last one: commits do not depend on the clock."""
        self._ticks += 1
        date = datetime(2025, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=self._ticks)
        return date.strftime("%Y-%m-%dT%H:%M:%S.000Z")

    def user_of(self, authorization: str | None) -> str | None:
        if authorization is None:
            return None
        users = {f"Bearer {OWNER_TOKEN}": "owner", f"Bearer {READER_TOKEN}": "reader"}
        if authorization not in users:
            fail(401, None, "Invalid credentials in Authorization header")
        return users[authorization]


def _stored(repo: Repo, path: str, data: bytes | str | None) -> File | None:
    if data is None:
        return None
    data = data.encode() if isinstance(data, str) else data
    file = File.of(data, is_lfs(path, data, len(data)))
    if file.lfs:
        repo.lfs[file.sha256] = data
    return file


class HubServer:
    """Serves `hub`, which may be replaced at any time, in threads of its own, on two free ports of 127.0.0.1.

    The second is the CDN: the client asks another origin than the Hub's for LFS files, without its token.
    """

    def __init__(self):
        self._sockets = [_Sockets(self), _Sockets(self)]
        self.endpoint, self._cdn = (f"http://127.0.0.1:{one.server_port}" for one in self._sockets)
        self.hub = self.new_hub()
        for one in self._sockets:
            threading.Thread(target=one.serve_forever, daemon=True).start()

    def new_hub(self) -> Hub:
        self.hub = Hub(self.endpoint, self._cdn)
        return self.hub


class _Sockets(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, owner: HubServer):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.owner = owner

    def handle_error(self, request, client_address):
        """Silence: what goes wrong in an answer is in `Hub.problems`, the rest are clients that left."""


class _Cut(Exception):
    """The connection is to be broken now."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: 40 ms each else

    def log_message(self, *args):
        pass

    def _serve(self) -> None:
        hub, url = self.server.owner.hub, urlsplit(self.path)
        line = f"{self.command} {unquote(url.path)}"
        with hub.lock:
            hub.requests.append(Seen(self.command, unquote(url.path)))
        try:
            body = self._read_body(hub.faults.take("cut upload", line))
            answer = self._answer(hub, line, url, body)
            self._send(hub, line, answer)
        except (_Cut, ConnectionError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _read_body(self, cut_after: int | None) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if cut_after is not None:
            self.rfile.read(min(cut_after, length))
            raise _Cut
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(length)
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, hub: Hub, line: str, url, body: bytes) -> Answer:
        failure = hub.faults.take("fail", line)
        if failure is not None:
            status, retry_after = failure
            headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
            return json_answer({"error": "ordered by a test"}, status, headers)
        try:
            time.sleep(hub.faults.take("delay", line) or 0)
            callback = hub.faults.take("call", line)
            if callback is not None:
                callback()
            with hub.lock:
                user = hub.user_of(self.headers.get("Authorization"))
                request = Request(self.command, url.path, parse_qs(url.query), self.headers, body, user)
                answer = dispatch(hub, request)
        except HubError as error:
            return error_answer(error)
        except Exception:
            hub.problems.append(f"{line}: {traceback.format_exc()}")
            return json_answer({"error": "the local Hub is broken"}, 501)
        if answer is None:
            hub.problems.append(f"{line}: the local Hub does not have this endpoint")
            return json_answer({"error": "no such endpoint"}, 501)
        return answer

    def _send(self, hub: Hub, line: str, answer: Answer) -> None:
        body, cut_after = answer.body, None
        if self.command != "HEAD" and body:
            if answer.is_file and hub.faults.take("corrupt", line):
                body = body[:-1] + bytes([body[-1] ^ 1])
            cut_after = hub.faults.take("cut download", line)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut_after])
        if cut_after is not None:
            raise _Cut
