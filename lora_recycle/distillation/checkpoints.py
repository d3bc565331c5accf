"""A training run on disk: the last checkpoints, each whole and sealed, and the losses so far."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, DataError
from ..runtime.config import differences
from ..runtime.files import atomic_write, load_sealed, read_header, save_sealed
from ..runtime.outputs import OutputKind
from .config import DistillationConfig
from .parallel import OptimizerState
from .selection import CheckpointSelection


#: Checkpoints that are kept: where the newest is damaged, the one before serves.
KEEP = 2
LOG_FILE = "training_log.json"
_NAME = re.compile(r"checkpoint-\d{8}\.safetensors")
logger = logging.getLogger(__name__)


def _has_checkpoint(folder: Path) -> bool:
    for path in folder.glob("checkpoint-*.safetensors"):
        with contextlib.suppress(OSError, ValueError):
            return "identity" in read_header(path)
        if _NAME.fullmatch(path.name) and (folder / LOG_FILE).is_file():  # damaged, and still ours
            return True
    return False


#: What a training run writes to its folder.
OUTPUT = OutputKind("checkpoints of a training run", _has_checkpoint)


def run_identity(
    config: DistillationConfig, adapters: list[str], shards: list[dict[str, Any]], precision: list[Any]
) -> dict[str, Any]:
    """What a training run depends on: recipe, SHA-256 of adapters and surrogate shards, and types of numbers."""
    checksums = {"adapters": adapters, "surrogate": [entry["sha256"] for entry in shards]}
    return {"config": config.to_dict(), **checksums, "precision": precision}


class Checkpoints:
    """The checkpoints of one run, `checkpoint-<step>.safetensors`.

    Each holds the student's trainable weights, the optimiser's state, its step size, the step to go on with, which
    alone decides over learning rate and episodes of all later steps, the state of torch's generators, the losses, and
    what was evaluated, with the weights of the best.

    Args:
        folder: they lie there.
        identity (`dict`): what the run depends on, JSON: `config` (`dict`), and checksums of the data.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder, self.identity = folder, json.loads(json.dumps(identity))  # as it will be read

    def files(self) -> list[Path]:
        """The newest first."""
        found = self.folder.glob("checkpoint-*.safetensors")
        return sorted((path for path in found if _NAME.fullmatch(path.name)), reverse=True)

    def save(
        self,
        parameters: Sequence[torch.Tensor],
        optimizer: OptimizerState,
        step: int,
        history: dict[str, list[float]],
        selection: CheckpointSelection | None = None,
    ) -> None:
        """Write the state before `step`, then delete what is older than the last `KEEP`.

        Raises:
            StorageError: it cannot be written; the earlier ones are as they were.
        """
        tensors = {f"rng.{name}": state for name, state in _rng_states(parameters[0].device).items()}
        for i, parameter in enumerate(parameters):
            tensors[f"{i}.value"] = parameter
            tensors |= {f"{i}.{name}": value for name, value in optimizer.state[parameter].items()}
        header = {"step": step, "identity": self.identity, "history": history}
        header["learning_rates"] = [group["lr"] for group in optimizer.param_groups]
        if selection is not None:
            tensors |= {f"best.{i}": weight for i, weight in enumerate(selection.weights)}
            header["judged"] = selection.state()
            if selection.first is not None:
                tensors["judged.first"] = selection.first
        save_sealed(self.folder / f"checkpoint-{step:08d}.safetensors", tensors, header)
        # a step that was left out has no loss, for which JSON has null and no NaN
        log = {name: [value if math.isfinite(value) else None for value in values] for name, values in history.items()}
        atomic_write(self.folder / LOG_FILE, json.dumps(log, allow_nan=False).encode())
        for path in self.files()[KEEP:]:
            path.unlink(missing_ok=True)

    def load(
        self,
        parameters: Sequence[torch.Tensor],
        optimizer: OptimizerState,
        selection: CheckpointSelection | None = None,
    ) -> tuple[int, dict[str, list[float]]]:
        """Set all to the newest sound checkpoint; return the step to go on with and the losses before it.

        Without a checkpoint nothing is set, and the step is 0. Damaged ones that are newer are reported and deleted.

        Raises:
            ConfigError: it is of another recipe, pool or surrogate data, or of an earlier version.
            DataError: there are some, but all of them are damaged.
        """
        damaged: dict[Path, Exception] = {}
        for path in self.files():
            try:
                tensors, header = load_sealed(path)
            except FileNotFoundError:  # another process of this run deleted it as damaged
                continue
            except (OSError, ValueError) as error:
                damaged[path] = error
                continue
            self._check_identity(path, header["identity"])
            for other, reason in damaged.items():
                logger.warning("%s is damaged (%s); going on from %s.", other, reason, path.name)
                other.unlink(missing_ok=True)
            if selection is not None:
                try:
                    selection.load_state(header["judged"])
                except KeyError as error:
                    version = f"{path} is a checkpoint of an earlier version of lora_recycle"
                    raise ConfigError(f"{version}. {_start_again()}") from error
                selection.first = tensors.get("judged.first")
                selection.weights = [tensors[f"best.{i}"] for i in range(len(parameters))] if selection.steps else []
            _restore(tensors, header, parameters, optimizer)
            return header["step"], header["history"]
        for path, reason in damaged.items():
            raise DataError(f"{path}: the checkpoint is damaged ({reason}), and no other is left. {_start_again()}")
        return 0, {}

    def clear(self) -> None:
        """Delete them all."""
        for path in [*self.files(), self.folder / LOG_FILE]:
            path.unlink(missing_ok=True)

    def _check_identity(self, path: Path, there: dict[str, Any]) -> None:
        if there == self.identity:
            return
        reason = differences(there["config"], self.identity["config"])
        reason = reason or "the adapters, their surrogate data or the precision differ"
        raise ConfigError(
            f"{path} is a checkpoint of another recipe, pool or surrogate data ({reason}). Choose another output "
            f"folder. {_start_again()}"
        )


def _start_again() -> str:
    return "To start again there, pass --no-resume (from Python: resume=False)."


def _rng_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def _restore(
    tensors: dict[str, torch.Tensor],
    header: dict[str, Any],
    parameters: Sequence[torch.Tensor],
    optimizer: OptimizerState,
) -> None:
    device = parameters[0].device
    torch.set_rng_state(tensors["rng.cpu"])
    if device.type != "cpu" and "rng.device" in tensors:
        torch.get_device_module(device).set_rng_state(tensors["rng.device"])
    for group, rate in zip(optimizer.param_groups, header["learning_rates"], strict=True):
        group["lr"] = rate
    for i, parameter in enumerate(parameters):
        prefix = f"{i}."
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        parameter.data.copy_(state.pop("value"))
        optimizer.state[parameter] = {name: value.to(parameter.device) for name, value in state.items()}
