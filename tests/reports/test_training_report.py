"""The report page is complete, harmless and alone."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from lora_recycle.errors import DataError
from lora_recycle.evaluation.results import summarise
from lora_recycle.reports.training_report import write_report


ROWS = summarise({"frozen": torch.tensor([40.0, 60.0]), "meta-lora": torch.tensor([45.0, 66.0])}, "digits", 5, 1)


def write(path, **changes):
    settings = {
        "title": "Demo",
        "rows": ROWS,
        "curves": {"inversion": [3.0, 2.0, 1.0], "relational": [0.5] * 1000 + [float("nan")]},
        "surrogate_images": torch.full((2, 3, 8, 8), 200, dtype=torch.uint8),
        "surrogate_labels": ["cat", "dog"],
        "kept_tokens": torch.tensor([[0, 3], [1, -1]], dtype=torch.int16),
        "patch_size": 4,
        "config": {"steps": 10},
        "usage": "model.predict(images)",
    }
    return write_report(path, **{**settings, **changes}).read_text(encoding="utf-8")


class _Balance(HTMLParser):
    """Checks that every tag is closed in order."""

    void = {"meta", "img", "path", "rect", "polyline", "line"}

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


def test_page_holds_everything(tmp_path):
    page = write(tmp_path / "deep" / "report.html")
    for text in ("cat", "dog", "meta-lora", "digits", "5-way 1-shot", "55.50", "+5.50", "steps", "model.predict"):
        assert text in page
    assert "<p><em>frozen</em>: the bare backbone; <em>meta-lora</em>: what this run made.</p>" in page
    assert page.count("<img") == 4 and page.count("<polyline") == 2 and page.count('<rect class="bar') == 2
    assert not re.search(r"(?:src|href)=\"(?!data:)|url\((?!#)|@import|<script", page)
    parser = _Balance()
    parser.feed(page)
    assert parser.open == []
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_episodes_are_a_column_only_where_they_differ(tmp_path):
    assert "over 2 episodes" in write(tmp_path / "report.html")
    page = write(tmp_path / "report.html", rows=[ROWS[0], {**ROWS[1], "episodes": 7}])
    assert "episodes</th>" in page and ">7</td>" in page


def test_mask_dims_the_other_patches(tmp_path):
    page = write(tmp_path / "report.html")
    encoded = re.findall(r"base64,([^\"]+)\"", page)
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in encoded]
    assert (images[0] == 200).all()
    assert [int(images[1][y, x, 0]) for y in (0, 4) for x in (0, 4)] == [200, 40, 40, 200]
    assert [int(images[3][y, x, 0]) for y in (0, 4) for x in (0, 4)] == [40, 200, 40, 40]


def test_without_masks_or_curves(tmp_path):
    page = write(tmp_path / "report.html", kept_tokens=None, curves={"nothing": []})
    assert page.count("<img") == 2 and "nothing: no finite values" in page


def test_a_run_without_accuracies_says_nothing_of_them(tmp_path):
    page = write(tmp_path / "report.html", rows=())
    assert "Accuracy" not in page and "Training curves" in page


def test_the_meta_lora_is_told_apart_without_colour_and_paper_is_white(tmp_path):
    page = write(tmp_path / "report.html")
    assert page.count('class="bar best"') == 1 and ".bar.best { fill: url(#hatched); }" in page
    assert 'id="hatched"' in page and 'class="strong">meta-lora' in page
    assert "--page: #fff" in page[page.index("@media print") :] and "break-inside: avoid" in page


def test_user_text_is_escaped(tmp_path):
    bad = "<script>alert('$x')</script>\""
    rows = [{**row, "data": bad, "method": bad} for row in ROWS]
    page = write(
        tmp_path / "report.html",
        title=bad,
        rows=rows,
        curves={bad: [1.0, 2.0]},
        surrogate_labels=[bad, bad],
        config={bad: bad},
        usage=bad,
    )
    assert "<script" not in page and "alert(&#39;$x&#39;)" in page


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_images_and_labels_must_match(tmp_path):
    with pytest.raises(DataError, match="2 surrogate images, 1 labels and 2 masks"):
        write(tmp_path / "report.html", surrogate_labels=["cat"])
    with pytest.raises(DataError, match="must be uint8"):
        write(tmp_path / "report.html", surrogate_images=torch.zeros(2, 3, 8, 8))


def test_the_page_opens_with_the_verdict_and_folds_rounded_settings(tmp_path):
    page = write(tmp_path / "report.html", verdict="The average is kept.", config={"lr": 0.1 + 0.2, "steps": 10})
    assert page.index("The average is kept.") < page.index("Accuracy on real images")
    folded = page.split("<details>")[1].split("</details>")[0]
    assert "0.3" in folded and "0.30000" not in page


def test_bars_begin_where_differences_can_be_seen(tmp_path):
    near = summarise({"frozen": torch.tensor([90.0, 91.0]), "meta-lora": torch.tensor([95.0, 96.0])}, "digits", 5, 1)
    page = write(tmp_path / "report.html", rows=near)
    widths = [float(width) for width in re.findall(r'class="bar[^"]*" x="110" y="\d+" width="([\d.]+)"', page)]
    assert len(widths) == 2 and widths[1] > 1.3 * widths[0]
    assert ">80</text>" in page and 'class="chance"' not in page  # the axis says where it begins
