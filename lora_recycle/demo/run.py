"""The demo: pool -> surrogate images -> meta-LoRA -> accuracy on real images, with a report page."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..distillation.checkpoints import OUTPUT as CHECKPOINTS
from ..distillation.config import DistillationConfig
from ..distillation.saving import save_meta_lora
from ..distillation.trainer import MetaLoRATrainer
from ..errors import ConfigError
from ..evaluation.config import EvaluationConfig
from ..evaluation.evaluate import evaluate
from ..hub.cards import usage_lines
from ..hub.embedded import pool_path
from ..images.labelled import LabelledImages, load_labelled_images
from ..inversion.config import InversionConfig
from ..inversion.inverter import LoRAInverter
from ..modeling.serialization import OUTPUT as META_LORA
from ..pool.pool import AdapterPool
from ..reports.training_report import write_training_report
from ..runtime.config import read_yaml
from ..runtime.files import atomic_write
from ..runtime.outputs import OutputKind, check_output, claim_output, holds_json
from ..surrogate.dataset import Shard, SurrogateDataset


RECIPE = Path(__file__).with_name("recipe.yaml")
IMAGES_PER_CLASS = 40  # of the real data sets that it is judged on

#: What the demo writes to a folder.
OUTPUT = OutputKind("results of the demo", lambda folder: holds_json(folder / "results.json", "rows"))
_BATCH = 64  # images in a forward: tokens of more are so large that their memory is mapped anew in each layer
_MARKER = "demo.json"  # says that a folder of checkpoints is the demo's own, and of which settings


@dataclasses.dataclass
class DemoResult:
    """`rows` and `notes` of the evaluation, where things lie, and the Python lines that use the meta-LoRA."""

    rows: list[dict[str, Any]]
    notes: list[str]
    meta_lora: Path
    report: Path
    usage: str


def run_demo(
    output: str | Path = "runs/demo",
    *,
    data: Sequence[str | Path] = (),
    recipe: str | Path | None = None,
    pool: str | Path | None = None,
    episodes: int = 600,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> DemoResult:
    """Recycle a pool into a meta-LoRA and judge it on handwritten digits and on `data`.

    Writes `surrogate/`, `meta_lora/`, `features/`, `results.json` and `report.html` into `output`. Run again with the
    same settings it keeps what is finished.

    Args:
        data: more real images, anything that [`load_labelled_images`] reads.
        recipe: YAML file with the sections `invert` and `distill`; the demo's own by default.
        pool: folder of adapters; the embedded ones by default.

    Raises:
        ConfigError: a recipe with an unknown section or key.
        LoRARecycleError: adapters or images that cannot be used, or an output folder that holds something else.
    """
    output = Path(output)
    check_output(output, OUTPUT)
    inversion, distillation = read_recipe(recipe or RECIPE)
    adapters = AdapterPool.from_pretrained(pool or pool_path(), device=device, progress=progress)
    if pool is None:  # the shipped ones fit into memory, and a dozen passes over them follow
        adapters = AdapterPool(adapters.backbone, list(adapters))
    sets = _real_images(data, adapters)  # read first: a wrong path is found before the work is done
    claim_output(output, OUTPUT)
    surrogate, inversion_losses = _invert(adapters, inversion, output, progress)
    trainer = MetaLoRATrainer(adapters, surrogate, distillation)
    meta_lora = output / "meta_lora"
    claim_output(meta_lora, META_LORA)
    _train(trainer, meta_lora / "work", progress)
    model = trainer.to_model()
    save_meta_lora(model, meta_lora)
    config = EvaluationConfig(episodes=episodes, batch_size=_BATCH)
    stored = output / "features"  # a second run forwards nothing
    results = [evaluate(i, model, config, pool=adapters, features_dir=stored, progress=progress) for i in sets]
    rows, notes = [row for r in results for row in r.rows], [text for r in results for text in r.notes]
    model.settings["results"] = rows
    save_meta_lora(model, meta_lora)
    atomic_write(output / "results.json", json.dumps({"rows": rows}, indent=1, allow_nan=False).encode())
    curves = {f"inversion, mean of {len(adapters)} adapters": inversion_losses}
    report = write_training_report(
        output / "report.html", trainer, model.settings, meta_lora, rows=rows, curves=curves
    )
    return DemoResult(rows, notes, meta_lora, report, usage_lines(str(meta_lora)))


def read_recipe(path: str | Path) -> tuple[InversionConfig, DistillationConfig]:
    """Both configs of a file with the sections `invert` and `distill`. Raises `ConfigError` for anything else."""
    values = read_yaml(path)
    unknown = sorted(str(key) for key in set(values) - {"invert", "distill"})
    if unknown:
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}. The demo's sections are invert and distill.")
    sections = [values.get(name) or {} for name in ("invert", "distill")]
    if not all(isinstance(section, dict) for section in sections):
        raise ConfigError(f"{path}: the sections invert and distill must be mappings of settings.")
    return (
        InversionConfig.from_dict(sections[0], where=f"{path}, section invert"),
        DistillationConfig.from_dict(sections[1], where=f"{path}, section distill"),
    )


def load_digits_images(size: int, resample: int = 3, max_per_class: int = IMAGES_PER_CLASS) -> LabelledImages:
    """scikit-learn's handwritten digits as RGB images: the first `max_per_class` of each of the ten classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()  # 8x8, grey levels 0 to 16
    chosen = np.concatenate([np.flatnonzero(digits.target == digit)[:max_per_class] for digit in range(10)])
    grey = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
    pictures = [np.asarray(Image.fromarray(g).convert("RGB").resize((size, size), resample)) for g in grey]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return LabelledImages(pixels, torch.from_numpy(digits.target[chosen]).long(), list("0123456789"), "digits")


