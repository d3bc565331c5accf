"""What stopped or misled a person in the first five minutes, one test a line: inputs, the command line, wrong loaders.

The habits are those of transformers, PEFT, datasets, scikit-learn and argparse.
"""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from lora_recycle import MetaLoRAForFewShotClassification
from lora_recycle.app.session import FewShotSession
from lora_recycle.cli.common import table
from lora_recycle.cli.main import build_parser
from lora_recycle.errors import DataError
from lora_recycle.hub.embedded import backbone_path, meta_lora_path
from lora_recycle.images import decode
from lora_recycle.images.labelled import load_labelled_images


COLOURS = {"cat": (200, 30, 30), "dog": (30, 180, 40), "fox": (30, 40, 200)}
EACH = 4
SIZE = 64


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder for each class of four pictures of its colour."""
    folder, rng = tmp_path_factory.mktemp("five") / "photos", np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(EACH):
            pixels = np.clip(np.array(colour) + rng.integers(-30, 30, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def files(photos):
    return sorted(photos.glob("*/*.png"))


@pytest.fixture(scope="module")
def labels(files):
    return [file.parent.name for file in files]


@pytest.fixture(scope="module")
def demo():
    return MetaLoRAForFewShotClassification.from_pretrained("demo")


@pytest.fixture(scope="module")
def expected(demo, files, labels):
    """The prototypes of the task, (3, D)."""
    return demo.new_task().fit(files, labels).prototypes


@pytest.fixture
def copied(photos, tmp_path):
    """The photos in a place of their own, to be spoilt."""
    return shutil.copytree(photos, tmp_path / "photos")


@pytest.fixture
def broken(copied):
    """The photos, one of which is none."""
    (copied / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    return copied


# Inputs


def test_heic_is_read_upright_as_any_photo(demo, photos, files, labels, tmp_path, run):
    pillow_heif = pytest.importorskip("pillow_heif", reason="the extra [heic] is not installed")
    for name in COLOURS:
        (tmp_path / "iphone" / name).mkdir(parents=True)
        heif = pillow_heif.from_pillow(Image.open(photos / name / "0.png"))
        heif.save(tmp_path / "iphone" / name / "IMG_1.HEIC", quality=95)
    heic = sorted((tmp_path / "iphone").glob("*/*.HEIC"))
    task = demo.new_task().fit(files, labels)
    assert task.predict(heic) == list(COLOURS)
    code, out, _ = run("predict", "demo", "--support", tmp_path / "iphone", files[0], "--json", "--quiet")
    assert code == 0 and json.loads(out)[0]["label"] == "cat"
    session = FewShotSession(demo)
    for file in heic:
        session.add_class(file.parent.name, [file])
    assert next(iter(session.classify([files[-1]])[0].probabilities)) == "fox"
    picture = Image.fromarray(np.repeat(np.uint8([[255] * 32, [0] * 32]), 8, 0))  # wide; upright it is high
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.convert("RGB").save(tmp_path / "turned.heic", exif=exif.tobytes())
    assert decode.to_picture(tmp_path / "turned.heic").size == (16, 32)


def test_heic_obeys_the_limits_of_other_pictures(tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif", reason="the extra [heic] is not installed")
    pillow_heif.from_pillow(Image.new("RGB", (64, 64))).save(tmp_path / "bomb.heic")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="bomb.heic: not a readable image .*decompression bomb"):
        decode.to_picture(tmp_path / "bomb.heic")


def test_heic_without_its_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    decode.register_formats()
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(DataError, match=r"photo.heic: .*HEIC needs pillow-heif: pip install 'lora-recycle\[heic\]'"):
        decode.to_picture(tmp_path / "photo.heic")


def test_predict_takes_a_folder_as_fit_does(demo, photos, files, run):
    task = demo.new_task().fit(photos)
    assert task.predict(photos) == task.predict(str(photos)) == task.predict(files)
    code, out, _ = run("predict", "demo", "--support", photos, photos, "--json")
    assert code == 0 and [row["file"] for row in json.loads(out)] == [str(file) for file in files]


def test_open_files_and_bytes_are_images(demo, files, labels, expected):
    opened = [io.BytesIO(file.read_bytes()) for file in files]
    task = demo.new_task().fit(opened, labels)
    assert torch.equal(task.prototypes, expected)
    assert task.predict(opened[0]) == task.predict(files[0].read_bytes()) == ["cat"]
    with open(files[0], "rb") as file:
        assert task.predict(file) == ["cat"]


@pytest.mark.parametrize("columns", [("image", "label"), ("photo", "species")])
def test_a_dataframe_and_a_csv_with_any_column_names(demo, files, labels, expected, tmp_path, columns):
    frame = pd.DataFrame(dict(zip(columns, ([str(file) for file in files], labels), strict=True)))
    frame["place"], frame["weight"] = "zoo", 0.5
    named = {} if columns == ("image", "label") else {"image_column": "photo", "label_column": "species"}
    frame.to_csv(tmp_path / "animals.csv", index=False)
    for source in (frame, tmp_path / "animals.csv"):
        assert torch.equal(demo.new_task().fit(source, **named).prototypes, expected)
    task = demo.new_task().fit(frame, **named)
    assert task.predict(frame) == task.predict(tmp_path / "animals.csv") == labels
    if named:
        with pytest.raises(DataError, match="expected a label column .*photo.*species.*label_column .--label-column"):
            demo.new_task().fit(frame, image_column="place")
        with pytest.raises(DataError, match="has no column 'kind'"):
            demo.new_task().fit(frame, label_column="kind")
        with pytest.raises(DataError, match="label_column='species'"):
            demo.new_task().fit(frame, "species")


def test_a_csv_names_images_from_its_own_folder(demo, copied, expected, tmp_path):
    lines = [f"{file.relative_to(tmp_path)},{file.parent.name}" for file in sorted(copied.glob("*/*.png"))]
    (tmp_path / "train.csv").write_text("\n".join(["file_name,animal", *lines]))
    assert torch.equal(demo.new_task().fit(tmp_path / "train.csv").prototypes, expected)
    (tmp_path / "odd.csv").write_text("file_name,animal\na.png\n")
    with pytest.raises(DataError, match="odd.csv: line 2 has 1 cells, the header 2 columns"):
        demo.new_task().fit(tmp_path / "odd.csv")


def test_columns_are_named_on_the_command_line(files, labels, tmp_path, run):
    pd.DataFrame({"id": range(len(files)), "photo": map(str, files), "species": labels}).to_parquet(
        tmp_path / "a.parquet"
    )
    asked = ["predict", "demo", "--support", tmp_path / "a.parquet", files[0], "--quiet"]
    code, _, err = run(*asked)
    assert code == 1 and "--image-column" in err
    code, out, _ = run(*asked, "--image-column", "photo", "--label-column", "species")
    assert code == 0 and "cat" in out


def test_a_data_set_of_any_column_names(demo, files, labels, expected):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"photo": [str(file) for file in files], "species": labels})
    typed = data.cast_column("photo", datasets.Image())
    assert torch.equal(demo.new_task().fit(typed).prototypes, expected)
    named = {"image_column": "photo", "label_column": "species"}
    assert torch.equal(demo.new_task().fit(data, **named).prototypes, expected)


def test_torch_data_sets_pairs_and_dicts_work_or_say_how(demo, files, labels, expected):
    pictures = [Image.open(file) for file in files]
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    numbers = torch.tensor([list(COLOURS).index(label) for label in labels])
    data = TensorDataset(pixels, numbers)
    task = demo.new_task()
    for source in (
        list(zip(files, labels, strict=True)),
        [[picture, label] for picture, label in zip(pictures, labels, strict=True)],
        data,
        {name: files[number * EACH : (number + 1) * EACH] for number, name in enumerate(COLOURS)},
        {name: files[0].parents[1] / name for name in COLOURS},
    ):
        assert torch.equal(task.fit(source).prototypes, expected)
    assert task.fit(data).label_names == [0, 1, 2] and task.predict(data) == numbers.tolist()
    for wrong, cure in (
        (DataLoader(data, 2), "Pass its data set: loader.dataset"),
        ({"image": files, "label": labels}, r"fit\(data\['image'\], data\['label'\]\)"),
        (TensorDataset(pixels), "must be pairs of image and label"),
    ):
        with pytest.raises(DataError, match=cure):
            task.fit(wrong)
    for wrong, cure in (
        (DataLoader(data, 2), "Pass its data set: loader.dataset"),
        ({"a": files}, "Pass a list of them"),
        (list(zip(files, labels, strict=True)), r"\[image for image, _ in pairs\]"),
    ):
        with pytest.raises(DataError, match=cure):
            task.predict(wrong)


def test_what_macos_and_editors_leave_is_no_class(demo, copied, expected):
    for name in ("__MACOSX/photos/cat", ".ipynb_checkpoints", ".Trash/cat", "cat/.thumbnails"):
        (copied / name).mkdir(parents=True)
        shutil.copy(copied / "cat" / "0.png", copied / name / "copy.png")
    task = demo.new_task().fit(copied)
    assert task.label_names == list(COLOURS) and torch.equal(task.prototypes, expected)


def test_broken_images_are_skipped_wherever_images_are_read(broken, tmp_path, run):
    few = ["--ways", 2, "--shots", 1, "--episodes", 4, "--queries", 2, "--no-pool", "--max-per-class", "none"]
    train = ["--classes", 3, "--epochs", 1, "--rank", 1, "--tasks", 1, "--targets", "q_proj"]
    for number, command in enumerate(
        (
            ["predict", "demo", "--support", broken, broken / "dog" / "0.png"],
            ["evaluate", "demo", "--data", broken, *few],
            ["train-adapters", broken, "--output", tmp_path / "pool", *train],
        )
    ):
        code, out, err = run(*command, "--quiet")
        assert code == 1 and out == "", number
        assert "cat/broken.jpg: not a readable image" in err and "--skip-errors leaves such images out" in err
        code, out, err = run(*command, "--quiet", "--skip-errors")
        assert code == 0 and out and "1 image skipped:\n" in err and "cat/broken.jpg: not a readable" in err


def test_a_class_of_which_nothing_can_be_read_is_an_error(broken):
    for file in (broken / "cat").glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="No image of the class 'cat' can be read. The first: .*cat/"):
        load_labelled_images(broken, 8, failures={})
    failures = {}
    shutil.copy(broken / "dog" / "0.png", broken / "cat" / "0.png")
    data = load_labelled_images(broken, 8, failures=failures)
    assert (
        len(data) == 2 * EACH + 1 and len(failures) == EACH and data.labels.tolist() == [0, *[1] * EACH, *[2] * EACH]
    )


def test_no_model_is_guessed(photos, files, run):
    code, out, err = run("predict", "--support", photos, files[0], files[1])
    assert code == 1 and out == "" and "0.png is not a meta-LoRA" in err
    assert "Put one, or demo, before the images" in err
    code, out, err = run("predict", "--support", photos, photos, files[1])
    assert code == 1 and out == "" and "photos is not a meta-LoRA" in err


def test_adapters_are_not_trained_into_another_result(photos, tmp_path, run):
    meta = shutil.copytree(meta_lora_path(), tmp_path / "meta")
    before = {path: path.read_bytes() for path in meta.rglob("*") if path.is_file()}
    for output in (meta, photos):
        code, out, err = run("train-adapters", photos, "--output", output, "--classes", 3, "--quiet")
        assert code == 1 and out == "" and "Name a new folder, or one that holds adapters" in err
    assert before == {path: path.read_bytes() for path in meta.rglob("*") if path.is_file()}


# The command line


def test_json_means_the_same_everywhere(photos, files, tmp_path, run):
    verbs = {
        "predict": ["predict", "demo", "--support", photos, files[0]],
        "inspect": ["inspect", "demo"],
        "evaluate": ["evaluate", "demo", "--data", photos, "--ways", 2, "--shots", 1, "--episodes", 4, "--queries", 2],
    }
    verbs["evaluate"] += ["--no-pool"]
    for verb, command in verbs.items():
        _, text, _ = run(*command, "--quiet")
        code, printed, _ = run(*command, "--quiet", "--json")
        assert code == 0 and json.loads(printed), verb
        file = tmp_path / f"{verb}.json"
        for _ in range(2):  # what it wrote itself is replaced
            code, out, _ = run(*command, "--quiet", "--json", file)
            assert (code, out) == (0, text) and json.loads(file.read_text()) == json.loads(printed)
        (tmp_path / "mine.json").write_text("{}")
        code, out, err = run(*command, "--quiet", "--json", tmp_path / "mine.json")
        assert code == 1 and out == "" and "is not what lora-recycle" in err


def test_json_never_takes_an_image_for_its_file(photos, files, run):
    code, out, _ = run("predict", "demo", "--support", photos, "--json", files[0], files[4], "--quiet")
    assert code == 0 and [row["label"] for row in json.loads(out)] == ["cat", "dog"]


def test_every_verb_that_ends_has_json():
    verbs = build_parser()._subparsers._group_actions[0].choices
    actions = {name: verb._option_string_actions.get("--json") for name, verb in verbs.items()}
    assert {name for name, action in actions.items() if action is None} == {"app"}
    assert {(a.nargs, a.const, a.metavar) for a in actions.values() if a} == {("?", "-", "FILE.json")}


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_tables_fit_the_terminal(photos, files, monkeypatch, run, width):
    monkeypatch.setenv("COLUMNS", str(width))
    commands = (
        ["predict", "demo", "--support", photos, *files],
        ["inspect", meta_lora_path().parents[0] / "pool"],
    )
    for command in commands:
        _, whole, _ = run(*command, "--quiet")
        assert max(map(len, whole.splitlines())) > 40  # of a pipe nothing is cut
        with monkeypatch.context() as patch:
            patch.setattr("lora_recycle.cli.common.shutil.get_terminal_size", lambda: os.terminal_size((width, 24)))
            patch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
            _, out, _ = run(*command, "--quiet")
        lines = out.splitlines()
        assert len(lines) >= len(files)
        if command[0] == "predict":
            assert max(map(len, lines)) <= width and all("cat" in line for line in lines[1:5])


def test_what_does_not_fit_as_columns_is_a_list():
    text = table(("file", "label", "n"), [("a" * 50, "b" * 50, 1), ("c", "d", 2)], 20)
    assert text.split("\n\n")[1].splitlines() == ["file: c", "label: d", "n: 2"]
    shown = table(("file", "n"), [("photos/holiday/IMG_0412.jpg", 12)], 20).splitlines()
    assert shown == ["file               n", "photo…G_0412.jpg  12"] and len(shown[1]) == 20


def test_no_arguments_print_the_help(run, capsys):
    with pytest.raises(SystemExit) as ended:
        run()
    out, err = capsys.readouterr()
    assert (
        ended.value.code == 2
        and out == ""
        and "usage: lora-recycle" in err
        and "exit codes" in err
        and "predict" in err
    )


def test_completion_and_help_survive_a_closed_pipe():
    for words in ("--print-completion bash", "--help"):
        script = f"{sys.executable} -m lora_recycle {words} | head -c 1"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert done.stderr == "" and len(done.stdout) == 1, words


def test_one_image_and_two_images(broken, run):
    shutil.copy(broken / "cat" / "broken.jpg", broken / "dog" / "broken.jpg")
    command = ["predict", "demo", "--support", broken, broken / "fox", "--skip-errors", "--quiet"]
    assert "2 images skipped:" in run(*command)[2]
    (broken / "dog" / "broken.jpg").unlink()
    assert "1 image skipped:" in run(*command)[2]


# The wrong loader


@pytest.fixture
def published(tmp_path):
    """The shipped meta-LoRA, whose base is a folder that everybody here can load."""
    folder = shutil.copytree(meta_lora_path(), tmp_path / "meta")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(backbone_path())})
    )
    return folder


def test_a_classifier_with_a_head_of_chance_is_refused(published):
    from peft import PeftModel
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    processor = AutoImageProcessor.from_pretrained(backbone_path(), backend="pil")
    with pytest.raises((ValueError, KeyError)):
        pipeline("image-classification", model=str(published), image_processor=processor)(Image.new("RGB", (64, 64)))
    with pytest.raises(ValueError, match="not found in the base model"):
        AutoModelForImageClassification.from_pretrained(published)
    with pytest.raises(ValueError, match="not found in the base model"):
        PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(backbone_path()), published)


def test_the_headless_base_still_takes_it(published, demo):
    from peft import PeftModel
    from transformers import AutoModel

    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        base = AutoModel.from_pretrained(backbone_path())
        found = PeftModel.from_pretrained(base, published).eval()(pixel_values=pixels).last_hidden_state[:, 0]
        torch.testing.assert_close(found, demo.features(pixels, "shared"), rtol=1e-4, atol=1e-5)


def test_the_card_says_how_to_load_it_before_anything_else():
    card = (meta_lora_path() / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert "pipeline_tag: image-feature-extraction" in header  # what transformers would run is true
    first = body.split("\n\n")[1]
    assert first.startswith("**Load it with lora-recycle.**") and "no classification head" in first
    assert 'pipeline("image-classification")' in first


# The app


def test_the_app_goes_on_past_a_broken_image(demo, broken):
    session = FewShotSession(demo)
    for name in COLOURS:
        session.add_class(name, sorted((broken / name).iterdir()))
    skipped = []
    answers = session.classify([broken / "cat" / "broken.jpg", broken / "dog" / "0.png"], skipped)
    assert [next(iter(answer.probabilities)) for answer in answers] == ["dog"] and len(skipped) == 2
    with pytest.raises(DataError, match="No new image can be read"):
        session.classify([broken / "cat" / "broken.jpg"], [])


def test_the_app_forgets_a_class(demo, photos):
    session = FewShotSession(demo)
    for name in COLOURS:
        session.add_class(name, [photos / name / "0.png"])
    session.remove_class("fox")
    (answer,) = session.classify([photos / "fox" / "1.png"])
    assert set(answer.probabilities) == {"cat", "dog"}
    with pytest.raises(DataError, match="no class fox"):
        session.remove_class("fox")


def test_the_app_shows_what_is_unsure():
    from lora_recycle.app.answers import answers_html
    from lora_recycle.app.session import Answer

    def page(first):
        pixels, attention = torch.zeros(3, 16, 16, dtype=torch.uint8), torch.ones(4) / 4
        return answers_html([Answer(pixels, {"cat": first, "dog": 1 - first}, attention)], 8, ["a.jpg: <cut>"])

    assert 'class="unsure"' in page(0.52) and "Unsure: 52.0% against 48.0% for dog." in page(0.52)
    assert "unsure" not in page(0.7).lower()
    assert "1 image left out:" in page(0.7) and "a.jpg: &lt;cut&gt;" in page(0.7)
