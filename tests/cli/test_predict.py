"""`lora-recycle predict` on folders of photos: what it prints, what it leaves out, and how it ends."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file


CLASSES, IMAGES = 6, 8


@pytest.fixture
def mixed(work, tmp_path):
    """A folder of five photos of class 2, two of which are broken."""
    folder = tmp_path / "new"
    folder.mkdir()
    for number in range(3):
        shutil.copy(work / "photos" / "class 2" / f"{number}.png", folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    (folder / "empty.png").touch()
    return folder


def command(work, *more):
    return ["predict", work / "meta", "--support", work / "photos", *more]


def test_csv_is_the_same_table_as_json(work, run):
    images = [work / "photos" / "class 0", work / "photos" / "class 3" / "5.png"]
    _, out, _ = run(*command(work, *images, "--json"))
    expected = json.loads(out)
    code, out, _ = run(*command(work, *images, "--csv", "--quiet"))
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and len(rows) == IMAGES + 1
    assert list(rows[0]) == ["file", "label", "probability", *(f"p(class {c})" for c in range(CLASSES))]
    for row, known in zip(rows, expected, strict=True):
        assert (row["file"], row["label"]) == (known["file"], known["label"])
        shares = {name: float(row[f"p({name})"]) for name in known["probabilities"]}
        assert shares == pytest.approx(known["probabilities"], abs=1e-6)
        assert float(row["probability"]) == max(shares.values()) == shares[row["label"]]


def test_names_with_commas_and_quotes_survive_csv(work, tmp_path, run):
    support = tmp_path / "examples"
    for number, name in enumerate(('a "big", dog', "cat, small")):
        shutil.copytree(work / "photos" / f"class {number}", support / name)
    query = tmp_path / "one, two.png"
    shutil.copy(work / "photos" / "class 0" / "0.png", query)
    _, out, _ = run("predict", work / "meta", "--support", support, query, "--csv")
    header, row = csv.reader(io.StringIO(out))
    assert header[3:] == ['p(a "big", dog)', "p(cat, small)"] and row[0] == str(query)


@pytest.mark.parametrize("value", [1e38, float("nan")])
def test_weights_that_give_no_numbers_are_an_error_and_no_answer(work, tmp_path, fails, value):
    """It was NaN probabilities, the first label, exit code 0 and JSON that no parser takes."""
    base = shutil.copytree(work / "base", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["layernorm.weight"].fill_(value)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    said = fails(*command(work, work / "photos" / "class 0", "--base-model", base, "--json", "--quiet"))
    assert "embeddings are not finite. Look at the weights of the base model" in said


def test_a_broken_photo_stops_the_run_by_its_name(work, mixed, fails):
    assert "broken.jpg: not a readable image" in fails(*command(work, mixed, "--quiet"))


@pytest.mark.parametrize("form", ["", "--json", "--csv"])
def test_broken_photos_are_skipped_and_told(work, mixed, run, form):
    code, out, err = run(*command(work, mixed, "--skip-errors", "--quiet", *filter(None, [form])))
    assert code == 0 and "2 images skipped:" in err
    assert "broken.jpg: not a readable image" in err and "empty.png: not a readable image" in err
    assert "broken.jpg" not in out and "empty.png" not in out and all(f"{n}.png" in out for n in range(3))
    assert "NaN" not in out and "nan" not in out


def test_nothing_but_broken_photos_is_an_error(work, mixed, run):
    code, out, err = run(*command(work, mixed / "empty.png", mixed / "broken.jpg", "--skip-errors"))
    assert code == 1 and out == "" and "None of the 2 images can be read" in err


def test_broken_examples_are_skipped_too(work, mixed, tmp_path, run, fails):
    shutil.copytree(work / "photos", tmp_path / "photos")
    shutil.copy(mixed / "broken.jpg", tmp_path / "photos" / "class 4")
    asked = ["predict", work / "meta", "--support", tmp_path / "photos", mixed / "0.png", "--json"]
    assert "class 4/broken.jpg: not a readable image" in fails(*asked)
    code, out, err = run(*asked, "--skip-errors")
    _, expected, _ = run(*command(work, mixed / "0.png", "--json"))
    assert code == 0 and "1 image skipped:" in err and json.loads(out) == json.loads(expected)


def test_no_model_is_guessed(work, mixed, fails):
    assert "0.png is not a meta-LoRA" in fails(
        "predict", "--support", work / "photos", mixed / "0.png", mixed / "1.png"
    )
    assert "0.png is not a meta-LoRA" in fails("predict", mixed / "0.png", mixed / "1.png")


def test_hundreds_of_photos_with_a_bar_on_stderr(work, tmp_path, run):
    rng = np.random.default_rng(0)
    for number in range(300):
        Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(tmp_path / f"{number:03}.png")
    code, out, err = run(*command(work, tmp_path))
    assert code == 0 and len(out.splitlines()) == 301 and "300/300" in err and "image/s" in err
    assert [line.split()[0] for line in out.splitlines()[1:]] == sorted(str(path) for path in tmp_path.iterdir())
    code, out, err = run(*command(work, tmp_path, "--quiet"))
    assert code == 0 and "300/300" not in err


def test_one_form_at_a_time(work, mixed, run):
    with pytest.raises(SystemExit) as error:
        run(*command(work, mixed, "--json", "--csv"))
    assert error.value.code == 2
