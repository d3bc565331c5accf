"""The page over plain HTTP, as programs and other sites reach it: what it serves, to whom, and whose answers come."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from lora_recycle.app.models import MODELS_KEPT, ServedModels, folder_stamp
from lora_recycle.app.session import MAX_IMAGES, FewShotSession
from lora_recycle.hub.embedded import meta_lora_path
from lora_recycle.runtime import untrusted


httpx = pytest.importorskip("httpx", reason="the extra [app] is not installed")
page = pytest.importorskip("lora_recycle.app.page", reason="the extra [app] is not installed", exc_type=ValueError)

from lora_recycle.app import guard, uploads  # noqa: E402 - Starlette comes with the extra


VISITORS = 25
META = {"_type": "gradio.FileData"}


class Visitor:
    """A client of the page that sends what it likes."""

    def __init__(self, served, name="v"):
        self.name, self.inputs = name, {fn.name: len(fn.inputs) for fn in served.page.fns.values()}
        self.number = {fn.name: number for number, fn in reversed(served.page.fns.items())}
        self.client = httpx.Client(base_url=served.url, timeout=120)

    def upload(self, path):
        with open(path, "rb") as file:
            (place,) = self.client.post("/gradio_api/upload", files={"files": file}).raise_for_status().json()
        return place

    def event(self, queries, classes, function="classify"):
        """The body of a click: queries and the images of classes, by name, in Gradio's own form."""
        slots = self.inputs["classify"] // 2 - 1
        empty = slots - len(classes)
        images = [*classes.values(), *[None] * empty]
        data = [None, *classes, *[""] * empty, *images]
        return {
            "data": [queries, *data] if function == "classify" else data,
            "fn_index": self.number[function],
            "session_hash": self.name,
        }

    def join(self, event, **options):
        return self.client.post("/gradio_api/queue/join", json=event, **options)

    def result(self):
        """What the page sends when the event is over."""
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.name}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed":
                    return message["output"]


def image(path, **more):
    return {"image": {"path": path, **more}, "caption": None}


@pytest.fixture(scope="module")
def visitor(served):
    return Visitor(served)


@pytest.fixture(scope="module")
def dropped(visitor, pictures):
    """Uploads of two pictures of each colour, in the form of an event."""
    return {name: [image(visitor.upload(path), meta=META) for path in paths[:2]] for name, paths in pictures.items()}


# files of the server


@pytest.fixture
def passport(tmp_path, pictures):
    path = tmp_path / "passport.png"
    shutil.copy(pictures["red"][0], path)
    return str(path)


FORMS = {
    "absolute": "{}",
    "upwards": "../../../../../../../..{}",
    "through the uploads": "UPLOADS/../../../../..{}",
    "file URL": "file://{}",
    "web": "http://127.0.0.1:9{}",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("meta", [{}, {"meta": META}, {"meta": META, "is_stream": True}], ids=["bare", "meta", "full"])
@pytest.mark.parametrize("where", ["queries", "classes"])
def test_an_event_reads_no_file_of_the_server(visitor, dropped, passport, form, meta, where):
    answers = set()
    for path in (passport, passport.replace("passport", "nothing")):  # there or not is the same
        path = form.format(path).replace("UPLOADS", str(uploads.upload_folder()))
        stolen = [image(path, **meta)]
        classes = {"a": dropped["red"], "b": dropped["blue"]}
        event = visitor.event(stolen, classes) if where == "queries" else visitor.event(None, {**classes, "c": stolen})
        answer = visitor.join(event)
        assert answer.status_code == 403
        answers.add(answer.text)
    assert len(answers) == 1


def test_a_link_among_the_uploads_leads_nowhere(visitor, dropped, passport):
    link = uploads.upload_folder() / "link.png"
    link.symlink_to(passport)
    try:
        assert visitor.join(visitor.event([image(str(link))], {})).status_code == 403
        assert visitor.client.get(f"/gradio_api/file={link}").status_code == 404
    finally:
        link.unlink()


def test_handlers_check_again_and_say_the_same_of_what_is_there_and_what_is_not(passport):
    told = set()
    for path in (passport, "/nowhere/passport.png", "passport.png", f"file://{passport}"):
        with pytest.raises(page.DataError) as error:
            page._paths([(path, None)])
        told.add(str(error.value))
    assert told == {"An image was not uploaded to this page. Drop it again."}


def test_an_upload_that_is_no_image_is_called_by_its_name_alone(visitor, dropped, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = visitor.upload(tmp_path / "broken.png")
    event = visitor.event([image(broken, meta=META)], {"a": dropped["red"], "b": dropped["blue"]})
    assert visitor.join(event).status_code == 200
    told = visitor.result()["error"]
    assert told.startswith("broken.png: not a readable image") and str(uploads.upload_folder()) not in told


@pytest.mark.parametrize("path", ["/etc/passwd", "http://127.0.0.1:9/x", "/etc/nothing", "UPLOADS/../../etc/passwd"])
def test_no_file_is_served_but_uploads(visitor, dropped, path):
    path = path.replace("UPLOADS", str(uploads.upload_folder()))
    answer = visitor.client.get(f"/gradio_api/file={path}")
    assert (answer.status_code, answer.text) == (404, "Not found.")
    own = dropped["red"][0]["image"]["path"]
    assert visitor.client.get(f"/gradio_api/file={own}").content.startswith(b"\x89PNG")


def test_the_upload_folder_is_this_users_alone(served):
    folder = uploads.upload_folder()
    assert folder.stat().st_mode & 0o077 == 0 and served.page.app.uploaded_file_dir == str(folder)


# another's answers


def test_each_visitor_gets_the_own_classes(served, visitor, dropped):
    def visit(number):
        one = Visitor(served, f"visitor{number}")
        classes = {f"red{number}": dropped["red"], f"blue{number}": dropped["blue"]}
        one.join(one.event([dropped["red"][0]], classes)).raise_for_status()
        return one.result()["data"][0]

    with ThreadPoolExecutor(VISITORS) as threads:
        answers = list(threads.map(visit, range(VISITORS)))
    for number, answer in enumerate(answers):
        names = {f"{colour}{n}" for colour in ("red", "blue") for n in range(VISITORS) if f">{colour}{n}<" in answer}
        assert names == {f"red{number}", f"blue{number}"}


def test_the_model_serves_one_thread_at_a_time_whatever_calls_it(pictures):
    """The same without the queue, which a change of Gradio could open."""
    models = ServedModels()

    def visit(number):
        with models.use("demo") as model:
            session = FewShotSession(model)
            for colour in ("red", "blue"):
                session.add_class(f"{colour}{number}", pictures[colour][:2])
            (answer,) = session.classify(pictures["red"][3:4])
            return answer.probabilities

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(visit, range(16)))
    assert [list(answer) for answer in answers] == [[f"red{n}", f"blue{n}"] for n in range(16)]
    with models.use("demo") as model:
        assert model.label_names == []  # nobody's task stays on the model


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
    import asyncio

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
    import socket

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


# models


def test_a_model_whose_folder_changed_is_loaded_again(tmp_path):
    folder, models = tmp_path / "meta", ServedModels()
    shutil.copytree(meta_lora_path(), folder)
    with models.use(str(folder)) as first:
        assert first.settings["temperature"] != 0.7
    with models.use(str(folder)) as again:
        assert again is first
    sidecar = folder / "meta_lora_config.json"
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "temperature": 0.7}))
    with models.use(str(folder)) as changed:
        assert changed.settings["temperature"] == 0.7
    with models.use(str(folder)) as again:
        assert again is changed


