"""Adapters saved by the code of the paper, as plain PEFT folders.

That code (LoRA Recycle, `lora.py`, after JamesQFreeman/LoRA-ViT) wraps q_proj and v_proj of every layer of the image
tower of a `CLIPModel` and saves one safetensors file, without metadata:

    w_a_000, w_a_001, w_a_002, ...  (r, D)  A of layer 0's q, layer 0's v, layer 1's q, ...
    w_b_000, w_b_001, w_b_002, ...  (D, r)  B, in the same order; what is added is B A x, with no scale
    fc_{P}in_{C}out                 (C, P)  its head, which reads CLIP's projected image, not normalised

The head was trained with a bias that the code does not save (it starts from a random one after loading); it is 0 here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel

from ..backbones.base_models import BaseModel
from ..errors import AdapterError
from ..hub.repo_files import MAX_CLASSES, WEIGHTS_FILE
from ..runtime.files import creating_folder
from ..runtime.outputs import check_output
from .files import POOLED_HEAD, read_shapes
from .keys import PEFT_PREFIX


_HEAD = re.compile(r"fc_\d{1,6}in_(\d{1,6})out")


def import_paper_file(
    file: str | Path, base_model: str | Path, output: str | Path, *, base_revision: str | None = None, **hub: Any
) -> Path:
    """Write the adapter of `file` to the folder `output`, whole or not at all, and return the folder.

    The head is multiplied by the base model's visual projection, so that it reads the image's feature and the folder
    needs nothing else: `pooled_classifier.weight`, (C, hidden size).

    Args:
        base_model (`str` or `Path`): the CLIP model that was tuned, a folder or repo id.
        hub: `token`, `cache_dir` and `local_files_only`.

    Raises:
        AdapterError: the file is no such file (which tensor is missing, unknown, or of another shape), is damaged or
            not finite; or the base model is no CLIP model.
        StorageError: `output` is there and not empty, or cannot be written.
    """
    file, output = Path(file), Path(output)
    check_output(output)
    if file.suffix != ".safetensors" or not file.is_file():
        raise AdapterError(f"{file}: no such .safetensors file. Files of other kinds could run code and are not read.")
    shapes = read_shapes(file, str(file))
    model = _load_base(base_model, base_revision, hub)
    names = _peft_names(shapes, model, str(file))
    tensors = _read_finite(file)
    renamed = {key: tensors[name] for name, key in names.items()}
    if POOLED_HEAD in renamed:
        renamed[POOLED_HEAD] = renamed[POOLED_HEAD] @ model.visual_projection.weight.detach()
    rank = shapes["w_a_000"][0]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"], inference_mode=True)
    config.base_model_name_or_path, config.revision = str(base_model), base_revision
    with creating_folder(output) as new:
        config.save_pretrained(str(new))
        tensors = {key: tensor.contiguous() for key, tensor in renamed.items()}
        save_file(tensors, new / WEIGHTS_FILE, metadata={"format": "pt"})
    return output


def _load_base(name: str | Path, revision: str | None, hub: dict) -> CLIPModel:
    base = BaseModel.pull(name, revision, **hub)
    if base.model_type != "clip":
        raise AdapterError(
            f"{name}: is a {base.model_type} model, but the paper's code tunes CLIP. Name the CLIP model, whole."
        )
    return cast(CLIPModel, base.load(CLIPModel, base.whole_config()))


def _peft_names(shapes: dict[str, tuple[int, ...]], model: CLIPModel, where: str) -> dict[str, str]:
    """Tensor in the file -> key in a PEFT folder for `CLIPVisionModel`, once all shapes fit."""
    vision: Any = model.config.vision_config
    hidden, layers = model.vision_embed_dim, vision.num_hidden_layers
    rank = shapes["w_a_000"][0] if shapes.get("w_a_000") else 0
    expected: dict[str, tuple[int, ...]] = {}
    names: dict[str, str] = {}
    for i in range(2 * layers):
        module = f"{PEFT_PREFIX}encoder.layers.{i // 2}.self_attn.{'qv'[i % 2]}_proj"
        for part, matrix, shape in (("a", "A", (rank, hidden)), ("b", "B", (hidden, rank))):
            expected[f"w_{part}_{i:03d}"] = shape
            names[f"w_{part}_{i:03d}"] = f"{module}.lora_{matrix}.weight"
    heads = {name: int(match[1]) for name in shapes if (match := _HEAD.fullmatch(name))}
    for name, classes in heads.items():
        expected[name], names[name] = (classes, cast(int, model.projection_dim)), POOLED_HEAD
    if len(heads) > 1 or any(classes > MAX_CLASSES for classes in heads.values()):
        raise AdapterError(f"{where}: {', '.join(sorted(heads))}: expected one head of 1 to {MAX_CLASSES} classes.")
    _compare(shapes, expected, f"{where}: for {layers} layers of q_proj and v_proj, {hidden} wide")
    return names


def _compare(shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: str) -> None:
    for what, names in (("lacks", expected.keys() - shapes), ("holds the unknown", shapes.keys() - expected)):
        if names:
            raise AdapterError(f"{where}, it {what} tensor(s) {', '.join(sorted(names)[:3])}.")
    for name, shape in sorted(shapes.items()):
        if shape != expected[name]:
            raise AdapterError(f"{where}, {name} must be {expected[name]}, got {shape}.")


def _read_finite(file: Path) -> dict[str, Tensor]:
    """All tensors as float32."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{file} cannot be read ({error}).") from error
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point():
            raise AdapterError(f"{file}: {name} must be floating point, got {tensor.dtype}.")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{file}: {name} holds NaN or infinity.")
    return {name: tensor.float() for name, tensor in tensors.items()}
