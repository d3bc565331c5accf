"""Make a pool: tune adapters with heads on the classes of a labelled data set and save them as anyone publishes them.

This is the answer to "where do I get the LoRAs?". Nothing later in the library reads the images again.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.helpers import disable_input_dtype_casting
from tqdm.auto import tqdm
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, PreTrainedModel

from ..backbones.backbone import Backbone, extract_features
from ..backbones.base_models import BaseModel
from ..backbones.token_selection import num_kept
from ..errors import AdapterError, DataError
from ..fewshot.prototypes import class_prototypes, prototype_logits
from ..hub.cards import adapter_card
from ..hub.embedded import backbone_name
from ..hub.repo_files import CONFIG_FILE
from ..images.labelled import LabelledImages, load_labelled_images
from ..images.tables import NO_COLUMNS, Columns
from ..runtime.files import check_writable, creating_folder
from ..runtime.launch import claim_indices, mixed_precision, process_state
from ..runtime.outputs import OutputKind, check_output
from ..runtime.terminal import counted
from .config import AdapterTrainingConfig
from .fitted_heads import prototype_layer


def _holds_adapters(folder: Path) -> bool:
    """Whether there is nothing but folders in it, and an adapter in one."""
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return all(path.is_dir() for path in entries) and any((path / CONFIG_FILE).is_file() for path in entries)


OUTPUT = OutputKind("adapters", _holds_adapters)
#: Images, uint8 (N, 3, H, W), and their labels, int64 (N,).
Task = tuple[torch.Tensor, torch.Tensor]


def load_classifier(base: BaseModel, label_names: list[str]) -> Any:
    """The base model with a new head, in float32: float16 would not learn.

    Raises:
        AdapterError: it is not whole, or transformers has no classifier of its type.
    """
    config = base.whole_config(id2label=dict(enumerate(label_names)))
    kind: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None:
        raise AdapterError(f"{base.name}: transformers has no image classifier of type {base.model_type}.")
    # a type that has several lists the plain one first
    return base.load(kind[0] if isinstance(kind, tuple) else kind, config, new=("classifier.",))


def adapter_config(config: AdapterTrainingConfig, model: PreTrainedModel) -> peft.PeftConfig:
    """The PEFT configuration for one adapter with its head."""
    linear = {name.split(".")[-1] for name, m in model.base_model.named_modules() if isinstance(m, torch.nn.Linear)}
    targets = sorted(linear) if config.targets == "all" else [t.strip() for t in config.targets.split(",")]
    unknown = sorted(set(targets) - linear)
    config.require(not unknown, f"targets: {unknown[:1]} is no linear layer here ({', '.join(sorted(linear))})")
    common: dict[str, Any] = {"target_modules": targets, "modules_to_save": ["classifier"], "r": config.rank}
    if config.peft_type in ("LORA", "DORA"):
        return peft.LoraConfig(lora_alpha=2 * config.rank, use_dora=config.peft_type == "DORA", **common)
    return {"LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig}[config.peft_type](alpha=2 * config.rank, **common)


def augment(pixels: torch.Tensor, flip: bool, generator: torch.Generator, reach: int = 4) -> torch.Tensor:
    """A random shift of up to `reach` pixels and, with `flip`, a mirror image: (B, 3, H, W) to the same."""
    batch, _, height, width = pixels.shape
    padded = F.pad(pixels, (reach,) * 4, mode="replicate")
    dy, dx = torch.randint(0, 2 * reach + 1, (2, batch, 1), generator=generator)
    rows, columns = dy + torch.arange(height), dx + torch.arange(width)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(batch)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def split_task(
    data: LabelledImages, classes: list[int], config: AdapterTrainingConfig, generator: torch.Generator
) -> tuple[Task, Task]:
    """Training and held-out images of a task, labels renumbered: ((N, 3, H, W), (N,)) twice."""
    train, held = [], []
    by_class = data.by_class()
    for new, old in enumerate(classes):
        index = by_class[old][torch.randperm(len(by_class[old]), generator=generator)]
        k = min(config.validation_images, max(1, len(index) // 5))
        if len(index) <= k:
            raise DataError(f"{data.name}: class {data.label_names[old]!r} has {len(index)} image: two are needed.")
        held += [(i, new) for i in index[:k].tolist()]
        train += [(i, new) for i in index[k : k + config.images_per_class].tolist()]
    tasks = [(data.pixels[[i for i, _ in part]], torch.tensor([y for _, y in part])) for part in (train, held)]
    return tasks[0], tasks[1]


def start_head(view: Backbone, head: torch.nn.Linear, train: Task, held: Task) -> float:
    """Set the head to the nearest prototype of what it reads on the frozen backbone, so that tuning starts from that.

    Returns the held-out accuracy (per cent) of cosine prototypes on the frozen backbone, which an adapter must beat.
    """
    (images, labels), (held_images, held_labels) = train, held
    features, read = _features_and_head_inputs(view, images)
    weight, bias = prototype_layer(read, labels, head.out_features)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    scores = prototype_logits(
        extract_features(view, held_images), class_prototypes(features, labels, head.out_features)
    )
    return (scores.argmax(1) == held_labels).float().mean().item() * 100


@torch.inference_mode()
def _features_and_head_inputs(view: Backbone, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and what heads of this family read: uint8 (N, 3, H, W) to float32 (N, D), (N, `head_size`), on CPU."""
    if view.family.head_input == "cls":
        features = extract_features(view, images)
        return features, features
    hidden = (view(view.normalize(part))[0] for part in images.split(128))
    pairs = [(view.pool_features(tokens).float().cpu(), view.pool_for_head(tokens).float().cpu()) for tokens in hidden]
    features, read = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return features, read


