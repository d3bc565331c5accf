"""Several processes on a pool and on surrogate data of a stranger: all of them refuse it, or all leave it out."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_surrogate import replace_shard
from safetensors.torch import load_file, save_file

from lora_recycle import InversionConfig, LoRAInverter


pytestmark = pytest.mark.slow

LAUNCHED = Path(__file__).with_name("launched.py")
WEIGHTS = "adapter_model.safetensors"
INVERT = ["--images-per-class", "6", "--iterations", "5", "--keep-ratio", "0.5", "--jitter", "0", "--quiet"]


@pytest.fixture(scope="module")
def inverted(tmp_path_factory, tiny_pool):
    """What one process makes of the sound adapters."""
    config = InversionConfig(images_per_class=6, iterations=5, keep_ratio=0.5, jitter=0)
    return LoRAInverter(tiny_pool, config).run(tmp_path_factory.mktemp("inverted"), progress=False)


@pytest.fixture(scope="module")
def launches(tmp_path_factory, tiny_pool_path, tiny_surrogate):
    """Launches of two processes: name to (exit code, all that they said, folder)."""
    work = tmp_path_factory.mktemp("hostile")
    pool = shutil.copytree(tiny_pool_path, work / "pool")
    for name in ("adapter-4", "adapter-5"):
        shutil.copytree(pool / "adapter-0", pool / name)
    (pool / "adapter-4" / WEIGHTS).write_bytes((2**40).to_bytes(8, "little") + b"{}")
    tensors = load_file(pool / "adapter-5" / WEIGHTS)
    save_file({key: value * float("nan") for key, value in tensors.items()}, pool / "adapter-5" / WEIGHTS)
    surrogate = shutil.copytree(tiny_surrogate.folder, work / "surrogate")
    replace_shard(surrogate, 1, lambda shard: shard.kept_tokens.fill_(99))
    distill = ["distill", tiny_pool_path, "--surrogate", surrogate, "--steps", "2", "--quiet"]
    commands = {
        "raise": ["invert", pool, *INVERT],
        "skip": ["invert", pool, *INVERT, "--on-error", "skip"],
        "distill": distill,
    }
    scenarios = []
    for name, command in commands.items():
        command = [str(word) for word in (*command, "--output", work / name)]
        scenarios.append({"processes": 2, "commands": [command], "log": str(work / f"{name}.log")})
    environment = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "LORA_RECYCLE_TIMEOUT": "60"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    ran = subprocess.run(
        [sys.executable, str(LAUNCHED), "--fork", json.dumps(scenarios)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )
    codes = json.loads(ran.stdout)
    return {n: (c, (work / f"{n}.log").read_text(), work / n) for n, c in zip(commands, codes, strict=True)}


def test_all_refuse_a_damaged_adapter(launches):
    code, said, folder = launches["raise"]
    assert code == 1 and "adapter-4: adapter_model.safetensors is truncated or damaged" in said
    assert "Traceback" not in said and not list(folder.rglob("*.safetensors"))


def test_all_leave_out_the_same_adapters(launches, inverted):
    code, said, folder = launches["skip"]
    assert code == 0, said
    assert said.count("2 of 6 adapters skipped") == 1 and "Traceback" not in said
    for entry in inverted.manifest["shards"]:
        assert (folder / entry["file"]).read_bytes() == (inverted.folder / entry["file"]).read_bytes()


def test_all_refuse_masks_of_patches_that_are_not_there(launches):
    code, said, folder = launches["distill"]
    assert code == 1 and "kept_tokens names patch 99" in said and "Traceback" not in said
    assert not list(folder.rglob("*.safetensors"))
