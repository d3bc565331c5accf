"""Tuning a meta-LoRA on the support images of one task, where there is time for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..backbones import check_embeddings
from ..errors import ConfigError, DataError
from ..task_tuning.base import TaskNetwork, TaskTuning, tune_task
from ..task_tuning.config import TaskTuningConfig
from ..weight_changes import tuner_layers
from .heads import ClassCentreHead
from .preprocessing import as_batch, pixel_batches
from .task import FewShotTask


if TYPE_CHECKING:
    from ..pool import AdapterPool
    from .meta_lora import MetaLoRAForFewShotClassification

#: `examples/choose_tuning.py` compares them with others on validation classes.
DEFAULTS: dict[str, Any] = {"steps": 10, "lr": 3e-3, "last_layers": 1, "consistency": 1.0, "leave_one_out": True}


def tune_model(
    model: MetaLoRAForFewShotClassification, images: Any, names: list[Any], config: TaskTuningConfig | None = None
) -> None:
    """What [`MetaLoRAForFewShotClassification.tune`] does."""
    if len(set(names)) < 2:
        raise DataError("A support set needs at least two classes, or there is nothing to tell apart.")
    config = config or default_config(model)
    network = adapter_network(model, config)
    pixel_values = torch.cat(list(pixel_batches(as_batch(images), model.backbone, 64)))
    tokens = network.tokens(pixel_values)
    with torch.no_grad():
        features = network.features(tokens)
        check_embeddings(features, pixel_values, model.backbone.name)
        task = FewShotTask.fitted(features, names, model.head)
    column = {name: i for i, name in enumerate(task.label_names)}
    centres = tune_task(network, tokens, torch.tensor([column[name] for name in names]), len(column), config)
    # the centres take the place of means, where they are not: the head, saving and `add_classes` go on as before
    counts = task.statistics["counts"]
    statistics = {"sums": centres * counts[:, None], "counts": counts}
    model._task = FewShotTask(task.label_names, statistics, model.head.prepare(statistics))


def default_config(model: MetaLoRAForFewShotClassification) -> TaskTuningConfig:
    """The settings that were chosen, with the metric and the temperature of the model's head."""
    head, own = model.head, {}
    if isinstance(head, ClassCentreHead):
        own = {"metric": head.metric, "temperature": head.temperature}
    return TaskTuningConfig(**{**DEFAULTS, **own})


def adapter_network(model: MetaLoRAForFewShotClassification, config: TaskTuningConfig) -> TaskNetwork:
    """The model as a network whose adapter learns in the last layers, taken back to the adapter as it was loaded.

    Raises:
        ConfigError: the adapter is folded into the weights, the head does not score by class centres, or it does so by
            another metric than `config`.
    """
    if model._merged:
        raise ConfigError("A merged model cannot be tuned: its adapter is in the weights. Load it again, tune, merge.")
    if not isinstance(model.head, ClassCentreHead) or model.head.metric != config.metric:
        raise ConfigError(
            f"tune() tunes class centres by {config.metric}, this model has the head {model.head.name}. "
            "Load it with head='class_centres', or use fit()."
        )
    untune(model)
    layers, last = model.backbone.layers, config.last_layers
    learning = [
        parameter
        for layer in tuner_layers(layers if last is None else layers[max(0, len(layers) - last) :]).values()
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer.") and parameter.is_floating_point()
    ]
    network = TaskNetwork(model.backbone, learning, last)
    model._untuned = network
    return network


def untune(model: MetaLoRAForFewShotClassification) -> None:
    """Take the adapter back to how it was loaded."""
    if model._untuned is not None:
        model._untuned.reset()
        model._untuned = None


class MetaLoraTuning(TaskTuning):
    """[`MetaLoRAForFewShotClassification.tune`] as a method beside the others, for many tasks of one model.

    PVP's idea (arXiv 2304.13639): tuning starts from an adapter that was trained for few-shot tasks.
    """

    def __init__(self, model: MetaLoRAForFewShotClassification, config: TaskTuningConfig | None = None):
        super().__init__(config or default_config(model))
        self.model = model

    def network(self, pool: AdapterPool | None = None) -> TaskNetwork:
        return adapter_network(self.model, self.config)
