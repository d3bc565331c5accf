"""What was tuned in a whole checkpoint, as a plain PEFT adapter of a low rank with its head."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from ..adapters.adapter import Adapter, Factors
from ..adapters.low_rank import decompose
from ..adapters.peft_wrap import wrap
from ..adapters.trainable import linear_layers, start_lora
from ..backbones.backbone import Backbone
from ..backbones.base_models import BaseModel
from ..errors import AdapterError, ConfigError, DataError
from ..hub.cards import extracted_card
from ..hub.embedded import backbone_name
from ..hub.repo_files import CARD_FILE
from ..images.labelled import LabelledImages, load_labelled_images
from ..runtime.files import creating_folder
from ..runtime.outputs import check_output
from .pool import AdapterPool
from .training import load_classifier


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What [`extract`] wrote.

    Args:
        folder (`Path`): the PEFT adapter.
        rank (`int`): of every layer, less where a layer is narrower.
        energy (`float`): share of the squared change of the layers' weights that the rank holds.
        left_out (`float`): share of the whole squared change that no LoRA holds: norms, biases, embeddings.
        accuracy (`tuple[float, float]`, *optional*): of the checkpoint and of the adapter on `data`, per cent.
    """

    folder: Path
    rank: int
    energy: float
    left_out: float
    accuracy: tuple[float, float] | None = None


def extract(
    checkpoint: str | Path,
    output: str | Path,
    rank: int | None = 16,
    *,
    energy: float | None = None,
    base_model: str | Path | None = None,
    base_revision: str | None = None,
    data: str | Path | LabelledImages | None = None,
    device: torch.device | str | None = None,
    **hub: Any,
) -> Extraction:
    """Write what was tuned in a checkpoint as a plain LoRA with the checkpoint's head: a truncated SVD of each layer.

    That is the best approximation of its rank (Eckart and Young, 1936). PEFT loads the folder.

    Args:
        checkpoint (`str` or `Path`): a folder or repo id; an adapter that changes weights (LoHa, DoRA) works too.
        output (`str` or `Path`): a new or empty folder.
        rank (`int`, *optional*, defaults to 16): of the LoRA.
        energy (`float`, *optional*): in place of `rank`: the lowest rank that holds this share of the squared change.
        base_model (`str` or `Path`, *optional*): with `base_revision`, where the checkpoint names no base model.
        data (*optional*): labelled images of the checkpoint's classes, to compare the accuracies on.
        hub: `token`, `cache_dir` and `local_files_only`.

    Raises:
        AdapterError: the checkpoint cannot be used, see [`AdapterPool.from_pretrained`], or it changes no layer.
        ConfigError: `rank` or `energy` is out of its bounds.
        DataError: `data` shows other classes than the checkpoint's.
        StorageError: `output` is there and not empty, or cannot be written.
    """
    _check(rank, energy)
    check_output(Path(output))
    pool = AdapterPool.from_pretrained(checkpoint, base_model, base_revision=base_revision, device=device, **hub)
    if len(pool) > 1:
        raise AdapterError(f"{checkpoint}: holds {len(pool)} adapters ({pool.infos[0].name}, ...). Name one of them.")
    adapter, backbone = pool[0], pool.backbone
    images = None if data is None else _images(data, adapter, backbone)
    factors = {name: decompose(*adapter.factors[name]) for name in linear_layers(backbone) if name in adapter.factors}
    held = {name: _squares(*pair) for name, pair in factors.items()}
    whole = torch.stack([torch.cat([s, s.new_zeros(_longest(held) - len(s))]) for s in held.values()]).sum(0)
    if not held or not whole.sum() > 0:
        raise AdapterError(f"{adapter.info.where}: changes no linear layer of {backbone.name}; nothing to extract.")
    shares = whole.cumsum(0) / whole.sum()
    if energy is not None:
        rank = int((shares < energy - 1e-6).sum()) + 1
    rank = min(rank or 1, len(shares))
    kept = {name: (b[:, :rank], a[:rank]) for name, (b, a) in factors.items()}
    base = BaseModel.pull(backbone.name, backbone.revision, **hub)
    rest = sum(change.double().square().sum().item() for change in _others(adapter, factors))
    result = Extraction(Path(output), rank, shares[rank - 1].item(), rest / (rest + whole.sum().item()))
    with creating_folder(Path(output)) as new:
        _save(new, base, backbone, adapter, kept, rank)
        (new / CARD_FILE).write_text(_card(result, adapter, backbone), encoding="utf-8")
    if images is None:
        return result
    small = AdapterPool.from_pretrained(output, backbone=backbone)
    return dataclasses.replace(result, accuracy=(_accuracy(pool, images), _accuracy(small, images)))


