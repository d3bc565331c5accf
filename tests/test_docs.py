"""README.md and docs/: every code block does what it says, in a folder with adapters, images and a Hub of our own.

Python blocks of a page run one after another in one namespace, shell blocks line by line between them, and our command
runs in this process with its settings capped (`SMALL`). What cannot run here (a GPU, the public Hub, hours, an
installation) stands under `<!-- not run: why -->`: its Python is compiled, its shell is checked by bash, and every
`lora-recycle` line in it goes through the real parser.
"""

import contextlib
import glob
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers_hub import publish
from PIL import Image

from lora_recycle import __all__
from lora_recycle.backbones.families import FAMILIES, TOWERS
from lora_recycle.cli.main import build_parser, main
from lora_recycle.evaluation import engine
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.fewshot.heads import HEADS
from lora_recycle.merging import __all__ as merging_methods
from lora_recycle.runtime.config import RecipeConfig


ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
#: Pages whose blocks are compiled and parsed only, because they take hours, and data sets that are not shipped.
COMPILED = {"docs/benchmarks.md", "docs/embedded.md", *(page for page in PAGES if page.startswith("docs/studies/"))}
#: Programs and verbs that no page runs here; what follows them is parsed all the same.
ELSEWHERE = {
    "accelerate": "starts several processes",
    "pip": "installs",
    "sbatch": "wants a cluster",
    "app": "serves a page until it is stopped",
}
#: Pages that begin where others end: with surrogate/ and meta_lora/, made of adapters/.
PREPARED = ("docs/app.md", "docs/more.md", "docs/pictures.md")
#: Pages that have a test of their own, which runs every block and looks at what comes out.
TESTED = {
    "docs/hub.md": ("tests/hub/test_docs.py", "tests/cli/test_hub_commands.py"),
    "docs/teachers.md": ("tests/adapters/test_teachers_page.py",),
    "docs/baselines.md": ("tests/merging/test_docs.py",),
}
#: The most of each setting that is used here, so that a page takes seconds.
SMALL = {"images_per_class": 2, "iterations": 2, "steps": 2, "rank": 4, "relational_batch": 12, "epochs": 1}
SMALL |= {"tasks": 2, "classes": 3}
CLASSES = ("cat", "dog", "fox", "hare", "lynx", "wolf")
BASES = ("google/vit-base-patch16-224", "google/vit-base-patch16-224-in21k")


class Block(NamedTuple):
    """A fenced block: its language, its text, the line it starts at, and why it is not run (None: it is)."""

    language: str
    code: str
    line: int
    reason: str | None


def blocks(page: str) -> list[Block]:
    text, found = PAGES[page].read_text(encoding="utf-8"), []
    assert not re.search(r"^ +```|^~~~", text, re.M), f"{page}: blocks that no test sees; fence them at the margin"
    pattern = r"^(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$"
    for match in re.finditer(pattern, text, re.M | re.S):
        line = text.count("\n", 0, match.start("code")) + 1
        reason = "hours, and data sets that are not shipped" if page in COMPILED else match["reason"]
        found.append(Block(match["language"], match["code"], line, reason))
    return found


def commands(code: str) -> list[list[str]]:
    """The words of each line of a shell block that is not a comment; continued lines are one."""
    joined = code.replace("\\\n", " ")
    return [words for words in (shlex.split(line, comments=True) for line in joined.splitlines()) if words]


def ours(words: list[str]) -> list[str] | None:
    """What follows `lora-recycle` (or `-m lora_recycle`) in a line of shell, without loops and redirections."""
    for start in ("lora-recycle", "lora_recycle"):
        if start in words and (start == "lora-recycle" or words[words.index(start) - 1] == "-m"):
            found = words[words.index(start) + 1 :]
            ends = [i for i, word in enumerate(found) if word in (">", "|", "&", "&&", "done") or word.endswith(";")]
            return [word.rstrip(";") for word in found[: ends[0] + found[ends[0]].endswith(";") if ends else None]]
    return None


# pages that run


@pytest.fixture
def small(monkeypatch):
    """Settings are capped, and heads and families that a page registers are gone afterwards."""
    checked = RecipeConfig.__post_init__

    def cap(config):
        checked(config)
        for name, most in SMALL.items():
            if getattr(config, name, None) is not None:
                setattr(config, name, min(getattr(config, name), most))

    def few(labels, ways, shots, queries, episodes, *rest):
        return sample_episodes(labels, ways, shots, 3, 20, *rest)

    monkeypatch.setattr(RecipeConfig, "__post_init__", cap)
    monkeypatch.setattr(engine, "sample_episodes", few)
    registries = [(registry, dict(registry)) for registry in (HEADS, FAMILIES, TOWERS)]
    yield
    for registry, known in registries:
        registry.clear()
        registry.update(known)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory, tiny_pool, tiny_pool_path):
    """What pages talk about: adapters/, photos/, images/, test/, single images, a recipe. Copied for each page."""
    folder = tmp_path_factory.mktemp("docs")
    colours = torch.randint(0, 200, (len(CLASSES), 3), generator=torch.Generator().manual_seed(0)).tolist()
    for name, colour in zip(CLASSES, colours, strict=True):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(10):
            tint = tuple(value + 5 * i for value in colour)
            Image.new("RGB", (40, 32), tint).save(folder / "photos" / name / f"{i}.jpg")
        for i in (1, 2):
            shutil.copy(folder / "photos" / name / f"{i}.jpg", folder / f"{name}{i}.jpg")
    shutil.copy(folder / "photos" / "dog" / "5.jpg", folder / "new.jpg")
    shutil.copytree(folder / "photos" / "dog", folder / "new")
    shutil.copytree(folder / "photos", folder / "images")
    shutil.copytree(folder / "photos", folder / "test")
    for name in ("adapter-0", "adapter-1"):  # the plain LoRAs, which load at once
        shutil.copytree(tiny_pool_path / name, folder / "adapters" / name)
    for config in folder.glob("adapters/*/adapter_config.json"):
        config.write_text(re.sub(r'("base_model_name_or_path": )"[^"]*"', rf'\1"{BASES[0]}"', config.read_text()))
    (folder / "recipe.yaml").write_text("invert: {iterations: 2}\ndistill: {steps: 2}\n")
    return folder


