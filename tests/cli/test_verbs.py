"""Every verb for real, on a pool that is tuned once: what it prints and what it writes."""

import json
import shutil
import sys

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import ViTModel

from lora_recycle import MetaLoRAForFewShotClassification
from lora_recycle.demo.run import OUTPUT
from lora_recycle.runtime.outputs import claim_output
from lora_recycle.runtime.provenance import PACKAGES


CLASSES, IMAGES = 6, 8


def test_tune_pool_keeps_what_is_there_and_prints_accuracies(work, tmp_path, run):
    shutil.copytree(work / "pool", tmp_path / "pool")
    shutil.rmtree(tmp_path / "pool" / "photos-001")
    command = [
        "train-adapters",
        work / "photos",
        "--output",
        tmp_path / "pool",
        "--base-model",
        work / "base",
        "--quiet",
    ]
    code, out, err = run(*command, "--classes", 4, "--epochs", 1, "--tasks", 3, "--rank", 2)
    header, row = out.splitlines()
    assert code == 0 and "validation accuracy" in header and "frozen prototypes" in header
    assert row.split()[0].endswith("photos-001")
    assert "2 adapters existed already" in err


def test_inspect_prints_a_table_and_json(work, run):
    code, out, err = run("inspect", work / "pool")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 4 and "Next:" in err
    header = "name base revision type rank targets classes labels transformers converted size usable commit"
    assert lines[0].split() == header.split()
    assert "LOHA" in lines[3] and "class" in lines[1]
    code, out, _ = run("inspect", work / "pool" / "photos-000", work / "surrogate", "--json")
    adapter, surrogate = json.loads(out)
    assert adapter["kind"] == "adapter" and adapter["num_classes"] == 4 and len(adapter["labels"]) == 4
    assert surrogate["kind"] == "surrogate" and surrogate["config"]["iterations"] == 2


def test_what_comes_after_inspect_goes_by_what_it_is(work, run):
    for what, next_verb in (("pool", "invert"), ("surrogate", "distill"), ("meta", "predict")):
        assert f"Next: lora-recycle {next_verb} " in run("inspect", work / what)[2]


def test_inspect_prints_names_that_other_verbs_take(work, tmp_path, run):
    code, out, err = run("inspect", work / "pool", "--short")
    assert code == 0 and out.splitlines() == [str(path) for path in sorted((work / "pool").iterdir())]
    (tmp_path / "ids.txt").write_text(out)
    assert run("inspect", tmp_path / "ids.txt", "--short")[1] == out


def test_inspect_describes_surrogate_data(work, run):
    code, out, _ = run("inspect", work / "surrogate")
    assert code == 0 and "24 images of 3 adapters" in out
    assert out.splitlines()[1].split() == ["adapter", "images", "accuracy", "confidence"]


def test_inspect_shows_surrogate_images_and_a_map(work, tmp_path, run, fails):
    folder = shutil.copytree(work / "surrogate", tmp_path / "surrogate")
    code, out, _ = run("inspect", folder, "--images")
    page = (folder / "images.html").read_text()
    assert code == 0 and out.split() == [str(folder / "images.html")]
    assert page.count("<img") == 2 * 24 and "Map of the" not in page  # each image and its mask
    code, *_ = run("inspect", "--images", folder, "--meta-lora", work / "meta", "--data", work / "photos")
    page = (folder / "images.html").read_text()
    assert code == 0 and "Frozen backbone" in page and "With the meta-LoRA" in page and "agreement" in page
    assert page.count('<path class="mark"') == 2 * 24 and page.count('<path class="mark second"') == 2 * 6 * 8
    assert "has no surrogate data, which --images needs" in fails("inspect", work / "pool", "--images")
    assert "need --images" in fails("inspect", folder, "--data", work / "photos")


def test_distill_writes_a_report_of_its_curves(work):
    page = (work / "meta" / "report.html").read_text()
    assert "distillation: relational" in page and "in 3 steps" in page and "from_pretrained" in page


