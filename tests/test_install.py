"""The package where only its own requirements are, and with each extra alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_install import REPOSITORY, installed_by, link_libraries, requirement_lines


def test_an_installation_brings_what_requirements_ask_for_in_turn_and_no_extra():
    names = {d.metadata["Name"].lower() for d in installed_by(requirement_lines("install_requires"))}
    assert {"torch", "sympy", "attrs"} <= names
    assert not {"pytest", "gradio", "onnx", "ruff", "torchvision", "aiohttp"} & names
    with_page = {d.metadata["Name"].lower() for d in installed_by(requirement_lines("app"))}
    assert {"gradio", "fastapi", "pydub"} <= with_page and "torch" not in with_page


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "app", "cnn", "onnx"])
def test_every_name_and_verb_needs_only_what_is_installed_with_it(extra, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    where = subprocess.run([python, "-c", "import site; print(*site.getsitepackages())"], capture_output=True, text=True)
    site = Path(where.stdout.strip())
    link_libraries(site, [extra] if extra else [])
    (site / "package.pth").write_text(str(REPOSITORY))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    done = subprocess.run(
        [python, REPOSITORY / "tests" / "smoke.py", *filter(None, [extra])],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("names and all verbs: fine.\n" if not extra else f"names and {extra}: fine.\n")
