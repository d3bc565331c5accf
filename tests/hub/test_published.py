"""What a pushed repo says about its maker's machine (nothing) and to the Hub's checks (what they accept)."""

import io
import json
import re
import shutil
import tempfile

import pyarrow.parquet as parquet
import pytest
import torch
from helpers_tiny import repair_checksums
from hub_cards import LICENSES, complaints
from PIL import Image
from safetensors.torch import save_file

from lora_recycle import AdapterError, MetaLoRAForFewShotClassification, PushError, SurrogateDataset
from lora_recycle.cli.main import main
from lora_recycle.hub.cards import surrogate_card
from lora_recycle.hub.licenses import HUB_LICENSES, inherited_license, read_license
from lora_recycle.hub.upload import without_local_paths


def load(repo_id, **options):
    return MetaLoRAForFewShotClassification.from_pretrained(repo_id, **options)


def mentions(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files that hold a path below this machine's folder for temporary files, where all of a test lies."""
    return {name: data for name, data in files.items() if f"{tempfile.gettempdir()}/".encode() in data}


# paths


def test_no_path_of_this_machine_is_pushed_with_a_meta_lora(hub, model, tmp_path):
    model.settings["inversion"] |= {"start_images": f"{tmp_path}/my photos"}
    row = {"method": "meta-lora", "data": f"{tmp_path}/birds", "ways": 5, "shots": 1, "episodes": 9, "ci95": 1.0}
    model.settings["results"] = [row | {"accuracy": 50.0, "delta_vs_frozen": 1.0, "delta_ci95": 0.5}]
    model.save_pretrained(tmp_path / "meta")
    assert mentions({"sidecar": (tmp_path / "meta" / "meta_lora_config.json").read_bytes()})  # here it may be known
    model.push_to_hub("org/one")
    assert main(["push", str(tmp_path / "meta"), "org/two"]) == 0
    for name in ("org/one", "org/two"):
        files = hub.files(name)
        assert not mentions(files) and len(files) == 6
        sidecar = json.loads(files["meta_lora_config.json"])
        assert sidecar["inversion"]["start_images"] == "my photos" and sidecar["results"][0]["data"] == "birds"
        assert "start_images: my photos" in files["README.md"].decode()


def test_no_path_of_this_machine_is_pushed_with_surrogate_data(hub, tiny_surrogate, tmp_path):
    shutil.copytree(tiny_surrogate.folder, tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    manifest["config"] = manifest["config"] | {"start_images": str(tmp_path / "photos")}
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest))
    assert mentions({"name": manifest["backbone"]["name"].encode()})
    SurrogateDataset.from_pretrained(tmp_path / "s").push_to_hub("org/s")
    files = hub.files("org/s", repo_type="dataset")
    assert not mentions(files) and len(files) == 9
    pushed = json.loads(files["manifest.json"])
    assert (pushed["backbone"], pushed["config"]["start_images"]) == ({}, "photos")
    assert pushed["shards"] == manifest["shards"]
    images = parquet.read_table(io.BytesIO(files["data/train.parquet"])).column("image").to_pylist()
    assert {image["path"] for image in images} == {None}
    assert main(["inspect", str(SurrogateDataset.from_pretrained("org/s").folder)]) == 0


