"""A model as files that run without this library: ONNX graph, `torch.export` program or transformers checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoModel

from ..backbones.backbone import Backbone
from ..backbones.base_models import LOADING
from ..errors import AdapterError, ConfigError
from ..fewshot.heads import FewShotHead
from ..hub.embedded import backbone_name
from ..runtime.files import atomic_write, replacing_files
from ..runtime.outputs import OutputKind, check_output, claim_output, holds_json
from ..version import __version__
from .preprocessing import image_settings
from .task import FewShotTask


FORMATS = ("onnx", "torch", "transformers")
#: Beside the model: what it takes, how images become that, what it gives, and how it was checked.
DESCRIPTION_FILE = "export.json"
ONNX_FILE, TORCH_FILE = "model.onnx", "model.pt2"
#: What is written must answer as the model does at these batch sizes, up to this share of an answer's length.
BATCH_SIZES, TOLERANCE = (1, 2, 7), 1e-4
_NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}

Run = Callable[[torch.Tensor], torch.Tensor]


class ExportableModel(Protocol):
    """What is read of a [`MetaLoRAForFewShotClassification`]."""

    backbone: Backbone
    head: FewShotHead
    _task: FewShotTask | None

    def network(self) -> Backbone: ...

    @property
    def domains(self) -> list[str]: ...

    @property
    def label_names(self) -> list[Any]: ...

    def to(self, device: str, dtype: torch.dtype) -> Any: ...


def export(model: ExportableModel, folder: str | os.PathLike[str], format: str = "onnx") -> dict[str, Any]:
    """Write a model for use without this library, then load the file and compare its outputs.

    The adapter is folded into a float32 copy of the weights; `model` stays as it is. Of a model with experts that is
    the one of the fitted task's domain, of an unfitted model the shared one; `export.json` says which. The graph of a
    fitted model takes normalised images `pixel_values` (B, 3, S, S), any B, to `probabilities` (B, C), that of an
    unfitted one to `embeddings` (B, D). A transformers checkpoint is the network alone, without the fitted task,
    with `pooler_output` as the embedding whatever the family.

    Args:
        model: with a head that is not transductive, where it is fitted.
        folder: gets `model.onnx` (and `model.onnx.data` beyond 2 GB), `model.pt2` or a checkpoint, and `export.json`.
        format (`str`, *optional*, defaults to `onnx`): or `torch` or `transformers`.

    Returns:
        The content of `export.json`.

    Raises:
        ConfigError: an unknown format, a package that is missing for it, or a model that it has no place for.
        AdapterError: the adapter is no change of weights, or what was written does not answer as the model does.
        StorageError: the folder holds something else than such an export, or cannot be written.
    """
    _check(model, format)
    check_output(Path(folder), output_kind(format))
    plain = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).merge()
    domain = plain._merged_domain if plain.domains else None
    if format == "transformers":
        plain._task = None
    graph, folder = _Graph(plain).eval(), Path(folder)
    described = {"format": format, **_described(plain, graph, domain)}
    if format != "transformers":  # where a file of its own says it
        described["image"] = image_settings(model.backbone)
    # no description stays beside a model of another export
    with replacing_files(folder, removes=[DESCRIPTION_FILE]) as new, torch.no_grad():
        run = _WRITERS[format](graph, new)
        described["checked"] = _compared(graph, run)
        claim_output(folder, output_kind(format))
    atomic_write(folder / DESCRIPTION_FILE, json.dumps(described, indent=1, allow_nan=False).encode())
    return described


def output_kind(format: str) -> OutputKind:
    """What an export in this format writes to a folder."""

    def known(folder: Path) -> bool:
        path = folder / DESCRIPTION_FILE
        return holds_json(path, "format", "versions") and json.loads(path.read_bytes())["format"] == format

    return OutputKind(f"an export ({format})", known)


def _check(model: ExportableModel, format: str) -> None:
    if format not in FORMATS:
        raise ConfigError(f"Unknown export format {format!r}. There are {', '.join(FORMATS)}.")
    missing = [name for name in _NEEDS.get(format, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"Export to {format} needs {', '.join(missing)}: pip install 'lora-recycle[{format}]'")
    if format != "transformers" and model.label_names and model.head.transductive:
        raise ConfigError(
            f"The head {model.head.name} classifies a set of images together, so an exported model would answer by "
            "what else is in the batch. Load the model with another head, prototypes for instance, and fit it."
        )


class _Graph(nn.Module):
    """Normalised images (B, 3, S, S) to class probabilities (B, C), of a model without a task to embeddings (B, D)."""

    def __init__(self, model: ExportableModel):
        super().__init__()
        self.backbone, self.head, self.task = model.network(), model.head, model._task
        if self.task is not None:  # views of larger tensors would be written whole
            prepared = {name: value.cpu().contiguous().clone() for name, value in self.task.prepared.items()}
            self.task = dataclasses.replace(self.task, prepared=prepared)
        self.output = "embeddings" if self.task is None else "probabilities"

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.backbone.features(pixel_values).float()
        return features if self.task is None else self.task.logits(features, self.head).softmax(-1)

    def images(self, count: int) -> torch.Tensor:
        """Random ones, always the same: (count, 3, S, S)."""
        size = self.backbone.image_size
        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def _traced(graph: _Graph) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(graph, (graph.images(2),), dynamic_shapes={"pixel_values": {0: batch}})


def _write_torch(graph: _Graph, folder: Path) -> Run:
    path, written = folder / TORCH_FILE, io.BytesIO()
    torch.export.save(_traced(graph), written)  # to a file it would not say why that cannot be written
    path.write_bytes(written.getbuffer())
    with path.open("rb") as file:  # under an ASCII locale torch takes no path with other letters
        return torch.export.load(file).module()


def _write_onnx(graph: _Graph, folder: Path) -> Run:
    import onnxruntime

    names: dict[str, Any] = {"input_names": ["pixel_values"], "output_names": [graph.output]}
    program = torch.onnx.export(_traced(graph), dynamo=True, verbose=False, **names)
    assert program is not None  # as it is with dynamo
    program.save(folder / ONNX_FILE)  # one file up to 2 GB, more than which the format cannot hold
    session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([graph.output], {"pixel_values": images.numpy()})[0])


def _write_transformers(graph: _Graph, folder: Path) -> Run:
    backbone = graph.backbone
    config = copy.deepcopy(backbone.model.config)
    state = backbone.model.state_dict()
    if hasattr(config, "pooler_act"):
        # ViT and DeiT have a pooling layer of their own behind the embedding: one that changes nothing
        config.pooler_act, config.pooler_output_size = "linear", backbone.hidden_size
        width = backbone.hidden_size
        state |= {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
    with LOADING:
        network = AutoModel.from_config(config)
    network.load_state_dict(state)
    network.save_pretrained(folder)
    backbone.processor.save_pretrained(folder)
    with LOADING:
        loaded = AutoModel.from_pretrained(folder)
    return lambda images: loaded(pixel_values=images).pooler_output


_WRITERS: dict[str, Callable[[_Graph, Path], Run]] = {
    "onnx": _write_onnx,
    "torch": _write_torch,
    "transformers": _write_transformers,
}


def _described(model: ExportableModel, graph: _Graph, domain: str | None) -> dict[str, Any]:
    size = model.backbone.image_size
    return {
        "input": {"name": "pixel_values", "shape": ["batch", 3, size, size], "dtype": "float32"},
        "output": {"name": graph.output, "shape": ["batch", len(model.label_names) or model.backbone.hidden_size]},
        "label_names": model.label_names or None,
        "base_model": backbone_name(model.backbone.name),
        **({"domain": domain} if domain else {}),
        "versions": {"lora_recycle": __version__, "torch": str(torch.__version__)},
    }


def _compared(graph: _Graph, run: Run) -> dict[str, Any]:
    """How far the answers of what was written lie from the model's. Raises `AdapterError` where that is too far."""
    gaps = {}
    for count in BATCH_SIZES:
        images = graph.images(count)
        expected, answers = graph(images), run(images)
        gaps[count] = float((torch.linalg.norm(answers - expected, dim=1) / torch.linalg.norm(expected, dim=1)).max())
    worst = max(gaps.values())
    if not worst <= TOLERANCE:
        raise AdapterError(
            f"{graph.backbone.name}: the exported model answers otherwise, by {worst:.1e} of an answer's length (at "
            f"most {TOLERANCE:.0e} is rounding). Nothing was written. Please report the versions in use."
        )
    return {"batch_sizes": list(BATCH_SIZES), "difference": worst, "tolerance": TOLERANCE}
