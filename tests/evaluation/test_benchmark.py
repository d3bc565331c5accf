"""The benchmark on toy images: the numbers of `evaluate`, cells that are kept, and what is written of them."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers_tiny import random_pixels
from PIL import Image

from lora_recycle import DistillationConfig, MetaLoRAForFewShotClassification, MetaLoRATrainer
from lora_recycle.backbones.backbone import extract_features
from lora_recycle.errors import ConfigError, DataError
from lora_recycle.evaluation import engine
from lora_recycle.evaluation.benchmark import Benchmark
from lora_recycle.evaluation.config import EvaluationConfig
from lora_recycle.evaluation.engine import EvaluationEngine
from lora_recycle.evaluation.evaluate import evaluate
from lora_recycle.evaluation.recipe import BenchmarkRecipe
from lora_recycle.evaluation.results import confidence
from lora_recycle.evaluation.summary import markdown, rows_and_details
from lora_recycle.images.labelled import load_labelled_images
from lora_recycle.reports.benchmark_page import benchmark_page


METHODS = ["frozen-centred", "random", "nearest-group", "ensemble", "frozen + transductive_em", "meta-lora"]
TUNING = ["linear-probe", "meta-lora-tuned"]


@pytest.fixture(scope="module")
def work(tmp_path_factory, toy_data, tiny_pool, tiny_pool_path):
    """A folder with photos/ (noisy toy images), and meta/, the average as a meta-LoRA."""
    folder = tmp_path_factory.mktemp("suite")
    pixels = (toy_data.pixels.float() * 0.2 + random_pixels(160).float() * 0.8).to(torch.uint8)
    for i in range(0, 160, 2):
        path = folder / "photos" / toy_data.label_names[toy_data.labels[i]] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i].permute(1, 2, 0).numpy()).save(path)
    student = MetaLoRATrainer(tiny_pool, None, DistillationConfig(steps=0, rank=32)).train(progress=False)
    student.to_model().save_pretrained(folder / "meta")
    return folder


@pytest.fixture(scope="module")
def values(work, tiny_pool_path):
    pool = {"adapters": str(tiny_pool_path), "meta_loras": {"meta-lora": str(work / "meta")}}
    return {
        "ways": 3,
        "shots": [1, 2],
        "queries": 4,
        "episodes": 20,
        "tuning_episodes": 4,
        "methods": [*METHODS, *TUNING],
        "data": ["photos"],
        "pools": {"toy": pool},
        "tuning": {"meta-lora-tuned": {"steps": 2, "last_layers": 1}},
    }


@pytest.fixture(scope="module")
def finished(work, values):
    """Judged by a clock on which each image takes a network one second, and nothing else takes time."""
    now = [0.0]

    def forward(backbone, pixels, *options):
        now[0] += len(pixels)
        return extract_features(backbone, pixels, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: now[0]))
        patch.setattr(engine, "extract_features", forward)
        return Benchmark(BenchmarkRecipe.from_dict(values), work / "cells", work).run(progress=False)


def never(self, method, shots):
    raise AssertionError(f"{method} was computed again")


def test_the_rows_are_those_of_evaluate(work, finished, tiny_pool):
    rows, _ = rows_and_details(finished)
    size, resample = tiny_pool.backbone.image_size, int(tiny_pool.backbone.processor.resample)
    data = load_labelled_images(work / "photos", size, resample)
    model = MetaLoRAForFewShotClassification.from_pretrained(work / "meta")
    options = {"ways": 3, "shots": (1, 2), "queries": 4, "episodes": 20, "heads": ["transductive_em"]}
    alone = ["average", "frozen-centred", "random", "nearest-group", "ensemble"]
    expected = evaluate(data, model, EvaluationConfig(methods=alone, **options), pool=tiny_pool).rows
    found = {(row["method"], row["shots"]): row for row in rows}
    for row in expected:
        if row["method"] != "meta-lora + transductive_em":
            assert found.pop((row["method"], row["shots"])) == {**row, "tuning_free": True}
    assert {method for method, _ in found} == set(TUNING)
    assert all(row["episodes"] == 4 and row["tuning_free"] is False for row in found.values())


def test_differences_are_paired_on_the_methods_own_episodes(finished):
    rows, details = rows_and_details(finished)
    cells = {(cell.label, cell.shots): cell for cell in finished}
    assert [d["method"] for d in details] == [r["method"] for r in rows]
    for detail in details:
        own, average = (cells[m, detail["shots"]].result.accuracies for m in (detail["method"], "average"))
        mean, half = confidence(own.double() - average[: len(own)].double())
        assert (detail["delta_vs_average"], detail["delta_vs_average_ci95"]) == (round(mean, 3), round(half, 3))
        assert detail["seconds_per_task"] > 0 and detail["peak_memory_mb"] > 0
    for shots in (1, 2):
        baselines = ["frozen", "average", "frozen-centred", "random", "nearest-group", "ensemble"]
        best = max(baselines, key=lambda m: cells[m, shots].result.accuracies.mean())
        assert {d["best_rival"] for d in details if d["shots"] == shots} == {best}
    seconds = {d["method"]: d["seconds_per_task"] for d in details if d["shots"] == 1}
    assert seconds["average"] == 3 * (1 + 4) and seconds["ensemble"] == 4 * seconds["average"]
    assert {d["method"] for d in details if d["transductive"]} == {"frozen + transductive_em"}


def test_finished_cells_are_kept_and_only_what_changed_is_computed_again(work, values, finished, monkeypatch):
    result = EvaluationEngine.result
    monkeypatch.setattr(EvaluationEngine, "result", never)
    again = Benchmark(BenchmarkRecipe.from_dict(values), work / "cells", work).run(progress=False)
    assert rows_and_details(again) == rows_and_details(finished)
    computed = []
    monkeypatch.setattr(EvaluationEngine, "result", lambda self, m, k: computed.append((m, k)) or result(self, m, k))
    changed = {**values, "tuning": {"meta-lora-tuned": {"steps": 1, "last_layers": 1}}}
    Benchmark(BenchmarkRecipe.from_dict(changed), work / "cells", work).run(progress=False)
    assert computed == [("meta-lora-tuned", 1), ("meta-lora-tuned", 2)]
    computed.clear()
    damaged = next(cell for cell in finished if (cell.label, cell.shots) == ("random", 2))
    damaged.path(work / "cells").write_text('{"accuracies": [1.0')
    last = Benchmark(BenchmarkRecipe.from_dict(values), work / "cells", work).run(progress=False)
    assert computed == [("random", 2)]
    assert rows_and_details(last)[0] == rows_and_details(finished)[0]  # the same seed, the same numbers


def test_two_shells_share_the_work(work, values, tmp_path):
    recipe = BenchmarkRecipe.from_dict({**values, "methods": ["frozen-centred", "frozen-euclidean"], "shots": [1]})
    first = Benchmark(recipe, tmp_path, work).run((0, 2), progress=False)
    assert [cell.label for cell in first if cell.result] == ["frozen", "frozen-centred"]
    with pytest.raises(DataError, match="average on photos at 1 shots has not been computed"):
        rows_and_details(first)
    second = Benchmark(recipe, tmp_path, work).run((0, 1), progress=False)
    assert all(cell.result for cell in second)


def test_further_pools_are_named_and_take_their_own_adapters(work, values, tmp_path):
    own = {**values["pools"]["toy"], "names": "adapter-[01]", "meta_loras": {}}
    changed = {"methods": ["average", "meta-lora"], "shots": [1], "pools": {**values["pools"], "half": own}}
    cells = Benchmark(BenchmarkRecipe.from_dict({**values, **changed, "tuning": {}}), tmp_path, work).run(
        progress=False
    )
    assert [cell.label for cell in cells] == ["frozen", "average", "meta-lora", "average @ half"]
    whole, half = (next(c for c in cells if c.label == label) for label in ("average", "average @ half"))
    assert len(whole.identity["adapters"]) == 4 and len(half.identity["adapters"]) == 2
    fewer = {**changed["pools"], "half": {**own, "methods": ["average"]}}
    more = {**values, **changed, "methods": ["average", "meta-lora", "undiluted"], "tuning": {}, "pools": fewer}
    cells = Benchmark(BenchmarkRecipe.from_dict(more), tmp_path, work).run(progress=False)
    assert [cell.label for cell in cells] == ["frozen", "average", "meta-lora", "undiluted", "average @ half"]
    none = {**changed["pools"], "half": {**own, "names": "cifar*"}}
    with pytest.raises(ConfigError, match="pools: half: no adapter has a name like 'cifar\\*'; there are adapter-0"):
        Benchmark(BenchmarkRecipe.from_dict({**values, "pools": none}), tmp_path, work).run(progress=False)


def test_the_page_and_the_table_show_every_method_without_colour(finished):
    rows, details = rows_and_details(finished)
    page = benchmark_page("Toy & co", rows, details, {"notes": ["a <note>"]})
    assert "<title>Toy &amp; co</title>" in page and "a &lt;note&gt;" in page
    assert page.count("<svg") == 2 and "http" not in page and "<script" not in page
    plot = page[page.index("<svg") : page.index("</svg>")]
    kinds = {kind: sum(d["kind"] == kind for d in details if d["shots"] == 1) for kind in ("meta-lora", "tuned")}
    assert plot.count("h10v10h-10z") == kinds["meta-lora"] == 1 and plot.count("l6 11h-12z") == kinds["tuned"] == 2
    assert plot.count("l6 6l-6 6l-6 -6z") == 1 and plot.count("a5 5 0 1 0 10 0") == 6
    text = markdown(rows, details)
    for row in rows:
        assert f"{row['accuracy']:.2f} ± {row['ci95']:.2f}" in text and f">{row['method']}" in page
    assert "| meta-lora-tuned * | 4 |" in text and "| frozen + transductive_em † | 20 |" in text


def test_recipes_that_are_wrong(values):
    wrong = {
        "there is no method 'svm'": {"methods": ["svm"]},
        "there is no method 'average \\+ lda'": {"methods": ["average + lda"]},
        "'ensemble:2': ensemble has no scale": {"methods": ["ensemble:2"]},
        "'ties:x': the scale must be a positive number": {"methods": ["ties:x"]},
        "`data:` must be a list": {"data": []},
        "`pools:` must name": {"pools": {}},
        "unknown key 'episode'": {"episode": 3},
        "tuning_episodes must be 2 to 20": {"tuning_episodes": 21},
        "'frozen-centred' does not tune": {"tuning": {"frozen-centred": {}}},
        "unknown key 'stepz'": {"tuning": {"linear-probe": {"stepz": 3}}},
        "cannot be named 'ties'": {"pools": {"a": {"meta_loras": {"ties": "x"}}}},
        "pools: a: 'ties' is not one of the recipe's methods": {"pools": {"a": {"methods": ["ties"]}}},
        "expected a mapping of settings, got 3": {"pools": {"a": 3}},
        "max_per_class must be at least 1": {"data": [{"path": "x", "max_per_class": 0}]},
    }
    for message, change in wrong.items():
        with pytest.raises(ConfigError, match=message):
            BenchmarkRecipe.from_dict({**values, **change})


def test_classes_and_images_are_left_out(work, values, tiny_pool, toy_data, tmp_path):
    spec = {"path": "photos", "without_classes": toy_data.label_names[0], "without_images": [79]}
    recipe = BenchmarkRecipe.from_dict({**values, "data": [spec]})
    data, episodes = Benchmark(recipe, tmp_path, work)._images_and_episodes(recipe.data[0], tiny_pool.backbone)
    whole = load_labelled_images(work / "photos", tiny_pool.backbone.image_size)
    kept = whole.labels[:79] != 0
    assert torch.equal(data.pixels, whole.pixels[:79][kept]) and torch.equal(data.labels, whole.labels[:79][kept])
    assert all(0 not in data.labels[episode.support] for episode in episodes[1])


def test_the_command(work, values, tmp_path, capsys):
    from lora_recycle.cli.main import main

    recipe = tmp_path / "small.yaml"
    recipe.write_text(json.dumps({**values, "methods": ["meta-lora"], "tuning": {}}))
    command = ["benchmark", str(recipe), "--data-root", str(work), "--output", str(tmp_path / "out"), "--quiet"]
    assert main([*command, "--work", str(work / "cells")]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split()[:4] == ["method", "data", "shots", "accuracy"] and "index.html" in err
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["frozen", "average", "meta-lora"] * 2
    assert found["recipe"]["ways"] == 3 and "torch" in found["versions"]
    assert main([*command, "--part", "2", "2"]) == 1
    assert "--part 2 2: I must be between 0 and 1" in capsys.readouterr().err
    assert main(["benchmark", str(recipe), "--data-root", str(tmp_path / "none")]) == 1
