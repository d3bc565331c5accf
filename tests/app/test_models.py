"""The meta-LoRAs of the page: which are in memory, when they are loaded again, and who may name a folder."""

import json
import os
import shutil
import threading
from types import SimpleNamespace

import pytest

from lora_recycle.app.models import ServedModels, folder_stamp
from lora_recycle.hub.embedded import meta_lora_path


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


@pytest.fixture
def page():
    return pytest.importorskip("lora_recycle.app.page", reason="the extra [app] is not installed", exc_type=ValueError)


@pytest.mark.parametrize(("host", "folders"), [("127.0.0.1", True), ("localhost", True), ("::1", True)])
def test_folders_may_be_named_where_only_this_machine_reaches_the_page(page, host, folders):
    assert page._is_this_machine(host) is folders


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.9", "vision.example.org"])
def test_others_may_not_name_folders(page, host):
    assert not page._is_this_machine(host)


def test_a_page_for_others_tells_nothing_of_folders(page, tmp_path, monkeypatch):
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
    return SimpleNamespace(backbone=backbone, head=SimpleNamespace(name="prototypes"), domains=[])
