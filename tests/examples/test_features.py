"""The small examples and the notebook run on the shipped pool, and the recipes are ones that the verbs read."""

import ast
import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from helpers_hub import publish

from lora_recycle.cli.arguments import SECTIONS, build_config
from lora_recycle.cli.main import build_parser
from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.evaluation.config import EvaluationConfig
from lora_recycle.images.decode import to_picture
from lora_recycle.inversion.config import InversionConfig
from lora_recycle.pool.config import AdapterTrainingConfig


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
CONFIGS = {
    "train-adapters": AdapterTrainingConfig,
    "invert": InversionConfig,
    "distill": DistillationConfig,
    "evaluate": EvaluationConfig,
}


@pytest.fixture
def example(monkeypatch):
    """Imports an example by its name, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in [name for name in sys.modules if name not in before and (EXAMPLES / f"{name}.py").is_file()]:
        del sys.modules[name]


def test_own_images_are_classified(example, tmp_path, capsys):
    module = example("few_shot_own_images")
    assert module.main([]) > 0.5  # chance is a tenth
    digits = module.load_digits_images(64, max_per_class=3)
    for i, label in enumerate(digits.labels.tolist()):
        (tmp_path / "photos" / f"digit {label}").mkdir(parents=True, exist_ok=True)
        to_picture(digits.pixels[i]).save(tmp_path / "photos" / f"digit {label}" / f"{i}.png")
    capsys.readouterr()
    asked = str(next((tmp_path / "photos" / "digit 7").iterdir()))
    module.main([str(tmp_path / "photos"), asked])
    assert capsys.readouterr().out.startswith(f"{asked}: digit 7 (")


def test_added_classes_give_what_all_at_once_gives(example, capsys):
    module = example("add_classes")
    found = module.main(["--shots", "3"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["2", "4", "6", "8", "10"]
    model = module.MetaLoRAForFewShotClassification.from_pretrained("demo")
    digits = module.load_digits_images(64, max_per_class=6)
    parts = [(found[:3], found[3:]) for found in digits.by_class().values()]
    shown, asked = (torch.cat(part) for part in zip(*parts, strict=True))
    whole = model.fit(digits.pixels[shown], digits.labels[shown]).predict_proba(digits.pixels[asked])
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-3)


def test_methods_are_compared_on_the_same_episodes(example):
    rows = example("compare_methods").main(["--episodes", "20", "--shots", "1"])
    assert [row["method"] for row in rows] == ["frozen", "average", "magnitude", "nearest-group"]
    assert {row["episodes"] for row in rows} == {20}


def test_an_organisation_is_recycled_and_published(
    example, hub, tiny_backbone_path, tiny_pool_path, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    hub.put("org/base", tiny_backbone_path)
    for i in range(2):
        publish(hub, f"acme/vit-lora-{i}", tiny_pool_path / f"adapter-{i}", "org/base")
    hub.put("acme/broken", {"README.md": "---\nlibrary_name: peft\n---\n", "adapter_config.json": "{}"})
    Path("recipe.yaml").write_text("invert: {images_per_class: 2, iterations: 1}\ndistill: {steps: 1, rank: 2}\n")
    with pytest.warns(UserWarning, match="skipped"):
        url = example("recycle_organisation").main(["acme", "--recipe", "recipe.yaml", "--push", "me/acme"])
    assert url == f"{hub.endpoint}/me/acme" and "acme/broken" in capsys.readouterr().out
    sources = json.loads(hub.files("me/acme")["meta_lora_config.json"])["sources"]
    assert [source["name"] for source in sources] == ["acme/vit-lora-0", "acme/vit-lora-1"]
    assert Path("runs/organisation/meta_lora/README.md").is_file()


def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    import nbclient
    import nbformat

    page = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbformat.validate(page)
    assert all(not cell.outputs and cell.execution_count is None for cell in page.cells if cell.cell_type == "code")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = nbclient.NotebookClient(page, timeout=300, kernel_name="python3").execute()
    told = "".join(
        output.get("text", "") for cell in done.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert "24 images" in told and "of 50 right" in told and "meta-lora" in told


def commands_of(recipe: Path) -> list[list[str]]:
    """The words after `lora-recycle` of each command in the comment at the top."""
    text = "\n".join(line.lstrip("#").strip() for line in recipe.read_text().splitlines() if line.startswith("#"))
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("lora-recycle ")]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_commands_of_a_recipe_build_the_settings_that_it_states(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    verbs = {}
    for words in commands_of(recipe):
        args = build_parser().parse_args(words)
        assert Path(args.recipe).samefile(recipe)
        verbs[args.verb] = build_config(args, CONFIGS[args.verb])
    assert {*verbs, "evaluate"} == {*SECTIONS}
    stated = (verbs["invert"].keep_ratio, verbs["distill"].steps, verbs["train-adapters"].tasks)
    assert stated == ((1.0, 240_000, 100) if recipe.stem.startswith("paper-") else (0.25, 500, 20))


@pytest.mark.parametrize("folder", ["", "studies/", "tools/"])
def test_every_example_is_listed_and_has_its_command_on_top(folder):
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    paths = sorted((EXAMPLES / folder).glob("*.py"))
    for path in paths:
        source = path.read_text(encoding="utf-8")
        runs = f"python examples/{folder}{path.name}" in source or "__main__" not in source  # others are parts
        assert f"`{folder}{path.name}`" in page and runs
    assert paths and all(f"`{path.name}`" in page for path in EXAMPLES.glob("*.ipynb"))


def test_studies_share_one_module_and_import_no_other_study():
    parts = {"common", "ablation_plots", "more_tables"}  # run nothing by themselves
    studies = {path.stem for path in (EXAMPLES / "studies").glob("*.py")} - parts
    for path in (EXAMPLES / "studies").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in studies, f"{path.name} imports {node.module}"
