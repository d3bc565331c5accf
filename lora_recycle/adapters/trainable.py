"""What a meta-adapter can be: PEFT's types and how each starts, at the pool's average or at principal directions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.shira import ShiraLayer
from torch import nn

from ..backbones.backbone import Backbone
from ..errors import ConfigError
from .adapter import Factors
from .peft_wrap import Layers, wrap


def adapter_config(peft_type: str, rank: int, targets: list[str], backbone: Backbone, seed: int) -> peft.PeftConfig:
    """PEFT's configuration of an adapter that changes nothing yet.

    Args:
        peft_type: one of `DistillationConfig.peft_type`.
        rank: of its matrices; for OFT the size of a block, for SHiRA the rank of a LoRA with as many parameters. Cut
            to what the narrowest target takes.
    """
    widths = [tuple(backbone.model.get_submodule(name).weight.shape) for name in targets]
    rank = min(rank, *(min(shape) for shape in widths))
    if peft_type in ("LORA", "DORA"):
        use_dora = peft_type == "DORA"
        return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, use_dora=use_dora)
    if peft_type in ("LOHA", "LOKR"):
        kind = {"LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig}[peft_type]
        return kind(r=rank, alpha=rank, target_modules=targets)
    if peft_type == "OFT":
        return peft.OFTConfig(r=0, oft_block_size=rank, target_modules=targets)
    if peft_type == "IA3":  # outputs are scaled; PEFT's other way, for feed-forward layers, scales inputs
        return peft.IA3Config(target_modules=targets, feedforward_modules=[])
    rank = min(rank, *(out * width // (out + width) for out, width in widths))  # no more entries than the layer has
    return peft.ShiraConfig(r=rank, target_modules=targets, random_seed=seed)


def linear_layers(backbone: Backbone, targets: str = "all") -> list[str]:
    """Paths of the linear layers inside the transformer layers: all, or those of the given leaf names.

    Args:
        targets: `all`, or leaf names between commas, as in `q_proj,v_proj`.

    Raises:
        ConfigError: a name that no such layer has.
    """
    prefix = backbone.family.layers + "."
    modules = backbone.model.named_modules()
    paths = sorted(name for name, m in modules if name.startswith(prefix) and isinstance(m, nn.Linear))
    if targets == "all":
        return paths
    chosen, known = {name.strip() for name in targets.split(",")}, {path.rpartition(".")[2] for path in paths}
    if unknown := sorted(chosen - known):
        raise ConfigError(
            f"targets: {unknown[0]!r} is no linear layer of {backbone.name} ({', '.join(sorted(known))})."
        )
    return [path for path in paths if path.rpartition(".")[2] in chosen]


def wrap_seeded(model: nn.Module, config: peft.PeftConfig, seed: int) -> PeftModel:
    """[`wrap`], with the new adapter's random numbers of a seed of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return wrap(model, config)


@torch.no_grad()
def start_lora(layer: LoraLayer, b: torch.Tensor, a: torch.Tensor) -> None:
    """Set a LoRA, or a DoRA that then says the same, to the change B A. Rows of A beyond its rank stay random, free to
    learn, where B is 0."""
    lora_a, lora_b = matrices(layer)
    lora_b.zero_()
    lora_a[: len(a)].copy_(a)
    lora_b[:, : b.shape[1]].copy_(b)
    if (
        "default" in layer.lora_magnitude_vector
    ):  # W' = m (W + B A) / |W + B A|, rows: with m = |W + B A| it is W + B A
        weight = layer.get_base_layer().get_parameter("weight")
        magnitude = layer.lora_magnitude_vector["default"].get_parameter("weight")
        magnitude.copy_(torch.linalg.norm(weight + lora_b @ lora_a, dim=1))


@torch.no_grad()
def start_shira(layer: ShiraLayer, b: torch.Tensor, a: torch.Tensor) -> None:
    """Let SHiRA's entries be those that the change B A moves most, at what it makes of them."""
    weight = layer.shira_weight["default"]
    delta = (b @ a).to(weight)
    chosen = delta.abs().flatten().topk(weight.numel()).indices.sort().values
    weight.copy_(delta.flatten()[chosen])
    layer.shira_indices["default"] = torch.stack([chosen // delta.shape[1], chosen % delta.shape[1]]).int()


def start_from_principal(layer: LoraLayer, b: torch.Tensor, a: torch.Tensor) -> None:
    """Start at the principal part B A of the layer's weight, which stays where it is: the change is B' A' - B A.

    PiSSA and its kin take B A out of the frozen weight and learn it. An adapter for the weight as it is must hold
    both: the first half of its rank learns, the second is -B A for good.
    """
    rank = len(a)
    lora_a, lora_b = matrices(layer)
    with torch.no_grad():
        lora_a.copy_(torch.cat([a, a]))
        lora_b.copy_(torch.cat([b, -b], 1))
    learns = torch.arange(2 * rank, device=lora_a.device) < rank
    lora_a.register_hook(lambda gradient: gradient * learns[:, None])
    lora_b.register_hook(lambda gradient: gradient * learns)


def principal_factors(
    backbone: Backbone, method: str, rank: int, targets: list[str], images: torch.Tensor | None = None
) -> Factors:
    """PEFT's own factors of PiSSA (arXiv 2404.02948), OLoRA (2406.01775) or CorDA (2406.05223).

    Args:
        method: `pissa`, `olora` or `corda`.
        images: uint8 (N, 3, H, W), whose activations CorDA weighs the directions by.
    """
    backbone = copy.deepcopy(backbone)
    start: Any = method  # PEFT's type lists the names
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=start)
    if method == "corda":
        assert images is not None
        config.corda_config = CordaConfig(corda_method="ipm")
        preprocess_corda(backbone.model, config, _shown(backbone, images))
    wearing = wrap(backbone.model, config).get_base_model()
    layers = {name: module for name, module in wearing.named_modules() if isinstance(module, LoraLayer)}
    return {name: (b.detach(), a.detach()) for name, (a, b) in ((name, matrices(m)) for name, m in layers.items())}


def matrices(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """A, (r, in), and B, (out, r)."""
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    return a.get_parameter("weight"), b.get_parameter("weight")


def _shown(backbone: Backbone, images: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        for image in images.split(1):  # one sample at a time: PEFT multiplies its tokens as a matrix
            backbone.model(backbone.normalize(image))  # whose layers all see all tokens, as PEFT's hooks expect

    return run


def adapted_layers(model: nn.Module) -> Layers:
    """The layers of LoRA, DoRA or SHiRA by their path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (LoraLayer, ShiraLayer))}
