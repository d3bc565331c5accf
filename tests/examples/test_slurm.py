"""`examples/slurm.sh` with stand-ins for SLURM and accelerate: what would be started on which node."""

import os
import subprocess
from pathlib import Path


SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sh"
STAND_INS = {
    "scontrol": 'printf "gpu07\\ngpu08\\n"',
    "srun": 'shift; for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@"; done',
    "accelerate": 'printf "%s|" "$@"; echo',
}


def submit(folder, nodes, gpus, *arguments):
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    job = {
        "SLURM_NNODES": nodes,
        "SLURM_GPUS_ON_NODE": gpus,
        "SLURM_JOB_ID": "71234",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
    }
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        [SCRIPT, *arguments], env=os.environ | {"PATH": path, **job}, capture_output=True, text=True, check=True
    )
    return [line.rstrip("|").split("|") for line in ran.stdout.splitlines()]


def test_each_node_starts_one_launch_of_all(tmp_path):
    launches = submit(tmp_path, "2", "4", "invert", "my pool", "--output", "surrogate")
    assert [words[words.index("--machine_rank") + 1] for words in launches] == ["0", "1"]
    for words in launches:
        options = dict(zip(words[2::2], words[3::2], strict=False))
        assert words[:2] == ["launch", "--multi_gpu"] and options["--num_processes"] == "8"
        assert options["--main_process_ip"] == "gpu07" and options["--main_process_port"] == "21234"
        assert words[-6:] == ["-m", "lora_recycle", "invert", "my pool", "--output", "surrogate"]


def test_one_gpu_is_one_process(tmp_path):
    ((launch, first, *_),) = submit(tmp_path, "1", "1", "distill", "pool")
    assert launch == "launch" and first == "--num_machines"
