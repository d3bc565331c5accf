"""What is published: built as users' tools build it, installed where nothing else of the repository is, and run."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers_install import REPOSITORY, make_environment, requirement_lines
from packaging.version import Version
from PIL import Image

import lora_recycle


PACKAGE = REPOSITORY / "lora_recycle"
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run(*command, cwd, **env) -> str:
    """stdout of a command that sees this environment's packages alone, no cache and no network."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_ENDPOINT")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        env={**kept, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "OMP_NUM_THREADS": "1", **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind: str, source: Path, folder: Path) -> Path:
    """What `python -m build --no-isolation` calls, in the folder that it calls it in."""
    folder.mkdir(exist_ok=True)
    return folder / run(sys.executable, "-c", BUILD, f"build_{kind}", folder, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist of a copy of the repository, and the wheel made from that sdist."""
    folder = tmp_path_factory.mktemp("package")
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*", "build", "dist", "runs")
    shutil.copytree(REPOSITORY, folder / "copy", ignore=skipped)
    sdist = build("sdist", folder / "copy", folder / "dist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return sdist, build("wheel", next((folder / "unpacked").iterdir()), folder / "dist")


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """A new virtual environment with the wheel and no library that it does not require."""
    folder = tmp_path_factory.mktemp("installed")
    python = make_environment(folder / "venv")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    run(*pip, distributions[1], cwd=folder)
    return folder, python


def source_files() -> set[str]:
    return {
        path.relative_to(REPOSITORY).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
        scripts = wheel.read(f"{info}/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(info)} == source_files()
    assert f"{info}/licenses/LICENSE" in names and metadata["License"] == "Apache-2.0"
    assert metadata["Version"] == lora_recycle.__version__ and metadata["Requires-Python"] == ">=3.10"
    assert "lora-recycle = " in scripts and "hf-lora-recycle = " in scripts
    assert "onnx" in metadata.get_all("Provides-Extra")


@pytest.mark.slow
def test_the_sdist_holds_what_is_installed_and_how_to_build_it(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    outside = {name for name in names if not name.startswith("lora_recycle/") and ".egg-info/" not in name}
    assert names & source_files() == source_files()
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.cfg"} <= outside
    assert not {name for name in outside if name.startswith(("tests", "docs", "examples"))}


@pytest.mark.slow
def test_an_installed_package_runs_outside_the_repository(installed):
    folder, python = installed
    for c, colour in enumerate(((200, 30, 30), (30, 30, 200))):
        (folder / "photos" / f"class {c}").mkdir(parents=True)
        for i in range(4):
            noise = np.random.default_rng(4 * c + i).integers(0, 55, (48, 64, 3))
            pixels = (np.array(colour) + noise).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / f"class {c}" / f"{i}.png")
    command = python.parent / "lora-recycle"
    where = run(python, "-c", "import lora_recycle; print(lora_recycle.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(folder)
    assert run(command, "--version", cwd=folder).split() == ["lora-recycle", lora_recycle.__version__]
    assert "evaluate" in run(python.parent / "hf-lora-recycle", "--help", cwd=folder)
    small = ["--data", "photos", "--ways", "2", "--shots", "1", "--queries", "3", "--episodes", "5", "--quiet"]
    table = run(command, "evaluate", "demo", *small, "--no-pool", cwd=folder)  # the shipped backbone and meta-LoRA
    assert re.search(r"meta-lora +photos +2-way 1-shot +\d", table), table


def test_version_licence_and_citation_agree():
    citation = (REPOSITORY / "CITATION.cff").read_text()
    assert f"\nversion: {lora_recycle.__version__}\n" in citation and "\nlicense: Apache-2.0\n" in citation
    assert "Apache License\n                           Version 2.0" in (REPOSITORY / "LICENSE").read_text()
    assert (PACKAGE / "py.typed").is_file()


def test_the_changelog_has_an_entry_for_this_version():
    headings = re.findall(r"^## (\S+)", (REPOSITORY / "docs" / "changelog.md").read_text(encoding="utf-8"), re.M)
    assert lora_recycle.__version__ in headings


def test_make_help_lists_every_target():
    targets = re.search(r"^\.PHONY: (.*)", (REPOSITORY / "Makefile").read_text(), re.M)[1].split()
    done = subprocess.run(["make", "--no-print-directory"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == targets and all(len(line) == 2 for line in lines)


def test_pre_commit_runs_what_make_quality_runs_and_downloads_nothing():
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    tools = [hook["entry"].removeprefix(".venv/bin/").removesuffix(" --fix") for hook in hooks]
    checked = re.search(r"^quality:.*\n((?:\t.*\n)+)", (REPOSITORY / "Makefile").read_text(), re.M)[1]
    commands = re.findall(r"\$\(BIN\)/(\w+(?: check| format)?)", checked)
    assert tools == commands and all(hook["language"] == "system" for hook in hooks)
    ours = re.compile(hooks[0]["files"])
    assert ours.search("lora_recycle/pool/pool.py") and ours.search("docs/hooks.py") and not ours.search("setup.py")


def test_type_checkers_see_what_is_loaded_on_first_use():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == {"__version__": "version", **lora_recycle._LAZY}


def requirements(section: str) -> dict[str, str]:
    """Name to the bound, with its operator, of the requirements in an entry of setup.cfg."""
    return dict(re.match(r"([\w-]+)(.*)", line).groups() for line in requirement_lines(section))


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==([^\s;]+)", (REPOSITORY / name).read_text(), re.M))


def test_lower_bounds_are_the_versions_that_make_lowest_tests():
    bounds = {
        **requirements("install_requires"),
        **requirements("app"),
        **requirements("onnx"),
        **requirements("heic"),
    }
    assert bounds == {name: f">={version}" for name, version in pins("lowest.txt").items()}


def test_what_is_tested_is_allowed():
    required = requirements("install_requires")
    for name, version in pins("constraints.txt").items():
        assert Version(version) >= Version(required.get(name, ">=0").removeprefix(">=")), name
    extras = requirements("test")
    assert all(
        extras[name] == bound for extra in ("app", "onnx", "heic") for name, bound in requirements(extra).items()
    )
