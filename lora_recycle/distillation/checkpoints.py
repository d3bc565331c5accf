"""A training run on disk, whole or absent: the student's LoRA, the optimiser and the losses so far."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..errors import ConfigError, DataError
from ..storage import atomic_save_tensors, atomic_write


def save_checkpoint(path: Path, parameters, optimizer, step: int, identity: str, history: dict) -> None:
    """Student and optimiser in one atomic file. Batches depend on seed and step alone, so that is all there is."""
    tensors = {}
    for i, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        tensors[f"{i}.value"] = parameter.detach().cpu()
        tensors[f"{i}.exp_avg"] = state["exp_avg"].cpu()
        tensors[f"{i}.exp_avg_sq"] = state["exp_avg_sq"].cpu()
    header = {"step": step, "identity": identity, "history": history}
    atomic_save_tensors(path, tensors, json.dumps(header))
    atomic_write(path.with_name("training_log.json"), json.dumps(history).encode())


def load_checkpoint(path: Path, parameters, optimizer, identity: str) -> tuple[int, dict[str, list[float]]]:
    """Set student and optimiser to a checkpoint; return the step to go on with and the losses before it.

    Raises:
        DataError: the file is damaged.
        ConfigError: it is of another recipe, pool or surrogate data than `identity`.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["header"])
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: the checkpoint is damaged ({error}). Delete it to start again.") from error
    if header["identity"] != identity:
        raise ConfigError(
            f"{path} is a checkpoint of another recipe, pool or surrogate data. Choose another output folder, "
            "or delete it to start again."
        )
    for i, parameter in enumerate(parameters):
        parameter.data.copy_(tensors[f"{i}.value"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(header["step"]), device=parameter.device),
            "exp_avg": tensors[f"{i}.exp_avg"].to(parameter.device),
            "exp_avg_sq": tensors[f"{i}.exp_avg_sq"].to(parameter.device),
        }
    return header["step"], header["history"]
