"""Every public name, the help of every verb and its smallest run, in whatever environment runs this file.

    python tests/smoke.py        # a plain install: what needs an extra says which one
    python tests/smoke.py app    # one with the extra [app]: what it is for, and nothing else

It needs nothing but the package and the files beside it, so `make plain` runs it where there is no pytest.
"""

import contextlib
import io
import os
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path


sys.path.append(str(Path(__file__).parent / "local_hub"))

from hub_server import OWNER_TOKEN, HubServer  # noqa: E402


HUB, WORK = HubServer(), tempfile.TemporaryDirectory(prefix="lora-recycle-smoke-")
# before huggingface_hub is imported, which reads them once
os.environ |= {"HF_ENDPOINT": HUB.endpoint, "HF_TOKEN": OWNER_TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": WORK.name}
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}

import lora_recycle  # noqa: E402
from lora_recycle.cli.main import build_parser, main  # noqa: E402
from lora_recycle.hub.embedded import pool_path  # noqa: E402


DEMO = """
invert: {images_per_class: 1, iterations: 1}
distill: {steps: 1, rank: 2, relational_batch: 8, validation_fraction: 0}
"""
BENCHMARK = """
ways: 3
shots: [1]
queries: 2
episodes: 4
tuning_episodes: 2
data: [{path: photos}]
pools: {tiny: {adapters: POOL}}
"""


#: Verbs that were run.
ran: set[str] = set()


