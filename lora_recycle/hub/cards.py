"""Cards of meta-LoRAs and surrogate data: what they are, where they came from, how to use them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from .licenses import inherited_license
from .markdown import block, code, text
from .repo_files import PICTURE_FILE, expert_folder


TEMPLATES = Path(__file__).with_name("templates")
#: Path in the repo of the table that `datasets.load_dataset` opens.
TABLE_FILE = "data/train.parquet"

_MAX_REPO_ID = 200
_REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
#: The Hub's size categories and their upper ends.
_SIZES = {"n<1K": 10**3, "1K<n<10K": 10**4, "10K<n<100K": 10**5, "100K<n<1M": 10**6, "1M<n<10M": 10**7}
_SIZES |= {"10M<n<100M": 10**8, "100M<n<1B": 10**9, "1B<n<10B": 10**10}


def is_repo_id(name: str | None) -> bool:
    """Whether `name` can be a repo on the Hub: no folder of this machine, and of the right form."""
    plausible = isinstance(name, str) and len(name) <= _MAX_REPO_ID and _REPO_ID.fullmatch(name)
    return bool(plausible) and not Path(str(name)).is_dir()


def usage_lines(name: str) -> str:
    """The Python lines that use a meta-LoRA."""
    return "\n".join(
        (
            "from lora_recycle import MetaLoRAForFewShotClassification",
            "",
            f"model = MetaLoRAForFewShotClassification.from_pretrained({_quoted(name)})",
            'model.fit(["cat1.jpg", "cat2.jpg", "dog1.jpg", "dog2.jpg"], ["cat", "cat", "dog", "dog"])',
            'print(model.predict(["new.jpg"]))',
        )
    )


#: What `meta_lora_card` raises of a sidecar that lacks what a card tells, as a stranger's may.
NO_CARD = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)


def meta_lora_card(
    name: str,
    base_model: str | None,
    base_revision: str | None,
    rank: int | None,
    settings: dict[str, Any],
    picture: bool = False,
    bits: int | None = None,
) -> str:
    """The README.md of a meta-LoRA.

    Args:
        name (`str`): repo id or folder name.
        settings (`dict`): the sidecar. The card reads `sources`, `distillation`, `judged`, `inversion`,
            `versions`, `domains`, `num_classes` of a fitted task and, if it was evaluated, `results` (rows of
            `evaluation.results.summarise`).
        picture (`bool`): whether `PICTURE_FILE` is beside it.
        bits (`int`, *optional*): bits per weight, if they are coded and so not a plain PEFT adapter.
    """
    sources, results = settings.get("sources") or [], settings.get("results") or []
    distillation, inversion = settings.get("distillation"), settings.get("inversion")
    judged, experts = settings.get("judged") or {}, (settings.get("domains") or {}).get("experts") or []
    kept, blend = judged.get("best_step"), judged.get("best_blend") or [1.0, 0.0]  # None: the last step
    fields, license_note = inherited_license([source.get("license") for source in sources])
    header = ModelCardData(
        library_name="peft",
        base_model=base_model if is_repo_id(base_model) else None,  # the Hub refuses what is no repo id
        base_model_relation="adapter",
        pipeline_tag="image-feature-extraction",  # a pipeline without a head that was never trained
        tags=["lora", "meta-lora", "few-shot", "lora-recycle"],
        model_name=name.split("/")[-1],
        eval_results=[_eval_result(row) for row in results if row["method"] == "meta-lora"] or None,
        **fields,
    )
    if not header.eval_results:
        header.pop("model_name")
    card = ModelCard.from_template(
        header,
        str(TEMPLATES / "meta_lora.md"),
        name=name,
        rank=rank,
        bits=bits,
        base=base_model,
        base_revision=base_revision,
        version=(settings.get("versions") or {}).get("lora_recycle", "(unknown version)"),
        origin=_origin(distillation, inversion, kept, blend) if distillation else None,
        trained=bool(distillation and distillation["steps"] and inversion and kept != 0),
        classes=settings.get("num_classes"),
        usage=block(usage_lines(name), "python"),
        picture=PICTURE_FILE if picture else None,
        results=[_result_row(row) for row in results],
        domains=[_domain_row(number, row) for number, row in enumerate(experts, 1)],
        sources=[_source_row(source) for source in sources],
        license_note=license_note,
        recipe=_yaml({k: v for k, v in (("invert", inversion), ("distill", distillation)) if v}),
        text=text,
        code=code,
    )
    return str(card)


def surrogate_card(name: str, manifest: dict[str, Any], picture: bool = False) -> str:
    """The README.md of surrogate data, whose header leads `datasets.load_dataset` to `TABLE_FILE` alone."""
    entries, base = manifest["shards"], manifest.get("backbone") or {}
    count = sum(entry["num_images"] for entry in entries)
    fields, license_note = inherited_license([entry["adapter"].get("license") for entry in entries])
    header = DatasetCardData(
        pretty_name=name.split("/")[-1],
        task_categories=["image-classification"],
        size_categories=[next(size for size, limit in _SIZES.items() if count < limit)],
        tags=["lora-recycle", "surrogate", "synthetic"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": TABLE_FILE}]}],
        **fields,
    )
    known, commit = is_repo_id(base.get("name")), base.get("revision")
    at = f" at commit {code(commit)}" if commit else ""
    card = DatasetCard.from_template(
        header,
        str(TEMPLATES / "surrogate.md"),
        name=name,
        num_images=count,
        base=f"{code(base['name'])}{at}" if known else "a backbone that has no name on the Hub",
        version=manifest.get("lora_recycle_version", "(unknown version)"),
        origin=_starting_images(manifest.get("config") or {}),
        usage=block(_surrogate_usage(name), "python"),
        picture=PICTURE_FILE if picture else None,
        sources=[_source_row(e["adapter"]) + _shard_cells(e) for e in entries],
        license_note=license_note,
        recipe=_yaml({"invert": manifest.get("config") or {}}),
        text=text,
        code=code,
    )
    return str(card)


def _surrogate_usage(name: str) -> str:
    repo = _quoted(name)
    return "\n".join(
        (
            "from datasets import load_dataset",
            "from lora_recycle import SurrogateDataset",
            "",
            f'images = load_dataset({repo}, split="train")  # image, label, adapter',
            f"surrogate = SurrogateDataset.from_pretrained({repo})  # with the outputs of the teachers",
        )
    )


def adapter_card(
    name: str,
    base_model: str,
    data_name: str,
    labels: Sequence[str],
    *,
    peft_type: str,
    rank: int,
    targets: str,
    accuracy: float,
    frozen_accuracy: float,
) -> str:
    """The README.md of an adapter with a head; `id2label` in its header is where the class names survive.

    Args:
        accuracy: on held-out images of its classes, per cent.
        frozen_accuracy: of prototypes on the frozen backbone, per cent.
    """
    header = ModelCardData(
        library_name="peft",
        base_model=base_model,
        pipeline_tag="image-classification",
        tags=["lora", "image-classification"],
        id2label=dict(enumerate(labels)),
    )
    card = ModelCard.from_template(
        header,
        str(TEMPLATES / "adapter.md"),
        name=name,
        base=base_model,
        data=data_name,
        classes=len(labels),
        peft_type=peft_type,
        rank=rank,
        targets=targets,
        accuracy=accuracy,
        frozen=frozen_accuracy,
        code=code,
        text=text,
    )
    return str(card)


def extracted_card(
    name: str,
    base_model: str,
    checkpoint: str,
    labels: Sequence[str],
    *,
    rank: int,
    energy: float,
    license: str | None,
) -> str:
    """The README.md of an adapter that was extracted from a whole checkpoint.

    Args:
        energy: share of the squared change of the layers' weights that the adapter holds.
        license: what the checkpoint's card states.
    """
    header = ModelCardData(
        library_name="peft",
        base_model=base_model,
        pipeline_tag="image-classification",
        tags=["lora", "image-classification"],
        id2label=dict(enumerate(labels)) or None,
        **inherited_license([license])[0],
    )
    values: dict[str, Any] = {
        "name": name,
        "base": base_model,
        "checkpoint": checkpoint,
        "rank": rank,
        "energy": 100 * energy,
    }
    template = str(TEMPLATES / "extracted.md")
    return str(ModelCard.from_template(header, template, **values, code=code, text=text))


def _origin(
    distillation: dict[str, Any], inversion: dict[str, Any] | None, kept: int | None, blend: list[float]
) -> str:
    average = "the average of their weight changes, truncated to its rank"
    starts = {"average": average, "undiluted": f"{average} and scaled until their largest group has full strength"}
    starts["restored"] = f"{average}, with their largest group at full strength"
    starts |= {"group-sum": "the sum of the averages of their groups, truncated to its rank", "zero": "zero"}
    init = distillation["init"]
    start = f"It started from {starts.get(init) or f'principal directions of the base weights ({text(init)})'}"
    if not distillation["steps"] or not inversion:
        return f"{start}, and was not trained."
    learnt, rest = blend
    if kept == 0:
        stayed = "was kept as it was" if learnt or rest else "was reset to the plain average"
        return (
            f"{start}, and {stayed}: {text(distillation['steps'])} steps on surrogate images did not make it "
            "significantly better on the classes of the validation adapters."
        )
    steps = text(f"{kept} of {distillation['steps']}" if kept else distillation["steps"])
    images = ", ".join(text(name) for name, share in inversion["starts"].items() if share > 0)
    blended = ""
    if learnt < 1:
        blended = f" Its change is {learnt:.0%} of the distilled one plus {rest:.0%} of the start."
    return (
        f"{start}, and was distilled for {steps} steps on surrogate images, which were optimised with the "
        f"adapters and their heads from these starting images: {images}.{blended}"
    )


def _starting_images(config: dict[str, Any]) -> str:
    names = ", ".join(text(name) for name, share in (config.get("starts") or {}).items() if share > 0)
    steps = f" in {text(config['iterations'])} steps" if "iterations" in config else ""
    return f"they were optimised{steps}" + (f" from starting images ({names})" if names else "")


def _eval_result(row: dict[str, Any]) -> EvalResult:
    task = _task(row)
    return EvalResult(
        task_type="image-classification",
        task_name="few-shot image classification",
        dataset_type=row["data"],
        dataset_name=row["data"],
        metric_type="accuracy",
        metric_name=f"accuracy, per cent, {task}",
        metric_value=round(row["accuracy"], 2),
        metric_args={"ci95": round(row["ci95"], 2), "episodes": row["episodes"]},
    )


def _task(row: dict[str, Any]) -> str:
    return f"{row['ways']}-way {row['shots']}-shot"


def _result_row(row: dict[str, Any]) -> list[str]:
    accuracy = f"{row['accuracy']:.2f} ± {row['ci95']:.2f}"
    delta = f"{row['delta_vs_frozen']:+.2f} ± {row['delta_ci95']:.2f}" if row["method"] != "frozen" else "-"
    return [*map(text, (row["method"], row["data"], _task(row), row["episodes"])), accuracy, delta]


def _domain_row(number: int, expert: dict[str, Any]) -> list[str]:
    """Name, adapters, and folder of one expert."""
    adapters = ", ".join(text(adapter["name"]) for adapter in expert["adapters"])
    use = "only compared with" if expert["role"] == "compared" else "yes"
    return [text(expert["name"]), adapters, use, code(expert_folder(number))]


def _source_row(source: dict[str, Any]) -> list[str]:
    """Name, type, commit, licence and checksum of one source adapter."""
    name, revision = source["name"], source.get("revision")
    known = revision and is_repo_id(name)
    shown = text(name)
    if known:
        shown = f"[{shown}](https://huggingface.co/{name}/tree/{quote(str(revision), safe='')})"
    commit = code(revision) if revision else "local folder"
    return [shown, text(source.get("peft_type")), commit, text(source.get("license")), code(source["sha256"])]


def _shard_cells(entry: dict[str, Any]) -> list[str]:
    classes = entry["adapter"].get("num_classes")
    return [text(classes), text(entry["num_images"]), f"{entry['accuracy']:.2f}", f"{entry['confidence']:.2f}"]


def _quoted(name: str) -> str:
    """The name as a Python string in the quotes that everybody writes."""
    return json.dumps(name, ensure_ascii=False)


def _yaml(values: dict[str, Any]) -> str:
    return block(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip(), "yaml")
