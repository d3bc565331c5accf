"""The package where only its own requirements are, and with each extra alone."""

import os
import subprocess

import pytest
from helpers_install import REPOSITORY, installed_by, make_environment, requirement_lines


def test_an_installation_brings_what_requirements_ask_for_in_turn_and_no_extra():
    names = {d.metadata["Name"].lower() for d in installed_by(requirement_lines("install_requires"))}
    assert {"torch", "sympy", "attrs"} <= names
    assert not {"pytest", "gradio", "onnx", "ruff", "torchvision", "aiohttp"} & names
    with_page = {d.metadata["Name"].lower() for d in installed_by(requirement_lines("app"))}
    assert {"gradio", "fastapi", "pydub"} <= with_page and "torch" not in with_page


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "app", "cnn", "heic", "onnx"])
def test_every_name_and_verb_needs_only_what_is_installed_with_it(extra, tmp_path):
    extras = [extra] if extra else []
    python = make_environment(tmp_path / "venv", extras)
    outer = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    done = subprocess.run(
        [python, REPOSITORY / "tests" / "smoke.py", *extras],
        cwd=tmp_path,
        env={**outer, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f" names and {extra or 'all verbs'}: fine.\n")