def _check(rank: int | None, energy: float | None) -> None:
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy must be in (0, 1], got {energy}: the share of the squared change that is kept.")
    if energy is None and (rank is None or rank < 1):
        raise ConfigError(f"rank must be at least 1, got {rank}")


def _squares(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The squared singular values of B A, factors as [`decompose`] gives them: (R,), float64."""
    return (b.double().square().sum(0) * a.double().square().sum(1)).cpu()


def _longest(held: dict[str, torch.Tensor]) -> int:
    return max(map(len, held.values()))


def _others(adapter: Adapter, factors: Factors) -> list[torch.Tensor]:
    """The changes that are not extracted."""
    dense = [b @ a for name, (b, a) in adapter.factors.items() if name not in factors]
    return [*adapter.vector_deltas.values(), *dense]


def _save(folder: Path, base: BaseModel, backbone: Backbone, adapter: Adapter, factors: Factors, rank: int) -> None:
    """The adapter as PEFT saves one of the classifier, or of the bare model where there is no head."""
    labels = [adapter.label(i) for i in range(adapter.num_classes)]
    model: Any = load_classifier(base, labels) if adapter.head is not None else base.load_tower()
    names = {path: _path_in(model, path) for path in factors}
    ranks = {names[path]: len(a) for path, (_, a) in factors.items() if len(a) < rank}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(names.values()),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        modules_to_save=["classifier"] if adapter.head is not None else None,
    )
    wrapped = wrap(model, config)
    inner: Any = wrapped.get_base_model()
    with torch.no_grad():
        for path, (b, a) in factors.items():
            start_lora(inner.get_submodule(names[path]), b, a)
        if adapter.head is not None:
            head = inner.classifier.modules_to_save["default"]
            head.weight.copy_(adapter.head.weight)
            head.bias.copy_(torch.zeros_like(head.bias) if adapter.head.bias is None else adapter.head.bias)
    settings = wrapped.peft_config["default"]
    settings.base_model_name_or_path, settings.revision = backbone_name(backbone.name), backbone.revision
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)


def _path_in(model: nn.Module, path: str) -> str:
    """The path of a module of the backbone in the classifier around it."""
    return next(name for name, _ in model.named_modules() if name == path or name.endswith(f".{path}"))


def _card(result: Extraction, adapter: Adapter, backbone: Backbone) -> str:
    source = adapter.info.to_source()
    return extracted_card(
        result.folder.name,
        backbone_name(backbone.name),
        adapter.info.where,
        list(adapter.info.labels or ()),
        rank=result.rank,
        energy=result.energy,
        license=source["license"],
    )


def _images(data: str | Path | LabelledImages, adapter: Adapter, backbone: Backbone) -> LabelledImages:
    """The images with labels as the checkpoint numbers its classes."""
    if adapter.head is None:
        raise DataError(f"{adapter.info.where}: has no head, so it has no accuracy. Leave `data` out.")
    if not isinstance(data, LabelledImages):
        data = load_labelled_images(data, backbone.image_size, int(backbone.processor.resample))
    known = list(adapter.info.labels or ())
    if known and set(data.label_names) <= set(known):
        places = torch.tensor([known.index(name) for name in data.label_names])
    elif not known and len(data.label_names) == adapter.num_classes:
        places = torch.arange(adapter.num_classes)
    else:
        raise DataError(
            f"{data.name}: shows the classes {', '.join(data.label_names[:3])}, ..., and {adapter.info.where} knows "
            f"{', '.join(known[:3]) or adapter.num_classes}{', ...' if known else ' without names'}. They must be the "
            "same."
        )
    return dataclasses.replace(data, labels=places[data.labels])


@torch.inference_mode()
def _accuracy(pool: AdapterPool, images: LabelledImages) -> float:
    adapter = pool[0]
    with pool.folded(0) as backbone:
        parts = (backbone(backbone.normalize(part))[0] for part in images.pixels.split(128))
        logits = torch.cat([adapter.logits(backbone, hidden).cpu() for hidden in parts])
    return (logits.argmax(1) == images.labels).float().mean().item() * 100