def train_adapter(
    data: LabelledImages,
    classes: list[int],
    output: Path,
    config: AdapterTrainingConfig,
    base_model: str,
    seed: int,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Tune one adapter with its head on `classes` of `data` and save it with PEFT into `output`.

    Returns its held-out accuracy and that of frozen prototypes, in per cent. The folder appears when it is whole.

    Raises:
        StorageError: `output` is there and not empty, or cannot be written.
    """
    check_output(output)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    names = [data.label_names[c] for c in classes]
    base = BaseModel.pull(base_model)
    model = load_classifier(base, names)
    view = Backbone(model.base_model, base.image_processor(), base_model).to(device)
    train, held = split_task(data, classes, config, generator)
    frozen = start_head(view, model.classifier, train, held)
    wrapped = peft.get_peft_model(model, adapter_config(config, model)).to(view.device)
    # PEFT makes each input float32, for autocast to make it bfloat16 again: a sixth of the time of a step on a CPU
    for_nothing = config.peft_type == "LORA" and mixed_precision().mixed_precision == "bf16"
    with disable_input_dtype_casting(wrapped, for_nothing):
        _fit(wrapped, view, *train, config, generator)
    accuracy = _accuracy(wrapped, view, *held)
    wrapped.peft_config["default"].base_model_name_or_path = base_model
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    results = {"accuracy": round(accuracy, 2), "frozen_prototypes": round(frozen, 2)}
    with creating_folder(output) as new:
        wrapped.save_pretrained(str(new), save_embedding_layers=False)
        card = adapter_card(
            output.name.lstrip("."),
            base_model,
            data.name,
            names,
            peft_type=config.peft_type,
            rank=config.rank,
            targets=config.targets,
            accuracy=results["accuracy"],
            frozen_accuracy=results["frozen_prototypes"],
        )
        (new / "README.md").write_text(card, encoding="utf-8")
    return results


def _logits(
    wrapped: Any, view: Backbone, pixel_values: torch.Tensor, kept: torch.Tensor | None = None
) -> torch.Tensor:
    hidden, _ = view(pixel_values, kept)
    return wrapped.base_model.model.classifier(view.pool_for_head(hidden))


def _fit(
    wrapped: peft.PeftModel,
    view: Backbone,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: AdapterTrainingConfig,
    generator: torch.Generator,
) -> None:
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.01)
    per_epoch = math.ceil(len(images) / config.batch_size)
    steps, patches = per_epoch * config.epochs, view.num_patches
    accelerator = mixed_precision()
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(images), generator=generator)
        index = order[(step % per_epoch) * config.batch_size :][: config.batch_size]
        kept = None
        if config.keep_ratio < 1 and step < steps - per_epoch:
            k = num_kept(patches, config.keep_ratio)
            kept = torch.rand(len(index), patches, generator=generator).argsort(1)[:, :k].to(view.device)
        pixels = view.normalize(augment(images[index], config.flip, generator))
        warmup = min(1.0, (step + 1) / (0.05 * steps + 1))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * warmup * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        with accelerator.autocast():
            logits = _logits(wrapped, view, pixels, kept)
        loss = F.cross_entropy(logits.float(), labels[index].to(view.device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


@torch.inference_mode()
def _accuracy(wrapped: peft.PeftModel, view: Backbone, images: torch.Tensor, labels: torch.Tensor) -> float:
    wrapped.eval()
    logits = torch.cat([_logits(wrapped, view, view.normalize(part)).cpu() for part in images.split(128)])
    return (logits.argmax(1) == labels).float().mean().item() * 100


def train_adapters(
    data_path: str | Path,
    output_dir: str | Path,
    config: AdapterTrainingConfig,
    base_model: str = "demo",
    device: torch.device | str | None = None,
    progress: bool = True,
    *,
    columns: Columns = NO_COLUMNS,
    failures: dict[int, str] | None = None,
) -> list[dict]:
    """Tune `config.tasks` adapters on random draws of classes. Finished adapters are kept when it is run again.

    Several processes (`accelerate launch`) share the tasks.

    Args:
        columns: of a table, as of [`images.labelled.load_labelled_images`].
        failures: takes the images that cannot be read, which are left out.

    Raises:
        DataError: the data has too few classes.
        StorageError: the folder of an adapter holds something else, or nothing can be written there.
    """
    state, output_dir = process_state(), Path(output_dir)
    check_output(output_dir, OUTPUT)
    backbone = Backbone.from_pretrained(base_model)
    reading: Any = {"seed": config.seed, "columns": columns, "failures": failures}
    data = load_labelled_images(data_path, backbone.image_size, backbone.processor.resample, **reading)
    available = sorted(data.by_class())
    if len(available) < config.classes:
        found = counted(len(available), "class", "classes")
        raise DataError(f"{data.name} has {found}, fewer than the {config.classes} of a task.")
    # another program, in another folder, is to find it too
    base_name = backbone_name(Path(base_model).resolve() if Path(base_model).is_dir() else base_model)
    targets = [output_dir / f"{data.name.replace('/', '-')}-{task:03d}" for task in range(config.tasks)]
    for target in targets:  # before any is tuned
        if not (target / "adapter_config.json").exists():
            check_output(target)
    check_writable(output_dir)
    results = []
    disable = not (progress and state.is_main_process)
    for task in tqdm(claim_indices(config.tasks), desc="train-adapters", total=config.tasks, disable=disable):
        target = targets[task]
        if (target / "adapter_config.json").exists():
            continue
        draw = torch.Generator().manual_seed(config.seed * 100_003 + task)
        classes = [available[i] for i in torch.randperm(len(available), generator=draw)[: config.classes].tolist()]
        results.append(
            {
                "adapter": str(target),
                **train_adapter(data, classes, target, config, base_name, config.seed * 100_003 + task, device),
            }
        )
    return results
