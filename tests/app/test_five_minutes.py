"""What the page does for a person who is new to it: it names its model, forgets a class, goes on, and clears."""

import io
from types import SimpleNamespace

import pytest
from PIL import Image


page = pytest.importorskip("lora_recycle.app.page", reason="the extra [app] is not installed", exc_type=ValueError)

from helpers_page import META, image  # noqa: E402 - httpx comes with the extra


def components(served, kind):
    return [part for part in served.page.config["components"] if part["type"] == kind]


def test_the_model_is_named_at_the_top_with_its_domains(served, demo_model):
    first = [part["props"]["value"] for part in components(served, "markdown")][:2]
    assert first[0].startswith("# Few-shot image classification") and first[1].startswith("In use: `demo` on ")
    network = SimpleNamespace(backbone=demo_model.backbone, head=demo_model.head, domains=["shared", "birds", "<b>"])
    assert page._about("demo", network, True).endswith("Its domains: `birds`, `<b>`; the examples choose.")
    network.domains = []
    assert "domains" not in page._about("demo", network, True)


def visible(update):
    return [place for place, column in enumerate(update[2:22]) if column.visible]


def test_classes_are_added_and_removed_in_any_place():
    update = page._one_more((0, 1))
    assert update[0] == (0, 1, 2) and visible(update) == [0, 1, 2]
    update = page._one_less(1, (0, 1, 2))
    assert update[0] == (0, 2) and visible(update) == [0, 2] and update[-2:] == ["", None]
    assert page._one_more((0, 2))[0] == (0, 1, 2)
    assert page._one_less(2, (0, 2))[0] == (0, 2)  # emptied, and there to be filled
    assert page._one_less(2, (0, 2))[-2:] == ["", None]
    every = page._one_more(tuple(range(19)))
    assert every[0] == tuple(range(20)) and not every[1].interactive
    assert page._one_less(7, every[0])[1].interactive


def test_every_class_has_a_button_that_removes_it(served):
    labels = [part["props"]["value"] for part in components(served, "button")]
    assert [label for label in labels if label.startswith("Remove")] == [f"Remove class {n}" for n in range(1, 21)]


def test_a_click_clears_the_old_answers_before_new_ones_or_an_error_come(served):
    dependencies = served.page.config["dependencies"]
    (answers,) = [part["id"] for part in components(served, "html") if part["props"].get("elem_id") == "answers"]
    button = next(part["id"] for part in components(served, "button") if part["props"]["value"] == "Classify")
    clicked = [one for one in dependencies if [button, "click"] in [list(target) for target in one["targets"]]]
    clears, asks = clicked
    assert clears["js"] == "() => ''" and not clears["backend_fn"] and clears["outputs"] == [answers]
    assert asks["backend_fn"] and asks["outputs"] == [answers]


def heic(path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="the extra [heic] is not installed")
    pillow_heif.from_pillow(Image.open(path)).save(file := io.BytesIO())
    return file.getvalue()


def test_broken_images_are_listed_and_the_others_answered(visitor, dropped, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    broken = image(visitor.upload(tmp_path / "holiday.jpg"), meta=META)
    classes = {"red": [*dropped["red"], broken], "blue": dropped["blue"]}
    visitor.join(visitor.event([broken, *dropped["blue"]], classes)).raise_for_status()
    (shown,) = visitor.result()["data"]
    assert "2 images left out:" in shown and shown.count("<li>holiday.jpg: not a readable image") == 2
    assert shown.count("<h3>blue</h3>") == 2 and str(tmp_path) not in shown and "/tmp" not in shown


def test_heic_is_dropped_as_any_image(visitor, dropped, pictures, tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(heic(pictures["red"][4]))
    dropped_heic = image(visitor.upload(tmp_path / "IMG_1.HEIC"), meta=META)
    visitor.join(visitor.event([dropped_heic], {"red": dropped["red"], "blue": dropped["blue"]})).raise_for_status()
    (shown,) = visitor.result()["data"]
    assert "<h3>red</h3>" in shown and "left out" not in shown
