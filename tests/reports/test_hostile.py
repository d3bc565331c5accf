"""Pages of hostile names: no tag, attribute or address comes from what strangers wrote."""

from html.parser import HTMLParser

import pytest
import torch

from lora_recycle.app.answers import answers_html
from lora_recycle.app.session import Answer
from lora_recycle.reports.benchmark_page import benchmark_page
from lora_recycle.reports.charts import scatter
from lora_recycle.reports.surrogate_page import write_surrogate_page
from lora_recycle.reports.training_report import write_report
from lora_recycle.surrogate.dataset import Shard, save_shard, write_manifest


HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></style></title><img src=x onerror=alert(1)>",
    '" onload="alert(1)" x="',
    "' onload='alert(1)' x='",
    "--><svg onload=alert(1)>",
    "]]></text><a href=javascript:alert(1)>x</a>",
    "&lt;b&gt; &#60;script&#62;",
    "$title ${sections} {0} {{ 7 * 7 }} %s",
]


class Shape(HTMLParser):
    """Tags and their attributes by name, and all text."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.shape, self.text = [], ""
        self.feed(str(page))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.shape.append((tag, *sorted(name for name, _ in attributes)))

    def handle_data(self, data):
        self.text += data


def row(value):
    row = {"method": value, "data": value, "ways": 5, "shots": 1, "episodes": 2, "accuracy": 50.0, "ci95": 1.0}
    return {**row, "delta_vs_frozen": 0.5, "delta_ci95": 0.2}


def report(value, folder):
    path = write_report(
        folder / "report.html",
        title=value,
        rows=[row(value)],
        curves={value: [3.0, 2.0]},
        surrogate_images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        surrogate_labels=[value],
        patch_size=4,
        config={value: value},
        usage=value,
    )
    return path.read_text(encoding="utf-8")


def surrogate(value, folder):
    name = value.replace("/", "\u2215")  # no file is called so
    labels = torch.zeros(2, dtype=torch.long)
    adapter = {"name": value, "sha256": "0", "labels": [value]}
    features = torch.zeros(2, 4, dtype=torch.float16)
    pixels, kept = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.int16)
    path = folder / "shards" / "a.safetensors"
    save_shard(path, Shard(adapter, pixels, labels, torch.zeros(2, 1), features, kept), "id")
    data = write_manifest(folder, {"config": {value: name}, "backbone": {"name": value}}, [path])
    return write_surrogate_page(folder / "page.html", data, patch_size=4).read_text(encoding="utf-8")


def benchmark(value, folder):
    detail = {f"delta_vs_{x}{end}": 0.1 for x in ("average", "best_rival") for end in ("", "_ci95")}
    detail |= {"method": value, "kind": "rival", "transductive": False, "pool": value, "best_rival": value}
    detail |= {"seconds_per_task": 1.0, "peak_memory_mb": 1.0}
    return benchmark_page(value, [row(value)], [detail], {"notes": [value], value: value})


def chart(value, folder):
    return scatter(value, torch.zeros(2, 2), [value, "other"], [value, "real"])


def answers(value, folder):
    attention = torch.tensor([0.4, 0.3, 0.2, 0.1])
    return answers_html([Answer(torch.zeros(3, 8, 8, dtype=torch.uint8), {value: 0.9, "x": 0.1}, attention)], 4)


@pytest.mark.parametrize("make", [report, surrogate, benchmark, chart, answers])
@pytest.mark.parametrize("value", HOSTILE)
def test_a_page_of_hostile_names_has_the_structure_of_any_other(make, value, tmp_path):
    hostile, plain = Shape(make(value, tmp_path / "hostile")), Shape(make("name", tmp_path / "plain"))
    assert hostile.shape == plain.shape
    assert value in hostile.text
