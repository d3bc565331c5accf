"""One classifier on one test set."""

import json

import pytest
import torch
from PIL import Image

from lora_recycle.cli.main import main
from lora_recycle.evaluation.fixed_split import SplitResult, exact_interval


@pytest.fixture
def result():
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.1, 0.9]])
    return SplitResult(["cat", "dog"], torch.tensor([0, 0, 0, 1]), probabilities, ["a", "b", "c", "d"])


def test_accuracy_classes_and_mistakes(result):
    assert result.accuracy == 50 and result.confusion.tolist() == [[1, 2], [0, 1]]
    assert [row["file"] for row in result.worst()] == ["b", "c"] and len(result.worst(1)) == 1
    cat, dog = result.per_class()
    assert (cat["images"], cat["precision"], dog["recall"]) == (3, 100, 100) and dog["precision"] == pytest.approx(
        100 / 3
    )
    assert json.loads(json.dumps(result.to_dict()))["confusion"]["counts"] == [[1, 2], [0, 1]]


def test_the_interval_is_the_exact_one():
    assert exact_interval(0, 10) == pytest.approx((0, 30.85), abs=0.01)  # tables of Clopper and Pearson
    assert exact_interval(10, 10) == pytest.approx((69.15, 100), abs=0.01)
    assert exact_interval(5, 10) == pytest.approx((18.71, 81.29), abs=0.01)


def test_the_command_judges_a_base_model_on_a_test_folder(tiny_backbone_path, toy_data, tmp_path, capsys):
    for number, (pixels, label) in enumerate(zip(toy_data.pixels, toy_data.labels.tolist(), strict=True)):
        if label < 2:
            folder = tmp_path / ("photos" if number % 2 else "test") / f"c{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    report, answers = tmp_path / "report.html", tmp_path / "results.json"
    options = ["--support", str(tmp_path / "photos"), "--data", str(tmp_path / "test")]
    files = ["--json", str(answers), "--report", str(report)]
    assert main(["evaluate", str(tiny_backbone_path), *options, *files]) in (0, None)
    out, err = capsys.readouterr()
    assert "exact binomial" in out and "recall" in out and "used frozen" in err
    found = json.loads(answers.read_text())
    assert sum(map(sum, found["confusion"]["counts"])) == found["images"] == 20
    page = report.read_text()
    assert "Confusion matrix" in page and page.count('class="cell') == 4