def test_app_says_how_to_install_what_it_needs(fails, monkeypatch):
    monkeypatch.delitem(sys.modules, "lora_recycle.app.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'lora-recycle[app]'" in fails("app", "--no-browser")


def test_invert_again_keeps_finished_shards(work, run):
    shards = sorted((work / "surrogate" / "shards").iterdir())
    before = [path.stat().st_mtime_ns for path in shards]
    options = ["--images-per-class", 2, "--iterations", 2, "--keep-ratio", 0.5]
    code, out, err = run("invert", work / "pool", "--output", work / "surrogate", *options)
    assert code == 0 and len(out.splitlines()) == 4 and "invert" in err
    assert [path.stat().st_mtime_ns for path in shards] == before


def test_a_dry_run_prints_a_plan_and_writes_nothing(work, tmp_path, run):
    options = ["--images-per-class", 2, "--iterations", 2]
    code, out, err = run("invert", work / "pool", "--output", tmp_path / "surrogate", *options, "--dry-run")
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == ["stage", "work", "GFLOPs", "time"]
    assert [line.split()[0] for line in lines[1:]] == ["read", "starts", "optimise", "describe", "total", "memory"]
    assert "24 images, 2 iterations each" in lines[3] and "disk" in lines[-1] and "Next:" not in err
    code, out, err = run(
        "invert", work / "pool", "--output", work / "surrogate", *options, "--keep-ratio", 0.5, "--dry-run"
    )
    assert code == 0 and "3 finished shards are kept." in err and len(out.splitlines()) == 3
    options = ["--steps", 3, "--rank", 2, "--relational-batch", 12, "--output", tmp_path / "meta", "--dry-run"]
    code, out, err = run("distill", work / "pool", "--surrogate", work / "surrogate", *options)
    assert code == 0 and "3 steps of 12 images" in out and "teachers" in out and "Next:" not in err
    assert not list(tmp_path.iterdir())


def test_distill_writes_a_plain_adapter_with_sources_recipe_and_card(work):
    sidecar = json.loads((work / "meta" / "meta_lora_config.json").read_text())
    assert [source["peft_type"] for source in sidecar["sources"]] == ["LORA", "LORA", "LOHA"]
    assert all(len(source["sha256"]) == 64 for source in sidecar["sources"])
    assert sidecar["distillation"]["steps"] == 3 and sidecar["inversion"]["keep_ratio"] == 0.5
    assert set(sidecar["versions"]) == {"lora_recycle", "python", *PACKAGES}
    card = (work / "meta" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n") and "pipeline_tag: image-feature-extraction" in card
    assert all(source["sha256"] in card for source in sidecar["sources"])
    assert not (work / "meta" / "config.json").exists()
    plain = PeftModel.from_pretrained(ViTModel.from_pretrained(work / "base", add_pooling_layer=False), work / "meta")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = plain(pixel_values=pixels).last_hidden_state[:, 0]
        ours = MetaLoRAForFewShotClassification.from_pretrained(work / "meta").features(pixels)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_distill_without_steps_needs_no_surrogate_data(work, tmp_path, run, fails):
    code, _, err = run("distill", work / "pool", "--output", tmp_path / "avg", "--steps", 0, "--quiet")
    assert code == 0 and err == ""
    with safe_open(tmp_path / "avg" / "adapter_model.safetensors", "pt") as file:
        assert any(file.get_tensor(key).abs().sum() > 0 for key in file.keys() if "lora_B" in key)  # noqa: SIM118
    assert "was not trained" in (tmp_path / "avg" / "README.md").read_text()
    assert "--surrogate" in fails("distill", work / "pool", "--output", tmp_path / "none")


def test_distill_says_what_a_small_rank_leaves_of_the_average(work, tmp_path, run):
    for rank, told in ((1, True), (64, False)):
        code, _, err = run("distill", work / "pool", "--output", tmp_path / f"{rank}", "--steps", 0, "--rank", rank)
        assert code == 0 and (f"Rank {rank} holds" in err) == told, err


def test_evaluate_prints_a_table_and_writes_json(evaluate_arguments, work, tmp_path, run):
    options = ["--pool", work / "pool", "--json", tmp_path / "new" / "rows.json"]
    code, out, err = run(*evaluate_arguments, *options)
    rows = json.loads((tmp_path / "new" / "rows.json").read_text())["rows"]
    assert code == 0
    assert [r["method"] for r in rows] == [
        "frozen",
        "frozen-centred",
        "average",
        "ensemble",
        "random",
        "meta-lora-shared",
        "meta-lora",
    ]
    keys = ["method", "data", "ways", "shots", "episodes", "accuracy", "ci95", "delta_vs_frozen", "delta_ci95"]
    assert all(list(row) == keys and row["episodes"] == 20 and row["data"] == "photos" for row in rows)
    assert len(out.splitlines()) == 8 and "± " in out
    assert "fewer queries, 7 at least" in err


def test_evaluate_without_a_pool_leaves_its_methods_out(evaluate_arguments, work, run):
    code, out, _ = run(*evaluate_arguments, "--no-pool", "--max-per-class", 4)
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:]] == [
        "frozen",
        "frozen-centred",
        "meta-lora-shared",
        "meta-lora",
    ]


def test_evaluate_judges_other_heads_too(evaluate_arguments, run):
    code, out, _ = run(*evaluate_arguments, "--no-pool", "--max-per-class", 4, "--heads", "lda", "transductive_em")
    assert code == 0 and out.count(" + lda ") == out.count(" + transductive_em ") == 2


