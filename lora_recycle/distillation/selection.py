"""What a distillation ends with, chosen by surrogate images that it was not trained on: no real image is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..relations import relational_divergence
from .images import SurrogateImages
from .teachers import TeacherGroup


#: Most images of a group that are compared with each other: the cost of a look is bounded.
MOST = 256


@dataclasses.dataclass
class Held:
    """Held-out images of one group (N,) and the teachers' features of them, float16 (N, D)."""

    images: torch.Tensor
    features: torch.Tensor


def hold_out(groups: list[TeacherGroup], share: float) -> tuple[list[TeacherGroup], list[Held]]:
    """Take every so-manyth image out of the training of its group, `MOST` at most.

    The images of a shard lie in random order, so each class and each adapter gives its part. A group that would be
    left with fewer than 4 images on either side gives none.
    """
    training, held = [], []
    for group in groups:
        count = len(group.trained)
        number = min(MOST, round(share * count))
        if number < 4 or count - number < 4:
            training.append(group)
            continue
        out = torch.linspace(0, count - 1, number).round().long()
        kept = torch.ones(count, dtype=torch.bool)
        kept[out] = False
        rows = group.trained[out]
        training.append(dataclasses.replace(group, trained=group.trained[kept]))
        held.append(Held(group.images[rows], group.features.read(rows)))
    return training, held


@torch.inference_mode()
def divergence(
    features: Callable[[torch.Tensor], torch.Tensor], held: list[Held], scale: float, batch_size: int = 128
) -> float:
    """Relational divergence from the teachers on held-out images, mean over the groups.

    It is the loss of training, so it needs neither real images nor labels. Each group counts alike, however many
    adapters it has: a meta-LoRA that gave up a small domain for a large one would not be chosen.

    Args:
        features: image numbers (B,) to the network's features (B, D).
        scale: `similarity_scale` of the recipe.
    """
    values = []
    for group in held:
        seen = torch.cat([features(part).float() for part in group.images.split(batch_size)])
        values.append(relational_divergence(seen, group.features.to(seen.device).float(), scale))
    return torch.stack(values).mean().item()
