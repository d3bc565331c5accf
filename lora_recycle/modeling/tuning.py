"""Tuning a meta-LoRA on the support images of one task, where there is time for it."""

from __future__ import annotations

from typing import Any

import torch

from ..adapters.peft_wrap import tuner_layers
from ..backbones.backbone import Backbone, check_embeddings
from ..errors import ConfigError
from ..fewshot.heads import FewShotHead, PrototypeHead
from ..finetuning.base import TaskNetwork, tune_task
from ..finetuning.config import TaskTuningConfig
from .preprocessing import as_batch, pixel_batches
from .task import FewShotTask


#: `examples/studies/choose_tuning.py` compares them with others on validation classes.
DEFAULTS: dict[str, Any] = {"steps": 10, "lr": 3e-3, "last_layers": 1, "consistency": 1.0, "leave_one_out": True}


def default_config(head: FewShotHead) -> TaskTuningConfig:
    """The settings that were chosen, with the metric and the temperature of the model's head."""
    own = {}
    if isinstance(head, PrototypeHead):
        own = {"metric": head.metric, "temperature": head.temperature}
    return TaskTuningConfig(**{**DEFAULTS, **own})


def check_head(head: FewShotHead, config: TaskTuningConfig) -> None:
    """Raise `ConfigError` where the head does not score by prototypes, or by another metric than `config`."""
    if not isinstance(head, PrototypeHead) or head.metric != config.metric:
        raise ConfigError(
            f"tune() tunes prototypes by {config.metric}, this model has the head {head.name}. "
            "Load it with head='prototypes', or use fit()."
        )


def adapter_network(backbone: Backbone, config: TaskTuningConfig) -> TaskNetwork:
    """A backbone that wears an adapter as a network whose adapter learns in the last layers."""
    layers, last = backbone.layers, config.last_layers
    learning = [
        parameter
        for layer in tuner_layers(layers if last is None else layers[max(0, len(layers) - last) :]).values()
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer.") and parameter.is_floating_point()
    ]
    return TaskNetwork(backbone, learning, last)


def chosen_config(given: TaskTuningConfig | dict[str, Any] | None, head: FewShotHead) -> TaskTuningConfig:
    """What `tune` was given; a dictionary changes some of the defaults."""
    if isinstance(given, dict):
        return TaskTuningConfig.from_dict(default_config(head).to_dict() | given, "tune")
    return given or default_config(head)


def tuned_task(
    network: TaskNetwork, head: FewShotHead, images: Any, names: list[Any], config: TaskTuningConfig
) -> FewShotTask:
    """Tune the network on a support set, and return the task with the prototypes that were tuned with it."""
    pixel_values = torch.cat(list(pixel_batches(as_batch(images), network.backbone, 64)))
    tokens = network.tokens(pixel_values)
    with torch.no_grad():
        features = network.features(tokens)
        check_embeddings(features, pixel_values, network.backbone.name)
        task = FewShotTask.fitted(features, names, head)
    column = {name: i for i, name in enumerate(task.label_names)}
    prototypes = tune_task(network, tokens, torch.tensor([column[name] for name in names]), len(column), config)
    # the prototypes take the place of means, where they are not: the head, saving and `add_classes` go on as before
    counts = task.statistics["counts"]
    statistics = {"sums": prototypes * counts[:, None], "counts": counts}
    return FewShotTask(task.label_names, statistics, head.prepare(statistics))
