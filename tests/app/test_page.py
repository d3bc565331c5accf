"""The page in a real browser: a task from dropped files, on a wide screen and a phone, by mouse and keyboard."""

import zipfile
from urllib.parse import urlsplit

import pytest


TIMEOUT = 60_000  # milliseconds; a patient number for a busy machine, never reached when all is well


@pytest.fixture(scope="module")
def visit(browser, served):
    """The page, open, the addresses that it asked for so far, and those that it was refused."""
    asked, refused = [], []
    context = browser.new_context(viewport={"width": 1000, "height": 900}, color_scheme="light")
    context.set_default_timeout(TIMEOUT)
    context.on("request", lambda request: asked.append(request.url))
    context.on("response", lambda response: refused.append(response.url) if response.status >= 400 else None)
    tab = context.new_page()
    tab.goto(served.url)
    tab.get_by_role("button", name="Classify").wait_for()
    yield tab, asked, refused
    context.close()


def drop(tab, label: str, files: list[str]) -> None:
    """Give files to the drop zone of this label, and wait until they are shown."""
    zone = tab.locator(".drop-zone").filter(has_text=label)
    zone.locator("input[type=file]").set_input_files(files)
    zone.locator("img").nth(len(files) - 1).wait_for()


def answers(tab, first: str) -> list[str]:
    """Click, wait until the first answer is this class, and return all classes that were found."""
    tab.get_by_role("button", name="Classify").click()
    tab.locator("#answers h3").first.filter(has_text=first).wait_for()
    return tab.locator("#answers h3").all_inner_texts()


def test_from_dropped_files_to_a_saved_task(visit, pictures, tmp_path):
    tab, *_ = visit
    tab.get_by_role("button", name="Classify").click()
    tab.get_by_text("Add new images to classify first").wait_for()
    drop(tab, "Images of class 1", pictures["red"][1:])
    drop(tab, "Images of class 2", pictures["blue"][:2])
    tab.get_by_label("Name of class 1").fill("red")
    drop(tab, "New images", [pictures["red"][0], pictures["green"][2]])
    assert answers(tab, "red")[0] == "red"
    shown = tab.locator("#answers figure").first
    assert "class 2" in shown.inner_text() and "%" in shown.inner_text() and "patches" in shown.inner_text()
    assert shown.locator("img").count() == 2
    tab.get_by_role("button", name="Add a class").click()
    tab.get_by_label("Name of class 3").fill("green")
    drop(tab, "Images of class 3", pictures["green"][:2])
    tab.get_by_role("button", name="Classify").click()
    tab.locator("#answers h3").filter(has_text="green").wait_for()
    assert tab.locator("#answers h3").all_inner_texts() == ["red", "green"]
    tab.get_by_role("button", name="Save the fitted task").click()
    with tab.expect_download() as download:
        tab.locator("a[download]").first.click()
    download.value.save_as(tmp_path / "task.zip")
    with zipfile.ZipFile(tmp_path / "task.zip") as archive:
        assert "fitted_task/adapter_model.safetensors" in archive.namelist()


def test_an_error_leaves_no_old_answers_and_a_class_can_be_removed(visit):
    tab, *_ = visit  # with the classes and answers of the test before
    tab.locator("#answers h3").first.wait_for()
    tab.get_by_role("button", name="Remove class 2").click()
    tab.get_by_label("Name of class 2").wait_for(state="hidden")
    tab.get_by_role("button", name="Remove class 3").click()
    tab.wait_for_function("document.querySelectorAll('.drop-zone img').length === 6")  # 4 of class 1, 2 new ones
    tab.get_by_role("button", name="Classify").click()
    tab.get_by_text("Show images of at least two classes first").first.wait_for()
    assert tab.locator("#answers h3").count() == 0


def test_another_meta_lora_is_chosen_or_refused(visit):
    from playwright.sync_api import TimeoutError as Late

    tab, *_ = visit
    tab.get_by_role("button", name="Another meta-LoRA").click()
    asked = tab.get_by_label("Repo id, or a folder")
    toast = tab.get_by_test_id("toast-body").filter(has_text="/nowhere/at all")
    for timeout in (5_000, 10_000, 20_000, TIMEOUT):  # what is typed while a busy page still opens can be lost
        asked.fill("/nowhere/at all")
        tab.get_by_role("button", name="Load", exact=True).click()
        try:
            toast.first.wait_for(timeout=timeout)
            break
        except Late:
            assert timeout < TIMEOUT
    asked.fill("demo")
    asked.press("Enter")
    tab.get_by_text("In use: demo").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_all_in_light_and_dark(visit, scheme):
    tab, *_ = visit
    tab.set_viewport_size({"width": 375, "height": 700})
    tab.emulate_media(color_scheme=scheme)
    tab.wait_for_function(f"document.body.classList.contains('dark') === {str(scheme == 'dark').lower()}")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 375
    for name in ("Add a class", "Classify", "Save the fitted task"):
        box = tab.get_by_role("button", name=name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 375 and box["height"] >= 24
    luminance = "c => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number); return 0.3 * r + 0.59 * g + 0.11 * b; }"
    ink, ground = (
        tab.evaluate(f"({luminance})(getComputedStyle({where}).{what})")
        for where, what in (("document.querySelector('h1')", "color"), ("document.body", "backgroundColor"))
    )
    assert (ink - ground if scheme == "dark" else ground - ink) > 150


def test_the_keyboard_reaches_everything_in_reading_order(visit):
    tab, *_ = visit
    tab.reload()
    tab.get_by_role("button", name="Images of class 1: choose or drop files").wait_for()
    tab.locator("h1").click()
    found = []
    for _ in range(11):
        tab.keyboard.press("Tab")
        found.append(tab.evaluate("(a => a.ariaLabel || a.placeholder || a.innerText.trim())(document.activeElement)"))
    zone = "{}: choose or drop files"
    names = [name for n in (1, 2) for name in (f"class {n}", zone.format(f"Images of class {n}"), f"Remove class {n}")]
    assert found[:10] == [*names, "Add a class", zone.format("New images"), "Classify", "Save the fitted task"]
    assert found[10].startswith("Another meta-LoRA")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert tab.evaluate(outline) == "solid"
    tab.get_by_role("button", name="Add a class").focus()
    tab.keyboard.press("Enter")
    tab.get_by_label("Name of class 3").wait_for()


def test_nothing_was_asked_of_any_other_machine(visit):
    _, asked, _ = visit
    assert any("/gradio_api/upload" in address for address in asked)  # so that it was recorded at all
    hosts = {urlsplit(address).hostname for address in asked if not address.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}


def test_nothing_that_the_page_needs_is_refused(visit):
    *_, refused = visit
    assert refused == []