@pytest.fixture
def place(shelf, hub, small, tiny_backbone_path, tiny_pool_path, tmp_path, monkeypatch):
    """A working folder like `shelf`, and a Hub with bases and the adapters of an organisation."""
    shutil.copytree(shelf, tmp_path, dirs_exist_ok=True)
    for base in BASES:
        hub.put(base, tiny_backbone_path)
    for i in range(2):
        name = f"acme/vit-lora-{i}"
        publish(hub, name, tiny_pool_path / f"adapter-{i}", BASES[0])
        hub.put(name, {"README.md": f"---\nlibrary_name: peft\nbase_model: {BASES[0]}\nlicense: mit\n---\n# {name}\n"})
    hub.put("acme/pickled", {"README.md": "---\nlibrary_name: peft\n---\n", "adapter_config.json": "{}"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_line(words: list[str], line: str) -> None:
    """One command: ours in this process, with its redirection; the rest by bash."""
    if words[0] in ELSEWHERE or (words[0] == "lora-recycle" and words[1] in ELSEWHERE):
        return
    words = [path for word in words for path in (sorted(glob.glob(word)) if "*" in word else [word])]
    arguments = ours(words)
    if arguments is None or words[0] != "lora-recycle":
        script = f'lora-recycle() {{ echo lora-recycle "$@"; }}\n{line}'
        done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
        for told in done.stdout.splitlines():
            assert told.startswith("lora-recycle ") and main(shlex.split(told)[1:]) == 0, told
    elif ">" in words:
        with open(words[words.index(">") + 1], "w") as file, contextlib.redirect_stdout(file):
            assert main(arguments) == 0, line
    else:
        assert main(arguments) == 0, line


def run_page(page: str) -> dict:
    names = {"__name__": page}
    for block in blocks(page):
        where = f"{page}:{block.line}"
        if block.reason:
            continue
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)
        elif block.language == "bash":
            for line in block.code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    run_line(words, line)
        else:
            assert block.language in ("", "text", "yaml"), f"{where}: run {block.language}, or say why not"
    return names


RUN = [page for page in PAGES if page not in COMPILED and page not in TESTED]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in RUN if any(not block.reason for block in blocks(page))])
def test_every_block_of_a_page_runs(page, place):
    if page in PREPARED:
        assert main(["invert", "adapters", "--output", "surrogate", "--quiet"]) == 0
        assert main(["distill", "adapters", "--surrogate", "surrogate", "--output", "meta_lora", "--quiet"]) == 0
    run_page(page)


# blocks that do not run, and pages as texts


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.language for block in blocks(page))])
def test_every_command_fits_the_parser_and_all_code_compiles(page):
    for block in blocks(page):
        where = f"{page}:{block.line}"
        if block.language == "python":
            compile(block.code, where, "exec")
        if block.language != "bash":
            continue
        done = subprocess.run(["bash", "-n"], input=block.code, text=True, capture_output=True)
        assert done.returncode == 0, f"{where}: {done.stderr}"
        for words in commands(block.code):
            if ours(words) is not None and ours(words)[0] not in ("--version", "--print-completion"):
                build_parser().parse_args(ours(words))  # ends the test where the parser does not know it
            for script in (word for word in words if re.fullmatch(r"examples/\S+\.(py|yaml)", word)):
                assert (ROOT / script).is_file(), f"{where}: there is no {script}"


@pytest.mark.parametrize("page", TESTED)
def test_pages_with_a_test_of_their_own_have_one(page):
    for test in TESTED[page]:
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_examples_that_a_page_names_exist(page):
    for name in re.findall(r"`(examples/[\w./-]+)`", PAGES[page].read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page} names {name}"


def test_links_of_the_readme_lead_somewhere():  # those between the pages are checked where the site is built
    text = PAGES["README.md"].read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)(?:#([\w-]+))?\)", text)
    assert len(links) > 10
    for target, anchor in links:
        assert (ROOT / target).exists(), target
        headings = re.findall(r"^#+ (.+)$", (ROOT / target).read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w]+", "-", heading.lower()) for heading in headings}


def test_the_reference_holds_every_public_name():
    told = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    missing = [name for name in (*__all__, *merging_methods) if not re.search(rf"\b{name}\b", told)]
    assert set(missing) <= {"__version__", *(name for name in __all__ if name.endswith("Error"))}


def test_the_figures_are_what_the_script_draws(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import draw_figures

    draw_figures.main(["--output", str(tmp_path)])
    for path in sorted(tmp_path.iterdir()):
        assert path.read_text() == (ROOT / "docs" / "figures" / path.name).read_text()