def run(arguments: tuple[object, ...]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    ran.add(str(arguments[0]))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([*map(str, arguments), "--quiet"])
    return code, out.getvalue(), err.getvalue()


def succeed(*arguments: object) -> str:
    """stdout of a command that must end well."""
    code, out, err = run(arguments)
    assert code == 0, f"lora-recycle {arguments[0]} ended with {code}: {err}"
    return out


def refuse(extra: str, *arguments: object) -> None:
    """Run a command that must name the extra that it lacks."""
    code, _, err = run(arguments)
    assert code == 1 and f"pip install 'lora-recycle[{extra}]'" in err, err


def load_names() -> None:
    for name in lora_recycle.__all__:
        getattr(lora_recycle, name)


def print_help(verb: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([verb, "--help"])
    assert out.getvalue().startswith(f"usage: lora-recycle {verb} "), out.getvalue()


def draw_photos(folder: Path) -> Path:
    """A folder for each class of the toy images."""
    from helpers_tiny import toy_images
    from PIL import Image

    images = toy_images(classes=4, each=4)
    for i, (pixels, label) in enumerate(zip(images.pixels, images.labels.tolist(), strict=True)):
        path = folder / images.label_names[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return folder


def make_pool(work: Path) -> None:
    from helpers_tiny import save_tiny_backbone

    draw_photos(work / "photos")
    HUB.hub.put("owner/base", save_tiny_backbone(work / "base"))
    sizes = ("--classes", 3, "--epochs", 1, "--rank", 2, "--tasks", 2)
    succeed("train-adapters", work / "photos", "--output", work / "pool", "--base-model", "owner/base", *sizes)


def import_adapter(work: Path) -> None:
    import torch
    from helpers_clip import save_tiny_pair
    from safetensors.torch import save_file

    save_tiny_pair(work / "clip")
    tensors = {f"w_a_{i:03d}": torch.ones(3, 32) for i in range(4)}
    tensors |= {f"w_b_{i:03d}": torch.ones(32, 3) for i in range(4)}
    save_file(tensors | {"fc_24in_5out": torch.ones(5, 24)}, work / "paper.safetensors")
    succeed("import", work / "paper.safetensors", "--base-model", work / "clip", "--output", work / "imported")


def recycle(work: Path) -> None:
    pool, surrogate = work / "pool", work / "surrogate"
    assert "LORA" in succeed("inspect", pool)
    succeed("invert", pool, "--output", surrogate, "--images-per-class", 2, "--iterations", 1)
    distill = ("distill", pool, "--surrogate", surrogate, "--steps", 1, "--rank", 2, "--relational-batch", 8)
    succeed(*distill, "--output", work / "meta")
    for start in ("pissa", "corda"):  # PEFT imports libraries of its own for some
        succeed(*distill, "--output", work / start, "--init", start)
    few = ("--episodes", 4, "--ways", 3, "--shots", 1, "--queries", 2)
    assert "ensemble" in succeed("evaluate", work / "meta", "--data", work / "photos", "--pool", pool, *few)
    (work / "benchmark.yaml").write_text(BENCHMARK.replace("POOL", str(pool)))
    succeed("benchmark", work / "benchmark.yaml", "--data-root", work, "--output", work / "benchmark")
    (work / "demo.yaml").write_text(DEMO)
    assert "digits" in succeed("demo", "--pool", pool, "--recipe", work / "demo.yaml", "--output", work / "demo")


def use_meta_lora(work: Path) -> None:
    meta = work / "meta"
    assert "n0" in succeed("predict", meta, "--support", work / "photos", work / "photos" / "n0")
    for format in ("torch", "transformers"):
        succeed("export", meta, "--format", format, "--output", work / format)
    adapter = next(path for path in sorted((work / "pool").iterdir()) if path.is_dir())
    succeed("extract", adapter, "--rank", 2, "--output", work / "extracted")
    succeed("quantize", meta, "--bits", 8, "--output", work / "small")
    succeed("push", meta, "owner/meta")
    assert "byte-identical" in succeed("reproduce", meta, work / "pool", "--output", work / "again")


def serve_page(work: Path) -> None:
    from lora_recycle.app.page import launch

    page = launch("demo", browser=False)
    try:
        with urllib.request.urlopen(page.local_url) as answer:
            assert answer.status == 200
    finally:
        page.close()


def export_onnx(work: Path) -> None:
    assert "model.onnx" in succeed("export", "demo", "--output", work / "onnx")


def invert_with_cnn(work: Path) -> None:
    adapter = pool_path() / "cifar_fs-05"
    small = ("--images-per-class", 1, "--max-classes", 2, "--iterations", 1)
    succeed("invert", adapter, "--output", work / "images", "--priors", "batch_norm=0.1", *small)


def read_heic(work: Path) -> None:
    import pillow_heif
    from PIL import Image

    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        (work / "heic" / name).mkdir(parents=True)
        pillow_heif.from_pillow(Image.new("RGB", (64, 64), colour)).save(work / "heic" / name / "1.heic")
    assert "red" in succeed("predict", "demo", "--support", work / "heic", work / "heic" / "red")


def search_weights(work: Path) -> None:
    from lora_recycle.finetuning.lorahub import search

    assert search(lambda weights: float((weights - 1).square().sum()), 2, 20, seed=0).mean() > 0.9


EXTRAS: dict[str, Callable[[Path], None]] = {
    "app": serve_page,
    "onnx": export_onnx,
    "cnn": invert_with_cnn,
    "heic": read_heic,
    "lorahub": search_weights,
}


def check_plain(work: Path) -> None:
    assert not find_spec("gradio"), "this environment has extras"  # `app` would serve its page and never end
    verbs = set(build_parser()._subparsers._group_actions[0].choices)
    for verb in verbs:
        print_help(verb)
    make_pool(work)
    import_adapter(work)
    recycle(work)
    use_meta_lora(work)
    refuse("app", "app", "--no-browser")
    (work / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    refuse("heic", "predict", "demo", "--support", work / "photos", work / "photo.heic")
    refuse("onnx", "export", work / "meta", "--output", work / "onnx")
    recipe = work / "benchmark.yaml"
    recipe.write_text(recipe.read_text() + "methods: [lorahub]\n")
    refuse("lorahub", "benchmark", recipe, "--data-root", work, "--output", work / "benchmark")
    refuse("cnn", "invert", work / "pool", "--output", work / "other", "--priors", "batch_norm=0.1")
    assert ran == verbs, f"without a run: {verbs - ran}"


if __name__ == "__main__":
    load_names()
    with WORK as folder:
        for check in [EXTRAS[extra] for extra in sys.argv[1:]] or [check_plain]:
            check(Path(folder))
    assert not HUB.hub.problems, HUB.hub.problems
    print(f"{len(lora_recycle.__all__)} names and {' '.join(sys.argv[1:]) or 'all verbs'}: fine.")
