"""The Space runs what the package runs: the same requirements, the extra's Gradio, the page's own launch."""

import configparser
import runpy
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"


@pytest.fixture
def options():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_requirements_are_those_of_the_package(options):
    package = options["options"]["install_requires"].split()
    assert (SPACE / "requirements.txt").read_text().split() == package


def test_front_matter_names_the_app_and_a_gradio_of_the_extra(options):
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).is_file()
    (extra,) = options["options.extras_require"]["app"].split()
    least, version = extra.removeprefix("gradio>="), front["sdk_version"]
    assert [int(n) for n in version.split(".")] >= [int(n) for n in least.split(".")]
    assert len(front["short_description"]) <= 60  # the Hub's limit


def test_app_serves_everybody_but_shows_no_folders(monkeypatch):
    page = pytest.importorskip("lora_recycle.app.page", reason="the extra [app] is not installed", exc_type=ValueError)
    calls = []
    monkeypatch.setattr(
        page, "launch", lambda *a, **k: calls.append((a, k)) or type("Page", (), {"block_thread": lambda self: None})()
    )
    monkeypatch.setenv("META_LORA", "me/meta")
    monkeypatch.setenv("SPACE_HOST", "me-page.hf.space")
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    assert calls == [
        (("me/meta",), {"host": "0.0.0.0", "browser": False, "folders": False, "hosts": ["me-page.hf.space"]})
    ]
    monkeypatch.chdir(ROOT)
    for folder in (str(SPACE), "examples/space", "examples/space@main", "./examples", "~"):
        with pytest.raises(page.gr.Error, match="Name a repo of the Hub|no meta-LoRA that this page can load"):
            page._choose(page.ServedModels(), folders=False)(folder)