def test_a_folder_that_was_replaced_by_files_of_the_same_age_and_size_is_seen(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
        os.utime(tmp_path / name / "x", ns=(0, 0))
    before = folder_stamp(tmp_path / "a")
    assert folder_stamp(tmp_path / "a") == before != folder_stamp(tmp_path / "b")
    assert folder_stamp(tmp_path / "none") == ()


def test_few_models_stay_in_memory(tmp_path, monkeypatch):
    loaded = []
    fake = SimpleNamespace(from_pretrained=lambda repo, **options: loaded.append(repo) or object())
    monkeypatch.setattr("lora_recycle.app.models.MetaLoRAForFewShotClassification", fake)
    models = ServedModels()
    for name in ("o/a", "o/b", "o/a", "o/c", "o/a", "o/b"):
        with models.use(name):
            pass
    assert loaded == ["o/a", "o/b", "o/c", "o/b"]


def test_use_is_exclusive(monkeypatch):
    monkeypatch.setattr("lora_recycle.app.models.ServedModels._current", lambda self, name: name)
    models, entered = ServedModels(), threading.Event()
    with models.use("a"):
        thread = threading.Thread(target=lambda: models.use("b").__enter__() and entered.set())
        thread.start()
        assert not entered.wait(0.2)
    thread.join()
    assert entered.is_set()


# folders of the server


@pytest.mark.parametrize(("host", "folders"), [("127.0.0.1", True), ("localhost", True), ("::1", True)])
def test_folders_may_be_named_where_only_this_machine_reaches_the_page(host, folders):
    assert page._is_this_machine(host) is folders


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.9", "vision.example.org"])
def test_others_may_not_name_folders(host):
    assert not page._is_this_machine(host)


def test_a_page_for_others_tells_nothing_of_folders(tmp_path, monkeypatch):
    (tmp_path / "org" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    choose, told = page._choose(ServedModels(), folders=False), set()
    for name in ("org/there", "org/nowhere"):
        with pytest.raises(page.gr.Error) as error:
            choose(name)
        told.add(error.value.message.replace(name, "X"))
    assert len(told) == 1 and "no meta-LoRA that this page can load" in told.pop()
    for name in (str(tmp_path), "there", "../x/y", "~/x", "org/there/deep"):
        with pytest.raises(page.gr.Error, match="Name a repo of the Hub"):
            choose(name)
    described = page._about(str(tmp_path / "private" / "meta"), _model("/home/me/base"), folders=False)
    assert "`meta` on `base`" in described and str(tmp_path) not in described


def _model(base):
    backbone = SimpleNamespace(name=base, image_size=64, patch_size=8, layers=[0])
    return SimpleNamespace(backbone=backbone, head=SimpleNamespace(name="class_centres"))


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
        f"| JSON, sidecar or card of a repo | {untrusted.MAX_TEXT_BYTES // mebibyte} MiB |",
        f"| one tensor as float32 | {untrusted.MAX_TENSOR_BYTES // 1024**3} GiB |",
        f"| one file of a repo | {untrusted.MAX_FILE_BYTES // 1024**3} GiB |",
        f"| ranks and other sizes in an adapter's settings | {untrusted.MAX_SIZE_SETTING:,} |",
    ):
        assert line in text