def test_predict_by_another_head(work, run, fails):
    command = ["predict", work / "meta", "--support", work / "photos", work / "photos" / "class 0", "--json"]
    found = [json.loads(run(*command, *head)[1]) for head in ([], ["--head", "lda"])]
    assert found[0][0]["probabilities"] != found[1][0]["probabilities"]
    assert "There are prototypes, " in fails(*command, "--head", "svm")


def test_evaluate_keeps_features_and_gives_the_same_table(evaluate_arguments, work, tmp_path, run, fails):
    options = ["--no-pool", "--max-per-class", 4, "--features", tmp_path / "features"]
    tables = [run(*evaluate_arguments, *options)[1] for _ in range(2)]
    stored = list((tmp_path / "features").glob("features-*.safetensors"))
    assert tables[0] == tables[1] and len(stored) >= 2
    options[-1] = work / "photos"
    assert "or one that holds stored features" in fails(*evaluate_arguments, *options)


def test_evaluate_judges_the_methods_asked_for(evaluate_arguments, work, run, fails):
    code, out, _ = run(*evaluate_arguments, "--methods", "ties", "frozen-euclidean", "--pool", work / "pool")
    methods = [line.split()[0] for line in out.splitlines()[1:]]
    assert code == 0 and methods == ["frozen", "ties", "frozen-euclidean", "meta-lora-shared", "meta-lora"]
    assert "ties needs a pool" in fails(*evaluate_arguments, "--no-pool", "--methods", "ties")


def test_predict_names_the_class_of_files_and_folders(work, run):
    images = [work / "photos" / "class 0", work / "photos" / "class 3" / "5.png"]
    code, out, _ = run("predict", work / "meta", "--support", work / "photos", *images)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 1 + IMAGES + 1 and lines[0].split() == ["file", "label", "probability"]
    code, out, _ = run("predict", work / "meta", "--support", work / "photos", images[1], "--json")
    (row,) = json.loads(out)
    assert row["file"].endswith("5.png") and row["label"] in row["probabilities"]
    assert len(row["probabilities"]) == CLASSES and sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4)


def test_predict_uses_a_task_that_was_saved_with_the_model(work, tmp_path, run, fails):
    model = MetaLoRAForFewShotClassification.from_pretrained(work / "meta")
    files = [str(work / "photos" / f"class {c}" / "0.png") for c in range(2)]
    model.fit(files, ["one", "two"]).save_pretrained(tmp_path / "fitted")
    code, out, _ = run("predict", tmp_path / "fitted", *files)
    assert code == 0 and [line.split()[-2] for line in out.splitlines()[1:]] == ["one", "two"]
    assert "--support" in fails("predict", work / "meta", *files)


RECIPE = """
invert: {images_per_class: 2, iterations: 2, keep_ratio: 0.5}
distill: {steps: STEPS, rank: 2, relational_batch: 12}
"""


def test_demo_writes_table_results_and_report_and_resumes(work, tmp_path, run):
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "demo"
    recipe.write_text(RECIPE.replace("STEPS", "2"))
    command = ["demo", "--pool", work / "pool", "--recipe", recipe, "--output", output, "--quiet"]
    code, out, err = run(*command, "--data", work / "photos")
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert code == 0 and {row["data"] for row in rows} == {"digits", "photos"} and len(rows) == 28
    assert out.count("meta-lora") == 8 and "from_pretrained(" in err
    page = (output / "report.html").read_text()
    assert page.count("its kept patches") == 24 and "inversion, mean of 3 adapters" in page and "relational" in page
    assert "## Results" in (output / "meta_lora" / "README.md").read_text()
    shards = sorted((output / "surrogate" / "shards").iterdir())
    before = [path.stat().st_mtime_ns for path in shards]
    recipe.write_text(RECIPE.replace("STEPS", "3"))  # its own stale checkpoints do not stop it
    code, _, _ = run(*command)
    assert code == 0 and [path.stat().st_mtime_ns for path in shards] == before
    assert len(json.loads((output / "meta_lora" / "work" / "training_log.json").read_text())["relational"]) == 3
    assert "inversion, mean of 3 adapters: 0" not in (output / "report.html").read_text()


def test_demo_leaves_checkpoints_alone_that_are_not_its_own(work, tmp_path, fails):
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "demo"
    recipe.write_text(RECIPE.replace("STEPS", "2"))
    claim_output(output, OUTPUT)
    shutil.copytree(work / "meta", output / "meta_lora")
    line = fails("demo", "--pool", work / "pool", "--recipe", recipe, "--output", output, "--quiet")
    assert "checkpoint of another recipe" in line
    assert (output / "meta_lora" / "work" / "checkpoint-00000003.safetensors").exists()


def test_a_push_names_a_folder_that_is_missing_or_holds_nothing_to_push(work, tmp_path, fails):
    assert f"{tmp_path / 'none'}: no such folder." in fails("push", tmp_path / "none", "someone/meta")
    assert "neither adapter_config.json nor manifest.json" in fails("push", work / "pool", "someone/meta")
