"""A training run on disk: the last checkpoints, each whole and sealed, and the losses so far."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, DataError
from ..runtime.config import differences
from ..runtime.files import atomic_write, load_sealed, save_sealed
from .judging import SERIES, Judgements
from .parallel import OptimizerState


#: Checkpoints that are kept: where the newest is damaged, the one before serves.
KEEP = 2
LOG_FILE = "training_log.json"
logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, `checkpoint-<step>.safetensors`.

    Each holds the student's trainable weights, the optimiser's state, its step size, the step to go on with, which
    alone decides over learning rate and episodes of all later steps, the state of torch's generators, the losses, and
    what was judged, with the weights of the best.

    Args:
        folder: they lie there.
        identity (`dict`): what the run depends on, JSON: `config` (`dict`), and checksums of the data.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder, self.identity = folder, json.loads(json.dumps(identity))  # as it will be read

    def files(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob("checkpoint-*.safetensors"), reverse=True)

    def save(
        self,
        parameters: Sequence[torch.Tensor],
        optimizer: OptimizerState,
        step: int,
        history: dict[str, list[float]],
        judged: Judgements | None = None,
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
        if judged is not None:
            tensors |= {f"best.{i}": weight for i, weight in enumerate(judged.weights)}
            header["judged"] = {name: getattr(judged, name) for name in SERIES}
            if judged.first is not None:
                tensors["judged.first"] = judged.first
        save_sealed(self.folder / f"checkpoint-{step:08d}.safetensors", tensors, header)
        atomic_write(self.folder / LOG_FILE, json.dumps(history).encode())
        for path in self.files()[KEEP:]:
            path.unlink(missing_ok=True)

    def load(
        self, parameters: Sequence[torch.Tensor], optimizer: OptimizerState, judged: Judgements | None = None
    ) -> tuple[int, dict[str, list[float]]]:
        """Set all to the newest sound checkpoint; return the step to go on with and the losses before it.

        Without a checkpoint nothing is set, and the step is 0. Damaged ones that are newer are told and deleted.

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
            if judged is not None and not {*SERIES} <= header.get("judged", {}).keys():
                raise ConfigError(f"{path} is a checkpoint of an earlier version of lora_recycle. {_start_again()}")
            _restore(tensors, header, parameters, optimizer)
            if judged is not None:
                for name in SERIES:
                    setattr(judged, name, header["judged"][name])
                judged.first = tensors.get("judged.first")
                judged.weights = [tensors[f"best.{i}"] for i in range(len(parameters))] if judged.steps else []
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
        told = differences(there["config"], self.identity["config"])
        told = told or "the adapters, their surrogate data or the precision differ"
        raise ConfigError(
            f"{path} is a checkpoint of another recipe, pool or surrogate data ({told}). Choose another output "
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
