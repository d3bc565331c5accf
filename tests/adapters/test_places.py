"""Where adapters lie on the Hub and on disk: sub-folders, several in a repo, the checkpoints of a training run."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers_adapters import edit_config
from helpers_hub import CONFIG, WEIGHTS
from safetensors.torch import load_file

from lora_recycle import AdapterPool, pull_adapter
from lora_recycle.adapters.places import find_adapters, split_name
from lora_recycle.errors import AdapterError


@pytest.fixture
def many(hub, tiny_backbone_path, tiny_pool_path):
    """org/base; org/many with adapters in `birds`, `deep/er/pets` and two checkpoints of a run in `run`."""
    hub.put("org/base", tiny_backbone_path)
    places = ("birds", "deep/er/pets", "run/checkpoint-500", "run/checkpoint-1000")
    files = {"README.md": "# Adapters"}
    for i, place in enumerate(places):
        for path in (tiny_pool_path / f"adapter-{i}").iterdir():
            files[f"{place}/{path.name}"] = path.read_bytes()
        config = json.loads(files[f"{place}/{CONFIG}"]) | {"base_model_name_or_path": "org/base"}
        files[f"{place}/{CONFIG}"] = json.dumps(config)
    return hub.put("org/many", files)


def test_a_repo_of_several_adapters_is_a_pool_and_a_run_is_one_adapter(hub, many, tiny_pool):
    pool = AdapterPool.from_pretrained("org/many")
    assert [i.name for i in pool.infos] == ["org/many/birds", "org/many/deep/er/pets", "org/many/run/checkpoint-1000"]
    assert {i.revision for i in pool.infos} == {many} and pool.backbone.name == "org/base"
    for mine, theirs in ((0, 0), (1, 1), (2, 3)):
        assert torch.equal(pool[mine].head.weight, tiny_pool[theirs].head.weight)
    assert not hub.count("GET .*checkpoint-500/adapter_model")  # only the last one is downloaded
    again = AdapterPool.from_pretrained(f"org/many@{many}", local_files_only=True)
    assert [i.sha256 for i in again.infos] == [i.sha256 for i in pool.infos]


def test_a_subfolder_is_named_in_the_id_or_beside_it(many, tmp_path):
    for info in (
        pull_adapter("org/many/deep/er/pets"),
        pull_adapter("org/many", subfolder="deep/er/pets"),
        pull_adapter("org/many/deep"),  # the only one below
        AdapterPool.from_pretrained([f"org/many/deep/er/pets@{many}"]).infos[0],
    ):
        assert (info.revision, info.path.name) == (many, "pets")
    assert pull_adapter("org/many", many, subfolder="run").name == "org/many/run/checkpoint-1000"
    earlier = pull_adapter("org/many/run/checkpoint-500")  # named, an earlier one is taken too
    assert earlier.where == f"org/many/run/checkpoint-500@{many}"
    with pytest.raises(AdapterError, match=r"^org/many: holds 3 adapters \(org/many/birds, .*\)\. Name one of them"):
        pull_adapter("org/many")
    with pytest.raises(AdapterError, match="^org/many/cats@.*: no adapter here: adapter_config.json is missing"):
        pull_adapter("org/many/cats")


@pytest.mark.parametrize("sub", ["..", "a/../../b", "/etc", "a//b", "*", "a\\b"])
def test_a_subfolder_does_not_leave_the_repo(many, tiny_pool_path, sub):
    for call in (lambda: pull_adapter(f"org/many/{sub}"), lambda: pull_adapter("org/many", subfolder=sub)):
        with pytest.raises(AdapterError, match="leaves the repo"):
            call()
    with pytest.raises(AdapterError, match="leaves the repo"):
        pull_adapter(tiny_pool_path, subfolder=sub)


def test_a_bad_adapter_among_several_in_a_repo_is_skipped_alone(hub, many):
    hub.put("org/many", {f"birds/{WEIGHTS}": b"broken"})
    with pytest.warns(UserWarning, match="1 of 3 adapters"):
        pool = AdapterPool.from_pretrained("org/many", on_error="skip")
    assert [info.path.name for info in pool.infos] == ["pets", "checkpoint-1000"]


def test_local_folders_are_searched_to_the_bottom(tmp_path, tiny_pool_path, tiny_backbone_path):
    for i, place in enumerate(("birds", "deep/er/pets", "run/checkpoint-500", "run/checkpoint-1000")):
        shutil.copytree(tiny_pool_path / f"adapter-{i}", tmp_path / place)
    shutil.copytree(tiny_pool_path / "adapter-0", tmp_path / "birds" / "checkpoint-9")  # of a run that was saved
    shutil.copytree(tiny_pool_path / "adapter-0", tmp_path / ".unfinished")
    shutil.copytree(tiny_backbone_path, tmp_path / "base")  # no classifier: not a teacher
    (tmp_path / "deep" / "again").symlink_to(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in find_adapters(tmp_path)]
    assert names == ["birds", "deep/er/pets", "run/checkpoint-1000"]
    pool = AdapterPool.from_pretrained(tmp_path)
    assert [info.name for info in pool.infos] == ["birds", "pets", "run/checkpoint-1000"]


def test_pickled_weights_are_refused_with_the_command_that_converts_them(hub, tmp_path, tiny_pool_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_pool_path / "adapter-0", folder)
    tensors = load_file(folder / WEIGHTS)
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    edit_config(folder, base_model_name_or_path="org/base")
    hub.put("org/old", folder)
    for name in ("org/old", folder):
        with pytest.raises(AdapterError, match="only adapter_model.bin is there.*any code.* python -c ") as error:
            pull_adapter(name)
    assert not hub.count("GET .*adapter_model.bin")
    command = str(error.value).partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", command], cwd=folder, check=True)
    converted = load_file(folder / WEIGHTS)
    assert pull_adapter(folder).num_classes == 4 and converted.keys() == tensors.keys()
    hub.put("org/whole", {"config.json": '{"model_type": "vit"}', "pytorch_model.bin": b"x"})
    with pytest.raises(AdapterError, match="^org/whole@.*only pytorch_model.bin is there.*'model.safetensors'"):
        AdapterPool.from_pretrained("org/whole", base_model="org/base")


def test_a_base_model_that_is_gone_says_how_to_name_another(many, hub, tmp_path, tiny_pool_path):
    hub.put("org/lost", {f: d for f, d in hub.files("org/many").items() if f.startswith("birds/")})
    config = hub.files("org/many")[f"birds/{CONFIG}"].replace(b"org/base", b"org/gone")
    hub.put("org/lost", {f"birds/{CONFIG}": config})
    with pytest.raises(AdapterError, match=r"^org/gone: .*no such folder or repo.*--base-model"):
        AdapterPool.from_pretrained("org/lost")
    shutil.copytree(tiny_pool_path / "adapter-0", tmp_path / "one")
    edit_config(tmp_path / "one", base_model_name_or_path="../gone/vit")
    with pytest.raises(AdapterError, match=r"gone/vit: .*--base-model"):
        AdapterPool.from_pretrained(tmp_path / "one")
    assert len(AdapterPool.from_pretrained(tmp_path / "one", "org/base")) == 1


def test_names_are_split_into_repo_and_folder():
    assert split_name("org/name") == ("org/name", "") and split_name("gpt2") == ("gpt2", "")
    assert split_name("org/name/a/b") == ("org/name", "a/b") and split_name("org/name/a/") == ("org/name", "a")
