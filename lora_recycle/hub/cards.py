"""The card of a meta-LoRA: what it is, where it came from, how to use it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml


_META_LORA = Template("""---
$header
---

# $name

A meta-LoRA: one LoRA (rank $rank) for `$base`$base_revision, recycled from $count adapters with
lora-recycle $version. It classifies a new task from a few labelled images in one forward pass, without tuning.
$origin

## Use

```python
$usage
```

It is a plain PEFT adapter too: `PeftModel.from_pretrained(base, "$name")` gives the features.
$results
## Sources

| adapter | type | commit | SHA-256 |
|---|---|---|---|
$sources

## Recipe

```yaml
$recipe
```
""")


def usage_lines(name: str) -> str:
    """The Python lines that use a meta-LoRA."""
    return "\n".join(
        (
            "from lora_recycle import MetaLoRAForFewShotClassification",
            "",
            f'model = MetaLoRAForFewShotClassification.from_pretrained("{name}")',
            'model.fit(["cat1.jpg", "cat2.jpg", "dog1.jpg", "dog2.jpg"], ["cat", "cat", "dog", "dog"])',
            'print(model.predict(["new.jpg"]))',
        )
    )


def meta_lora_card(name: str, base_model: str, base_revision: str | None, rank: int, settings: dict[str, Any]) -> str:
    """The README.md of a meta-LoRA.

    Args:
        name (`str`): repo id or folder name.
        settings (`dict`): the sidecar: `sources`, `distillation`, `inversion` (None without surrogate data),
            `versions` and, where it was judged, `results` (rows of `evaluation.protocol.summarise`).
    """
    distillation, inversion = settings["distillation"], settings.get("inversion")
    recipe = {"invert": inversion, "distill": distillation} if inversion else {"distill": distillation}
    return _META_LORA.substitute(
        header=_yaml(_header(base_model)),
        name=name,
        rank=rank,
        base=base_model,
        base_revision=f" at commit `{base_revision}`" if base_revision else "",
        count=len(settings["sources"]),
        version=settings["versions"]["lora_recycle"],
        origin=_origin(distillation, inversion),
        usage=usage_lines(name),
        results=_results(settings.get("results") or ()),
        sources="\n".join(_source_row(source) for source in settings["sources"]),
        recipe=_yaml(recipe),
    )


def _origin(distillation: dict[str, Any], inversion: dict[str, Any] | None) -> str:
    average = "the average of their weight changes, cut to its rank"
    start = f"It started from {average}" if distillation["init"] == "average" else "It started from zero"
    if not distillation["steps"] or not inversion:
        return f"{start} and was not trained."
    images = ", ".join(name for name, share in inversion["starts"].items() if share > 0)
    return (
        f"{start} and learned in {distillation['steps']} steps from surrogate images, which were optimised with the "
        f"adapters and their heads out of these starting images: {images}."
    )


def _header(base_model: str) -> dict[str, Any]:
    header = {
        "library_name": "peft",
        "base_model": base_model,
        "pipeline_tag": "image-classification",
        "tags": ["lora", "meta-lora", "few-shot", "lora-recycle"],
    }
    if Path(base_model).is_dir():  # the Hub refuses a card whose base model is no repo id
        del header["base_model"]
    return header


def _source_row(source: dict[str, Any]) -> str:
    commit = f"`{source['revision']}`" if source.get("revision") else "local folder"
    return f"| {source['name']} | {source['peft_type']} | {commit} | `{source['sha256']}` |"


def _results(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = ["", "## Results", "", "Per cent, with 95 % intervals; differences are paired.", ""]
    lines += ["| method | data | task | episodes | accuracy | against frozen |", "|---|---|---|---|---|---|"]
    for row in rows:
        task, accuracy = f"{row['ways']}-way {row['shots']}-shot", f"{row['accuracy']:.2f} ± {row['ci95']:.2f}"
        delta = f"{row['delta_vs_frozen']:+.2f} ± {row['delta_ci95']:.2f}" if row["method"] != "frozen" else "-"
        lines.append(f"| {row['method']} | {row['data']} | {task} | {row['episodes']} | {accuracy} | {delta} |")
    return "\n".join(lines) + "\n"


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()
