"""The page over plain HTTP, as programs reach it: whose files it reads, and whose answers come."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from lora_recycle.app import uploads
from lora_recycle.app.models import ServedModels
from lora_recycle.app.session import FewShotSession


page = pytest.importorskip("lora_recycle.app.page", reason="the extra [app] is not installed", exc_type=ValueError)

from helpers_page import META, Visitor, image  # noqa: E402 - httpx comes with the extra


VISITORS = 25


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
    assert told.startswith("No new image can be read. The first: broken.png: not a readable image")
    assert str(uploads.upload_folder()) not in told


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
