"""What stands before the page: routes, hosts, origins, sizes, over plain HTTP; and what docs/security.md says."""

import asyncio
import json
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from lora_recycle.app.models import MODELS_KEPT
from lora_recycle.app.session import MAX_IMAGES
from lora_recycle.runtime.untrusted import MAX_SIZE_SETTING
from lora_recycle.runtime.untrusted_files import MAX_TEXT_BYTES
from lora_recycle.runtime.untrusted_tensors import MAX_FILE_BYTES, MAX_TENSOR_BYTES


page = pytest.importorskip("lora_recycle.app.page", reason="the extra [app] is not installed", exc_type=ValueError)

from helpers_page import META, image  # noqa: E402 - httpx comes with the extra

from lora_recycle.app import guard  # noqa: E402 - and so does Starlette


ROUTES = ["run/classify", "run/x", "api/classify", "call/classify", "call/v2/classify", "component_server", "reset"]
ROUTES += ["queue/join/", "process_recording", "vibe-edit", "stream/e", "cancel"]


@pytest.mark.parametrize("route", ROUTES)
def test_no_route_skips_the_queue(visitor, dropped, route):
    event = visitor.event([dropped["red"][0]], {"a": dropped["red"], "b": dropped["blue"]})
    assert visitor.client.post(f"/gradio_api/{route}", json=event).status_code == 404


ADDRESSES = ["/docs", "/openapi.json", "/gradio_api/openapi.json", "/monitoring", "/file=/etc/passwd"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_nothing_else_is_served(visitor, address):
    assert visitor.client.get(address).status_code == 404
    assert visitor.client.delete(address).status_code == 404


def test_gradio_itself_offers_no_api_either(served):
    assert served.page.api_open is False
    assert {fn.api_visibility for fn in served.page.fns.values()} == {"private"}


# other sites and names


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("evil.example:PORT", 403),
        ("127.0.0.1.evil.example", 403),
        ("127.0.0.1:9.evil.example", 403),
        ("", 403),
        ("a@localhost", 403),
    ]
    + [("localhost:PORT", 200), ("127.0.0.1:PORT", 200), ("[::1]:PORT", 200), ("192.168.0.9", 200)],
)
def test_only_names_of_the_page_are_answered(visitor, served, host, status):
    host = host.replace("PORT", str(urlsplit(served.url).port))
    assert visitor.client.get("/config", headers={"Host": host}).status_code == status


ORIGINS = [
    "https://evil.example",
    "null",
    "http://localhost:3000",
    "http://127.0.0.1",
    "http://127.0.0.1:PORT.example",
]


@pytest.mark.parametrize("origin", ORIGINS)
def test_other_sites_can_neither_post_nor_read(visitor, served, origin, dropped):
    headers = {"Origin": origin.replace("PORT", str(urlsplit(served.url).port))}
    event = visitor.event([dropped["red"][0]], {"a": dropped["red"], "b": dropped["blue"]})
    assert visitor.join(event, headers=headers).status_code == 403
    assert visitor.client.post("/gradio_api/upload", headers=headers, files={"files": b"x"}).status_code == 403
    assert visitor.client.get("/config", headers=headers).status_code == 403


def ask(method, path, headers, hosts):
    """Status of one request to a guard that stands before nothing, and whether it let it through."""
    sent, through = [], []

    async def app(scope, receive, send):
        through.append(await receive())

    async def receive():
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path}
    scope["headers"] = [(name.lower().encode(), value.encode()) for name, value in headers]
    asyncio.run(guard.Guard(app, hosts)(scope, receive, send))
    return 200 if through else sent[0]["status"]


