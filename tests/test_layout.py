"""The package's folders stand in the order of the work, and none imports a later one. `-s` prints the order."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_recycle"

#: From the bottom to the top: each may import those before it. docs/contributing.md draws the same.
FOLDERS = (
    "runtime",
    "images",
    "fewshot",
    "hub",
    "backbones",
    "surrogate",
    "adapters",
    "pool",
    "inversion",
    "merging",
    "finetuning",
    "modeling",
    "distillation",
    "evaluation",
    "reports",
    "app",
    "demo",
    "cli",
)
BELOW, ABOVE = ("version", "errors"), ("__init__", "__main__")
ORDER = (*BELOW, *FOLDERS, *ABOVE)
MOST_FLAT_MODULES = 8

#: What a user of the model never loads: how it was made, what it is compared with.
NOT_FOR_USE = ("inversion", "merging", "finetuning", "distillation", "evaluation", "reports", "app", "cli")


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, without the package's own; a package by its folder's."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports: anywhere in it, also in functions and for types alone."""
    folder = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    folder = [part for part in folder if part != "__init__"]
    targets = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["lora_recycle", *folder[: len(folder) + 1 - node.level], *filter(None, [base])])
            targets += [f"{base}.{alias.name}" for alias in node.names]
    inside = [target.removeprefix("lora_recycle.") for target in targets if target.startswith("lora_recycle.")]
    return {place(target, known) for target in inside}


def place(target: str, known: dict[str, Path]) -> str:
    """The module that `target`, a module or a name in one, is or lies in."""
    while target not in known:
        if "." not in target:
            return "__init__"
        target = target.rpartition(".")[0]
    return target


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(name, path, known) for name, path in known.items()}


def rank(module: str) -> int:
    return ORDER.index(module.partition(".")[0])


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Each circle that a walk along the imports meets, as `a > b > a`."""
    found, done, path = [], set(), []

    def walk(module):
        if module in path:
            found.append(" > ".join([*path[path.index(module) :], module]))
        elif module not in done:
            path.append(module)
            for target in sorted(graph[module]):
                walk(target)
            done.add(path.pop())

    for module in sorted(graph):
        walk(module)
    return found


def test_few_modules_lie_flat_and_every_folder_has_its_place():
    flat = sorted(path.stem for path in PACKAGE.glob("*.py"))
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*/__init__.py")}
    assert len(flat) <= MOST_FLAT_MODULES, flat
    assert {*flat} == {*BELOW, *ABOVE} and folders == {*FOLDERS}


def test_no_folder_imports_a_later_one(graph):
    later = [f"{module} imports {t}" for module, ts in graph.items() for t in sorted(ts) if rank(t) > rank(module)]
    assert not later, "\n".join(later)
    uses = {
        folder: sorted(
            {t.partition(".")[0] for m in graph if m.partition(".")[0] == folder for t in graph[m]} - {folder},
            key=ORDER.index,
        )
        for folder in FOLDERS
    }
    print("\n" + "\n".join(f"{folder:13} {' '.join(names)}" for folder, names in uses.items()))


def test_no_files_import_each_other(graph):
    assert not circles(graph), "\n".join(circles(graph))


def test_circles_and_late_imports_would_be_found(tmp_path):
    known = {"hub.cards": tmp_path / "cards.py", "evaluation.evaluate": tmp_path / "evaluate.py", "hub": tmp_path}
    known["hub.cards"].write_text("def f():\n    from ..evaluation.evaluate import evaluate\n")
    known["evaluation.evaluate"].write_text("if TYPE_CHECKING:\n    from lora_recycle.hub import cards\n")
    graph = {name: imported(name, known[name], known) for name in ("hub.cards", "evaluation.evaluate")}
    assert graph == {"hub.cards": {"evaluation.evaluate"}, "evaluation.evaluate": {"hub.cards"}}
    assert circles(graph) == ["evaluation.evaluate > hub.cards > evaluation.evaluate"]
    assert rank("evaluation.evaluate") > rank("hub.cards")


def test_the_documentation_draws_this_order():
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    section = page.split("## The layout\n")[1].split("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)/` \|", section, re.M)) == FOLDERS


def test_the_equations_are_where_the_documentation_says():
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    section = page.split("## Where the paper's equations are\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| .* \| `([\w/]+\.py)` \| `([\w.]+)` \|$", section, re.M)
    assert len(rows) >= 12 and len(rows) == section.count("\n| ") - 1  # without the header
    missing = [row for row in rows if row[1] not in definitions((PACKAGE / row[0]).read_text(encoding="utf-8"))]
    assert not missing
    numbers = {number for path in PACKAGE.rglob("*.py") for number in re.findall(r"Eq\. \d", path.read_text())}
    assert numbers <= {*re.findall(r"Eq\. \d", section)}  # every equation that a docstring names


def definitions(source: str) -> set[str]:
    """Functions and classes of a module, and `Class.method`."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    top = [node for node in ast.parse(source).body if isinstance(node, kinds)]
    inner = {f"{one.name}.{node.name}" for one in top for node in one.body if isinstance(node, kinds)}
    return {node.name for node in top} | inner


def test_tests_mirror_the_package():
    own = {"examples", "local_hub"}  # of what lies outside of the package
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/*.py")} - own
    assert folders <= {*FOLDERS}, folders - {*FOLDERS}


USE = """
import sys
import torch
from lora_recycle import MetaLoRAForFewShotClassification
model = MetaLoRAForFewShotClassification.from_pretrained("demo")
images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
model.fit(images, ["a", "a", "b", "b"]).predict(images)
print(*sorted(name.removeprefix("lora_recycle.") for name in sys.modules if name.startswith("lora_recycle.")))
"""


def test_a_user_of_the_model_loads_nothing_of_its_making():
    run = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = run.stdout.split()
    assert "modeling.meta_lora" in loaded
    assert not [name for name in loaded if name.partition(".")[0] in NOT_FOR_USE]
