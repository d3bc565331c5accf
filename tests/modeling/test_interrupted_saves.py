"""A save that is cut anywhere leaves the old model, the new one, or a folder that is refused: never a mixture."""

import json
import os
import shutil

import pytest
import torch
from helpers_tiny import random_pixels

from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.errors import AdapterError, StorageError
from lora_recycle.modeling.meta_lora import MetaLoRAForFewShotClassification


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture
def models(folder):
    """Two models with a task each, of other weights, other settings and other classes."""
    old, new = (MetaLoRAForFewShotClassification.from_pretrained(folder) for _ in range(2))
    with torch.no_grad():
        for parameter in new.peft_model.parameters():
            if parameter.shape[0] == new.backbone.hidden_size:
                parameter += 0.1
    new.peft_model.peft_config["default"].lora_alpha = 99
    old.fit(random_pixels(4), ["a", "a", "b", "b"])
    new.fit(random_pixels(6, seed=1), ["c", "c", "d", "d", "e", "e"])
    return old, new


def described(folder):
    """All that answers rest on."""
    model = MetaLoRAForFewShotClassification.from_pretrained(folder)
    return model.label_names, model.peft_model.peft_config["default"].lora_alpha, model.predict_proba(random_pixels(3))


def is_same(one, other):
    return one[:2] == other[:2] and torch.equal(one[2], other[2])


def cut_after(steps, patch):
    """From now on the process dies at its `steps`-th change of a name in a folder of results."""
    count = 0

    def counted(change):
        def act(*names, **options):
            nonlocal count
            if not options and ".partial" not in str(names[-1]):  # not within what is being written
                count += 1
                if count > steps:
                    raise Killed
            return change(*names, **options)

        return act

    for name in ("replace", "unlink", "rename"):
        patch.setattr(os, name, counted(getattr(os, name)))


def cut_everywhere(save, before, folder, check):
    """`check` the folder after each cut of `save`, which begins at a copy of `before`; how many there were."""
    for steps in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if before is not None:
            shutil.copytree(before, folder)
        with pytest.MonkeyPatch.context() as patch:
            cut_after(steps, patch)
            try:
                save()
            except Killed:
                pass
            else:
                return steps
        check()
    raise AssertionError("it never ends")


@pytest.mark.parametrize(("old_bits", "new_bits"), [(None, None), (None, 8), (8, None)])
def test_no_cut_leaves_a_mixture(models, tmp_path, old_bits, new_bits):
    old, new = models
    old.save_pretrained(tmp_path / "old", bits=old_bits)
    new.save_pretrained(tmp_path / "new", bits=new_bits)
    expected, told = [described(tmp_path / "old"), described(tmp_path / "new")], []

    def check():
        try:
            found = described(tmp_path / "out")
        except AdapterError as error:
            told.append(str(error))
            with pytest.raises(AdapterError):  # nor as an adapter of a pool
                pull_adapter(tmp_path / "out")
        else:
            assert any(is_same(found, one) for one in expected)

    save = lambda: new.save_pretrained(tmp_path / "out", bits=new_bits)  # noqa: E731
    assert cut_everywhere(save, tmp_path / "old", tmp_path / "out", check) >= 5
    said = ("is not the one that meta_lora_config.json was saved with", "adapter_model.safetensors is missing in")
    assert told and all(any(words in text for words in said) for text in told)
    assert is_same(described(tmp_path / "out"), expected[1])


def test_a_cut_that_removes_the_task_leaves_no_mixture(models, tmp_path):
    old, new = models
    new._task = None
    old.save_pretrained(tmp_path / "old")
    told = []

    def check():
        try:
            labels = MetaLoRAForFewShotClassification.from_pretrained(tmp_path / "out").label_names
        except AdapterError as error:
            told.append(str(error))
        else:
            assert labels == ["a", "b"]

    cut_everywhere(lambda: new.save_pretrained(tmp_path / "out"), tmp_path / "old", tmp_path / "out", check)
    assert told and not MetaLoRAForFewShotClassification.from_pretrained(tmp_path / "out").label_names


def test_a_first_save_that_was_cut_is_told_and_done_again(models, tmp_path):
    def check():
        with pytest.raises(AdapterError):
            described(tmp_path / "out")

    cut_everywhere(lambda: models[0].save_pretrained(tmp_path / "out"), None, tmp_path / "out", check)
    assert described(tmp_path / "out")[0] == ["a", "b"]


def test_files_that_are_swapped_by_hand_are_noticed(models, tmp_path):
    for name, model in zip(("old", "new"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json", "few_shot_task.safetensors"):
        shutil.copytree(tmp_path / "old", tmp_path / "mixed", dirs_exist_ok=True)
        shutil.copyfile(tmp_path / "new" / file, tmp_path / "mixed" / file)
        with pytest.raises(AdapterError, match=f"mixed: {file} is not the one .* take `checksums` out of meta_lora"):
            MetaLoRAForFewShotClassification.from_pretrained(tmp_path / "mixed")
    config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(config["base_model_name_or_path"]) + "/."  # as people correct it by hand
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config))
    assert described(tmp_path / "old")[0] == ["a", "b"]


def test_a_sidecar_of_an_earlier_version_is_read(models, tmp_path):
    models[0].save_pretrained(tmp_path)
    sidecar = tmp_path / "meta_lora_config.json"
    settings = json.loads(sidecar.read_text())
    del settings["checksums"]
    sidecar.write_text(json.dumps(settings))
    assert described(tmp_path)[0] == ["a", "b"]


def test_a_folder_of_something_else_is_not_saved_to(models, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "few_shot_task.safetensors").write_text("mine")
    with pytest.raises(
        StorageError, match=r"holds other files \(README.md, few_shot_task.safetensors\), which is not"
    ):
        models[0].save_pretrained(tmp_path)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"} and len(os.listdir(tmp_path)) == 2


def test_leftovers_of_a_save_that_was_killed_go_with_the_next(models, tmp_path):
    left = tmp_path / ".files.0123456789abcdef.partial"
    left.mkdir()
    (left / ".lora-recycle.lock").touch()
    models[0].save_pretrained(tmp_path)
    assert not left.exists()


def test_a_task_is_saved_over_a_task_alone(models, tmp_path):
    task = models[0].new_task().fit(random_pixels(4), ["a", "a", "b", "b"])
    task.save(tmp_path / "task")
    task.save(tmp_path / "task")
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(StorageError, match="mine: is there already, and is not a fitted task"):
        task.save(tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"
