"""Requests and answers of the local Hub, as its endpoints see them."""

import json
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.parse import parse_qs

from hub_store import HubError


@dataclass(frozen=True)
class Request:
    """`raw_path` is still quoted and has no query; `user` is None without a token."""

    method: str
    raw_path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    user: str | None

    def json(self) -> Any:
        return json.loads(self.body)

    def form(self) -> dict[str, list[str]]:
        return parse_qs(self.body.decode())

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass
class Answer:
    """`is_file`: the body is (a part of) a file of a repo, so that it may be corrupted."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    is_file: bool = False


def fail(status: int, code: str | None, message: str, **headers: str) -> NoReturn:
    raise HubError(status, code, message, **headers)


def json_answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    body = json.dumps(value, default=str).encode()
    return Answer(status, body, {"Content-Type": "application/json"} | (headers or {}))


def error_answer(error: HubError) -> Answer:
    headers = {"X-Error-Message": error.message} | error.headers
    headers |= {"X-Error-Code": error.code} if error.code else {}
    return json_answer({"error": error.message}, error.status, headers)


def file_answer(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    """All of a file, or the range that was asked for."""
    headers = headers | {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if not asked:
        return Answer(200, data, headers, is_file=True)
    first = int(asked[1])
    last = min(int(asked[2] or len(data)), len(data) - 1)
    if first > last:
        return Answer(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
    headers |= {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
    return Answer(206, data[first : last + 1], headers, is_file=True)
