"""What stands before the page: which host, which site, which address and how many bytes, before Gradio reads any."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..runtime.untrusted import parse_json
from .uploads import is_upload, only_uploads


MAX_JSON_BYTES = 2 * 1024**2
MAX_UPLOAD_BYTES = 1024**3  # of one drop, which may hold many images

#: All that the page in the browser asks for. No route that runs a function at once, none that fetches for others.
_GET = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|pwa_icon)/?|/(assets|static)/.+"
    r"|/gradio_api/(info|theme\.css|startup-events|queue/data|upload_progress|app_id|heartbeat/\w+)/?"
)
_FILE = "/gradio_api/file="
_EVENT, _UPLOAD = "/gradio_api/queue/join", "/gradio_api/upload"


class Refusal(NamedTuple):
    """Why a request goes no further."""

    status: int
    reason: str


class Guard:
    """ASGI middleware that answers what the page does not serve.

    Args:
        app: what is guarded.
        hosts: names under which the page is served, with the port where browsers show one, beside `localhost` and
            addresses in numbers.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str] = ()):
        self.app = app
        self._sites = frozenset(host.lower() for host in hosts if not _is_own(_hostname(host)))
        self._names = frozenset(map(_hostname, self._sites))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            headers = Headers(scope=scope)
            refusal = self._site(headers) or _address(scope["method"], scope["path"], headers)
            if refusal is None and scope["path"] == _EVENT:
                body = await _body(receive)
                refusal, receive = _event(body), _replay(body, receive)
            answer = self.app if refusal is None else PlainTextResponse(refusal.reason, refusal.status)
            await answer(scope, receive, send)
        else:  # the page opens no web socket
            await send({"type": "websocket.close", "code": 1008})

    def _site(self, headers: Headers) -> Refusal | None:
        """Another name for this machine, or another site's page in the visitor's browser.

        A name that a stranger owns can be pointed here after their page has loaded (DNS rebinding); an address in
        numbers cannot. Browsers name the site that posts as `Origin`, and no script can change it.
        """
        hosts = [host.lower() for host in headers.getlist("host")]
        name = _hostname(hosts[0]) if len(hosts) == 1 else ""
        if not name or not (_is_own(name) or name in self._names):
            return Refusal(403, "The page is not served under this name. Start it with --allow-host NAME.")
        sites = {origin.lower().partition("://")[2] for origin in headers.getlist("origin")}
        return None if sites <= {*hosts, *self._sites} else Refusal(403, "Other sites may not use the page.")


def _hostname(netloc: str) -> str:
    """The host of `host:port`, in lower case; empty where that is not its form."""
    try:
        parts = urlsplit(f"//{netloc}")
        plain = parts.netloc == netloc and parts.username is None and (parts.port is None or parts.port > 0)
        return (parts.hostname or "") if plain else ""
    except ValueError:
        return ""


def _is_own(name: str) -> bool:
    """Whether no stranger can lead this name here: none at all, `localhost`, or an address in numbers."""
    if name in ("", "localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _address(method: str, path: str, headers: Headers) -> Refusal | None:
    """A route that the page does not need, or a body that is longer than its route takes."""
    if method in ("GET", "HEAD"):
        served = is_upload(path.removeprefix(_FILE)) if path.startswith(_FILE) else _GET.fullmatch(path)
        return None if served else Refusal(404, "Not found.")
    most = {_EVENT: MAX_JSON_BYTES, _UPLOAD: MAX_UPLOAD_BYTES}.get(path)
    if method != "POST" or most is None:
        return Refusal(404, "Not found.")
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or not re.fullmatch("[0-9]{1,15}", length):
        return Refusal(411, "State the length of the body.")  # the server then reads no byte beyond it
    return Refusal(413, f"The body is longer than {most} bytes.") if int(length) > most else None


def _event(body: bytes) -> Refusal | None:
    """JSON that Gradio would read otherwise than it is checked here, or that names a file which nobody uploaded."""
    try:
        event = parse_json(body)
    except ValueError:
        return Refusal(400, "The body is not JSON.")
    return None if only_uploads(event) else Refusal(403, "An event may name uploaded files only.")


async def _body(receive: Receive) -> bytes:
    """All of a body whose length was checked."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, and after it what comes next."""
    first: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return first.pop() if first else await receive()

    return replayed
