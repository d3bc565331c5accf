"""Run by `test_characters.py` under a locale of ASCII: the verbs on folders and files with any names.

python tests/cli/helpers_characters.py FOLDER
"""

import os
import shutil
import sys
from pathlib import Path

from PIL import Image

from lora_recycle.cli.main import main
from lora_recycle.hub.embedded import pool_path


def prepare(root: Path) -> tuple[Path, Path]:
    """Two adapters and a folder of examples whose names are no ASCII, and those of the images no UTF-8."""
    pool, examples = root / os.fsdecode("pool-é".encode()), root / os.fsdecode("examples-é".encode())
    for source in sorted(path for path in pool_path().iterdir() if path.is_dir())[:2]:
        shutil.copytree(source, pool / os.fsdecode(f"{source.name}-é€".encode()))
    for name, colour in (("été€".encode(), "red"), (b"hi\xe9ver", "blue")):
        folder = examples / os.fsdecode(name)
        folder.mkdir(parents=True)
        for i in range(3):
            with open(folder / os.fsdecode(b"\xff%d.png" % i), "wb") as file:
                Image.new("RGB", (16 + i, 16), colour).save(file, "PNG")
    return pool, examples


def run(root: Path) -> int:
    pool, examples = prepare(root)
    out = root / os.fsdecode("out-é".encode())
    small = ["--iterations", "1", "--images-per-class", "2", "--max-classes", "2"]
    tasks = ["--ways", "2", "--shots", "1", "--queries", "1", "--episodes", "2"]
    for verb in (
        ["inspect", pool],
        ["predict", "demo", "--support", examples, examples],
        ["predict", "demo", "--support", examples, examples, "--csv"],
        ["invert", pool, "--output", out / "surrogate", *small],
        ["inspect", out / "surrogate", "--images"],
        ["distill", pool, "--surrogate", out / "surrogate", "--output", out / "meta", "--steps", "1"],
        ["evaluate", out / "meta", "--data", examples, *tasks, "--json", out / "results.json"],
        ["export", out / "meta", "--output", out / "exported", "--format", "torch"],
    ):
        if main([str(word) for word in verb]):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
