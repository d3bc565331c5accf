"""`studies/benchmark.py` on a network of a few narrow layers: what it writes, and that ratios come from its rows."""

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F


EXAMPLES = Path(__file__).parents[2] / "examples" / "studies"
ROUNDS = 2


@pytest.fixture(scope="module")
def speed():
    """The modules of the benchmark, with a small network in the place of the tiny one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        import benchmark
        from speed import measure, report, stages

        def small_matmul(device, dtype):
            return measure.Case("matmul", lambda: torch.ones(64, 64) @ torch.ones(64, 64), 1)

        make_world = stages.make_world

        def small_world(*args):
            return dataclasses.replace(make_world(*args), batch=10)

        patch.setitem(stages.SHAPES, "tiny", (32, 8, 32, 3, 2))
        patch.setattr(stages, "make_world", small_world)
        interleaved = measure.interleaved
        patch.setattr(measure, "interleaved", lambda *args: interleaved(*args[:3], least=0.0))
        patch.setattr(measure, "matmul_case", small_matmul)
        yield SimpleNamespace(benchmark=benchmark, measure=measure, report=report, stages=stages)
    for name in [name for name in sys.modules if name.split(".")[0] in ("benchmark", "speed")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def done(speed, tmp_path_factory):
    """One run of all stages: its result and the folder of its files."""
    folder = tmp_path_factory.mktemp("speed")
    files = ["--json", str(folder / "speed.json"), "--plot", str(folder / "speed.svg")]
    arguments = ["--quick", "--backbone", "tiny", "--rounds", str(ROUNDS), "--stages", *speed.stages.STAGES, *files]
    return speed.benchmark.main(arguments), folder


def test_every_row_says_what_was_measured(done):
    result, folder = done
    assert json.loads((folder / "speed.json").read_text()) == result
    assert result["machine"]["torch"] == str(torch.__version__) and result["machine"]["device"]
    assert result["achievable_gflops"] > 0
    names = [row["name"] for row in result["rows"]]
    assert len(set(names)) == len(names) == 25
    for row in result["rows"]:
        assert len(row["seconds"]) == ROUNDS and min(row["seconds"]) > 0
        assert row["steps_per_second"] == 1 / statistics.median(row["seconds"])
        assert row["images_per_second"] == pytest.approx(row["images"] * row["steps_per_second"])
        if row["name"] not in ("preprocess", "preprocess_baseline", "files_decoded"):
            assert row["gflops_per_image"] > 0 and row["peak_memory_mb"] > 0 and row["share_of_achievable"] > 0


def test_ratios_are_those_of_the_measured_rows(speed, done):
    result, _ = done
    rows = {row["name"]: row for row in result["rows"]}
    found = {ratio["name"]: ratio["ratio"] for ratio in result["ratios"]}
    assert found.keys() == speed.benchmark.RATIOS.keys() | speed.benchmark.MEMORY_RATIOS.keys()
    for name, slow in (
        ("inversion_pruned_75", "inversion_plain"),
        ("distillation_masked_75", "distillation_masked_0"),
        ("evaluate", "evaluate_baseline"),
    ):
        pairs = zip(rows[slow]["seconds"], rows[name]["seconds"], strict=True)
        expected = statistics.median(a / b for a, b in pairs)
        assert found[name if name in found else f"{name}_vs_baseline"] == expected
    memory = rows["distillation_masked_0"]["peak_memory_mb"] / rows["distillation_masked_75"]["peak_memory_mb"]
    assert found["distillation_masked_75_memory"] == memory


def test_masking_saves_the_computations_that_it_should(done):
    rows = {row["name"]: row for row in done[0]["rows"]}
    flops = [rows[f"distillation_masked_{masked}"]["gflops_per_image"] for masked in (0, 25, 50, 75)]
    assert flops == sorted(flops, reverse=True)
    assert flops[0] / flops[3] == pytest.approx(17 / 5, rel=0.15)  # CLS and 16 patches, CLS and 4
    assert rows["inversion_pruned_75"]["gflops_per_image"] < 0.7 * rows["inversion_plain"]["gflops_per_image"]
    names = ("predict_64", "predict_64_features", "predict_64_bare", "fit_baseline")
    merged, features, bare, worn = (rows[name]["gflops_per_image"] for name in names)
    assert merged == pytest.approx(features, rel=1e-3) and features < 0.98 * bare
    assert worn > 1.2 * features and worn > bare


def test_only_what_was_run_has_ratios(speed):
    row = {"name": "fit", "seconds": [1.0, 2.0], "peak_memory_mb": 1.0}
    rows = [row, row | {"name": "fit_baseline", "seconds": [3.0, 8.0]}, row | {"name": "evaluate"}]
    assert speed.benchmark.ratios(rows) == [{"name": "fit_vs_baseline", "ratio": 3.5}]


def test_flops_and_bytes_are_counted(speed):
    a, b, cpu = torch.randn(8, 16), torch.randn(16, 4), torch.device("cpu")
    assert speed.measure.cost(lambda: a @ b, cpu) == (2 * 8 * 16 * 4, 8 * 4 * 4)
    query = torch.randn(2, 3, 10, 8)
    assert speed.measure.cost(lambda: F.scaled_dot_product_attention(query, query, query), cpu)[0] == 4 * 6 * 100 * 8

    def freed_on_the_way():
        for _ in range(5):
            torch.zeros(1000)

    assert speed.measure.cost(freed_on_the_way, cpu) == (0, 4000)
    w = torch.randn(16, 4, requires_grad=True)
    assert speed.measure.cost(lambda: (a @ w).sum().backward(), cpu)[0] == 2 * 2 * 8 * 16 * 4


@torch.no_grad()
def test_baseline_and_library_run_the_same_network(speed, tmp_path):
    world = speed.stages.make_world("tiny", torch.device("cpu"), torch.float32, tmp_path)
    x = torch.randn(2, 3, 32, 32)
    with world.pool.folded(0) as backbone:
        logits = world.pool[0].logits(backbone, backbone(x)[0])
    expected = world.teacher(pixel_values=x).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - world.pool[0].logits(world.backbone, world.backbone(x)[0])).abs().max() > 1e-3


def test_the_plot_shows_both_stages_and_the_ideal_line(done):
    page = ElementTree.parse(done[1] / "speed.svg").getroot()
    name = "{http://www.w3.org/2000/svg}"
    lines = [line.get("class") for line in page.iter(f"{name}polyline")]
    assert lines == ["ideal", "line", "line"]
    words = {text.text for text in page.iter(f"{name}text")}
    assert {"distillation", "inversion", "1.00", "25%"} <= words


def test_a_profile_names_the_operations(speed, done):
    a = torch.randn(1024, 1024)  # so large that the product takes most of the time on a busy machine too
    operations = speed.measure.top_operations(lambda: (a @ a).relu(), 5, torch.device("cpu"))
    assert list(operations)[0] == "mm" and 0.5 < operations["mm"] < sum(operations.values()) <= 1.01
    row = done[0]["rows"][0] | {"operations": {"mm": 0.75}}
    assert f"\n| {row['name']} | mm 75% |" in speed.report.markdown(done[0] | {"rows": [row]})


def test_the_markdown_holds_rows_and_ratios(speed, done):
    result, _ = done
    text = speed.report.markdown(result)
    for row in result["rows"]:
        assert f"\n| {row['name']} | {row['steps_per_second']:.3g} | {row['images_per_second']:.3g} | " in text
    assert all(f"\n| {ratio['name']} | {ratio['ratio']:.2f} |" in text for ratio in result["ratios"])
    assert result["machine"]["torch"] in text


def test_the_whole_way(speed, tiny_pool, monkeypatch, tmp_path):
    """Every stage of a small pool in its order, what it adds up to, and plans of the other ways."""
    from speed import end_to_end

    monkeypatch.setattr(end_to_end, "pool_path", lambda: [info.path for info in tiny_pool.infos])
    found = end_to_end.end_to_end(
        tmp_path,
        adapters=4,
        inversion={"images_per_class": 3, "iterations": 2},
        distillation={"steps": 2, "rank": 4, "relational_batch": 8, "ways": 3},
        episodes=10,
    )
    names = [row["name"] for row in found["stages"]]
    assert names[:3] == ["pull and check", "groups", "inversion"] and names[-2:] == ["saving", "evaluation"]
    way = found["stages"][:-1]
    assert found["total"]["seconds"] == sum(row["seconds"] for row in way) and found["setting"]["adapters"] == 4
    assert {row["method"] for row in found["accuracy"]} >= {"frozen", "average", "meta-lora"}
    for other in ("published", "plain"):
        assert found[other]["seconds"] == found[other]["inversion"] + found[other]["distillation"] > 0
    printed = end_to_end.text(found)
    assert "total but evaluation" in printed and "published, extrapolated from three steps" in printed
    json.dumps(found)