def test_a_proxy_may_serve_it_under_names_that_were_given():
    post = ("POST", "/gradio_api/queue/join")
    length, other = ("Content-Length", "2"), ("Origin", "https://other.example.org")
    origin = ("Origin", "https://vision.example.org")
    for host in ("vision.example.org", "Vision.example.org", "10.0.0.1:7860"):
        assert ask(*post, [("Host", host), origin, length], ["vision.example.org"]) == 200
        assert ask(*post, [("Host", host), other, length], ["vision.example.org"]) == 403
        assert ask(*post, [("Host", host), origin, length], [""]) == 403
    assert ask(*post, [("Host", "localhost"), ("Host", "evil.example"), length], []) == 403
    for listening in ("127.0.0.1", "localhost"):  # what runs on another port there is another site
        assert ask(*post, [("Host", "localhost:7860"), ("Origin", f"http://{listening}"), length], [listening]) == 403


# sizes


def status_of_raw(served, head):
    """The status that the page answers to a request head alone, no body sent."""
    address = urlsplit(served.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(f"{head}\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n\r\n".encode())
        return int(connection.recv(4096).split()[1])


@pytest.mark.parametrize(
    ("route", "header", "status"),
    [
        ("queue/join", f"Content-Length: {guard.MAX_JSON_BYTES + 1}", 413),
        ("upload", f"Content-Length: {guard.MAX_UPLOAD_BYTES + 1}", 413),
        ("queue/join", "Transfer-Encoding: chunked", 411),
        ("queue/join", "X-Nothing: 0", 411),
    ],
)
def test_a_body_that_is_too_long_is_refused_before_it_is_sent(served, route, header, status):
    assert status_of_raw(served, f"POST /gradio_api/{route} HTTP/1.1\r\n{header}") == status


def test_json_up_to_the_limit_is_read_and_odd_json_is_refused(visitor, dropped):
    event = visitor.event([dropped["red"][0]], {"a": dropped["red"], "b": dropped["blue"]})
    full = json.dumps(event)
    full += " " * (guard.MAX_JSON_BYTES - len(full))
    headers = {"Content-Type": "application/json"}
    answer = visitor.client.post("/gradio_api/queue/join", content=full, headers=headers)
    assert answer.status_code == 200 and ">a<" in visitor.result()["data"][0]
    for body in ("no", '{"path": null, "path": "/etc/passwd"}', "[" * 100_000, "\xff"):
        answer = visitor.client.post("/gradio_api/queue/join", content=body.encode("latin-1"), headers=headers)
        assert (answer.status_code, answer.text) == (400, "The body is not JSON.")


def test_every_image_that_the_page_takes_fits_into_one_event(visitor):
    """The limit of JSON is above what the page itself can send."""
    long = {"path": "/" + "x" * 300, "url": "http://" + "x" * 400, "orig_name": "x" * 255, "meta": META, "size": 10**7}
    event = visitor.event([image(**long)] * 200, {f"c{n}": [image(**long)] * 10 for n in range(20)})
    assert len(json.dumps(event)) < guard.MAX_JSON_BYTES


def test_the_page_on_security_states_the_limits_as_they_are():
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    mebibyte = 1024**2
    for line in (
        f"| JSON of one event of the page | {guard.MAX_JSON_BYTES // mebibyte} MiB |",
        f"| one upload request | {guard.MAX_UPLOAD_BYTES // 1024**3} GiB |",
        f"| one uploaded file | {page.MAX_FILE_BYTES // mebibyte} MiB |",
        f"| classes of one task on the page | {page.MAX_CLASSES} |",
        f"| examples, or new images, of one click | {MAX_IMAGES} |",
        f"| visitors waiting for the model | {page.MAX_WAITING} |",
        f"| meta-LoRAs that the page keeps in memory | {MODELS_KEPT} |",
        f"| JSON, sidecar or card of a repo | {MAX_TEXT_BYTES // mebibyte} MiB |",
        f"| one tensor as float32 | {MAX_TENSOR_BYTES // 1024**3} GiB |",
        f"| one file of a repo | {MAX_FILE_BYTES // 1024**3} GiB |",
        f"| ranks and other sizes in an adapter's settings | {MAX_SIZE_SETTING:,} |",
    ):
        assert line in text