def test_no_path_of_this_machine_is_pushed_with_an_adapter(hub, tiny_pool_path, tmp_path):
    shutil.copytree(tiny_pool_path / "adapter-0", tmp_path / "birds")
    config, card = (tmp_path / "birds" / name for name in ("adapter_config.json", "README.md"))
    base = json.loads(config.read_text())["base_model_name_or_path"]
    card.write_text(f"---\nbase_model: {base}\ntags:\n- base_model:adapter:{base}\n- lora\n---\nMade for {base}.\n")
    config.write_text(config.read_text().replace(base, "org/tiny-vit"))
    assert main(["push", str(tmp_path / "birds"), "org/birds"]) == 0
    files = hub.files("org/birds")
    assert not mentions(files)
    assert "base_model:adapter:org/tiny-vit\n- lora\n---\nMade for org/tiny-vit" in files["README.md"].decode()


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("/home/me/photos/", "photos"),
        ("C:\\Users\\me\\photos", "photos"),
        ("~/photos", "photos"),
        ("~me/photos", "photos"),
        ("./out/meta", "meta"),
        ("..", ".."),
        ("file:///home/me/x", "x"),
        ("here/there", "there"),
        ("org/name", "org/name"),
        ("dead-leaves", "dead-leaves"),
        (".*\\.fc1", ".*\\.fc1"),
        ({"a": [{"b": "/x/y"}, 1, None]}, {"a": [{"b": "y"}, 1, None]}),
        ({"labels": ["/m/01g317", "n/a"]}, {"labels": ["/m/01g317", "n/a"]}),
    ],
)
def test_paths_are_cut_to_their_last_part(value, left, tmp_path, monkeypatch):
    (tmp_path / "here" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert without_local_paths(value) == left


def test_meta_loras_and_data_are_named_with_their_revision(hub, model, tiny_surrogate, tiny_pool_path, tmp_path):
    sha = hub.put("org/s", tiny_surrogate.folder, repo_type="dataset")
    hub.put("org/s", {"manifest.json": "moved on"}, repo_type="dataset")
    arguments = ["distill", str(tiny_pool_path), "--steps", "1", "--rank", "2", "--quiet", "--output", str(tmp_path)]
    assert main([*arguments, "--surrogate", "org/s"]) == 1
    assert main([*arguments, "--surrogate", f"org/s@{sha}"]) == 0
    model.fit(torch.zeros(2, 3, 32, 32), ["a", "b"]).push_to_hub("org/meta", revision="v1")
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    assert main(["predict", "org/meta", str(tmp_path / "one.png")]) == 1
    assert main(["predict", "org/meta@v1", str(tmp_path / "one.png")]) == 0


# pictures


@pytest.mark.parametrize("data", [b"<svg onload=alert(1)>", b"\x89PNG\r\n\x1a\n<html>", b"", "jpeg", "cut"])
def test_a_picture_that_is_no_png_is_not_passed_on(hub, model, tmp_path, data):
    model.save_pretrained(tmp_path / "meta")
    if data == "jpeg":
        Image.new("RGB", (9, 9)).save(tmp_path / "meta" / "surrogate.png", "JPEG")
    else:
        data = model.picture[:-40] if data == "cut" else data
        (tmp_path / "meta" / "surrogate.png").write_bytes(data)
    hub.put("org/odd", tmp_path / "meta")
    assert load("org/odd").picture is None is load(tmp_path / "meta").picture
    assert main(["push", str(tmp_path / "meta"), "me/clean"]) == 0
    assert "surrogate.png" not in hub.files("me/clean") and "surrogate.png" not in str(hub.files("me/clean"))


def test_a_picture_that_is_a_link_out_of_the_folder_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "meta")
    (tmp_path / "meta" / "surrogate.png").rename(tmp_path / "private.png")
    (tmp_path / "meta" / "surrogate.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(AdapterError, match="meta: surrogate.png is a link that leaves"):
        load(tmp_path / "meta")


# fitted tasks of strangers


@pytest.mark.parametrize(
    ("names", "tensors", "reason"),
    [
        (["a", "b"], {"sums": torch.ones(3, 32), "counts": torch.ones(3)}, "2 labels on 32 features, but sums"),
        (["a", "b"], {"sums": torch.ones(2, 31), "counts": torch.ones(2)}, "2 labels on 32 features, but sums"),
        (["a", "b"], {"sums": torch.ones(2, 32), "counts": torch.ones(2, 1)}, "2 labels on 32 features, but counts"),
        (["a", "b"], {"sums": torch.full((2, 32), torch.nan), "counts": torch.ones(2)}, "sums is not finite"),
        (["a", "b"], {"sums": torch.ones(2, 32), "counts": torch.zeros(2)}, "counts are less than 1"),
        (["a", "a"], {"sums": torch.ones(2, 32), "counts": torch.ones(2)}, "different labels"),
        ([["a"], {}], {"sums": torch.ones(2, 32), "counts": torch.ones(2)}, "different labels"),
        ("ab", {"sums": torch.ones(2, 32), "counts": torch.ones(2)}, "different labels"),
        (["a", "b"], {"sums": torch.ones(2, 32)}, "no head keeps sums and nothing else"),
        (["a", "b"], {"sums": torch.ones(2, 32).half(), "counts": torch.ones(2)}, "sums holds numbers of the type"),
        (["a", "b"], {"sums": torch.ones(2, 32), "counts": torch.tensor([1.0, 0.5])}, "counts are less than 1"),
    ],
)
def test_a_fitted_task_that_makes_no_sense_is_refused(hub, model, tmp_path, names, tensors, reason):
    model.fit(torch.zeros(2, 3, 32, 32), ["a", "b"]).save_pretrained(tmp_path)
    task = tmp_path / "few_shot_task.safetensors"
    save_file(tensors, task, metadata={"header": json.dumps({"label_names": names})})
    repair_checksums(tmp_path)
    hub.put("org/meta", tmp_path)
    with pytest.raises(AdapterError, match=f"few_shot_task.safetensors: the fitted task cannot be read.*{reason}"):
        load("org/meta")


# cards


def test_every_licence_that_we_state_is_one_that_the_hub_takes():
    for stated in (*HUB_LICENSES, "mulanpsl-2.0", "Ours-1", "apache-2.0+mit"):
        fields, _ = inherited_license([stated, stated])
        header = "".join(f"{key}: {value}\n" for key, value in fields.items())
        assert complaints(f"---\n{header}---\n") == ([], []), stated
    assert HUB_LICENSES == LICENSES


def test_a_licence_in_capitals_is_the_one_that_the_hub_knows(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: Apache-2.0\n---\n")
    assert read_license(tmp_path) == "apache-2.0"
    assert inherited_license(["apache-2.0"])[0] == {"license": "apache-2.0"}


@pytest.mark.parametrize(
    ("count", "category"), [(999, "n<1K"), (1000, "1K<n<10K"), (10**7, "10M<n<100M"), (10**9, "1B<n<10B")]
)
def test_sizes_of_data_sets_are_categories_that_the_hub_takes(count, category, tiny_surrogate):
    entry = tiny_surrogate.manifest["shards"][0] | {"num_images": count}
    card = surrogate_card("org/s", tiny_surrogate.manifest | {"shards": [entry]})
    assert complaints(card, "dataset") == ([], [])
    assert f"size_categories:\n- {category}\n" in card


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ("license: ours", '"license" must be one of'),
        ("base_model: /home/me/base", '"base_model" with value'),
        ("datasets: [/var/images]", '"datasets\\[0\\]" with value'),
        ("base_model_relation: child", '"base_model_relation" must be one of'),
        ("size_categories: [n>10M]", '"size_categories" must be one of'),
        ("pipeline_tag: [a]", '"pipeline_tag" must be a string'),
        ("model-index: [{name: a, results: [{task: {type: x}}]}]", 'dataset.type" is required'),
        ("model-index: [{results: []}]", '"model-index\\[0\\].name" is required'),
    ],
)
def test_the_local_hub_refuses_cards_as_the_real_one(hub, model, monkeypatch, header, complaint):
    assert re.search(complaint, complaints(f"---\n{header}\n---\n")[0][0])
    card = f"---\n{header}\n---\n# A card\n"
    monkeypatch.setattr("lora_recycle.modeling.publishing.meta_lora_card", lambda *args: card)
    with pytest.raises(PushError, match=f"Invalid metadata in README.md.*{complaint}"):
        model.push_to_hub("org/meta")
    assert not hub.exists("org/meta")