def _real_images(data: Sequence[str | Path], pool: AdapterPool) -> list[LabelledImages]:
    size, resample = pool.backbone.image_size, int(pool.backbone.processor.resample)
    more = [load_labelled_images(path, size, resample, max_per_class=IMAGES_PER_CLASS) for path in data]
    return [load_digits_images(size), *more]


def _invert(
    pool: AdapterPool, config: InversionConfig, output: Path, progress: bool
) -> tuple[SurrogateDataset, list[float]]:
    """The surrogate data and the mean loss of each iteration, which is stored beside the shards for the next run."""
    inverter, path = LoRAInverter(pool, config), output / "surrogate" / "losses.json"
    curves: dict[str, list[float]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def remember(name: str, _: Shard) -> None:
        curves[name] = inverter.losses
        atomic_write(path, json.dumps(curves, allow_nan=False).encode())

    folder, resume = output / "surrogate", True
    try:
        inverter.check_folder(folder)
    except ConfigError:  # the demo's own, of other settings
        resume = False
    surrogate = inverter.run(folder, progress=progress, on_shard=remember, resume=resume)
    names = [Path(entry["file"]).name for entry in surrogate.manifest["shards"]]
    known = [curves[name] for name in names if len(curves.get(name, ())) == config.iterations]
    return surrogate, [sum(values) / len(known) for values in zip(*known, strict=True)]


def _train(trainer: MetaLoRATrainer, work: Path, progress: bool) -> None:
    """Train, going on from the demo's checkpoint of the same settings and throwing away one of other settings."""
    parts = [trainer.config.to_dict(), [info.sha256 for info in trainer.pool.infos]]
    parts.append([entry["sha256"] for entry in trainer.surrogate.manifest["shards"]])
    identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    marker = work / _MARKER
    # the marker says that the demo trained here; checkpoints of another training stay
    stale = marker.is_file() and marker.read_text(encoding="utf-8") != identity
    if stale or not work.exists():
        claim_output(work, CHECKPOINTS)
        atomic_write(marker, identity.encode())
    trainer.train(work, progress=progress, resume=not stale)
