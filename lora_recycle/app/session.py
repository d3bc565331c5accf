"""What the page does, without the page: a task from named examples, its answers, and where the model looked."""

from __future__ import annotations

import dataclasses
import io
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..backbones.backbone import Backbone
from ..errors import DataError
from ..fewshot.domains import SHARED
from ..modeling.classifier import SharedTask
from ..modeling.meta_lora import MetaLoRAForFewShotClassification
from ..modeling.preprocessing import pixel_batches


MAX_IMAGES = 200  # examples, or new images, that one visitor may have looked at in one go
FOLDER_IN_ZIP = "fitted_task"
#: Between the probabilities of the best two classes; what is nearer, as 55 to 45, counts as unsure.
CLEAR_MARGIN = 0.2


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model says of one image.

    Args:
        pixels: uint8 (3, S, S), what the backbone saw.
        probabilities: by class, the likeliest first.
        attention: (P,), the share of the attention that each patch got, row by row; they sum to 1.
        domain: whose expert answered; None of a meta-LoRA without experts.
    """

    pixels: torch.Tensor
    probabilities: dict[str, float]
    attention: torch.Tensor
    domain: str | None = None

    @property
    def margin(self) -> float:
        """How much likelier the likeliest class is than the next one."""
        first, second, *_ = self.probabilities.values()
        return first - second

    @property
    def unsure(self) -> bool:
        """Whether the best two classes are about equally likely."""
        return self.margin < CLEAR_MARGIN


class FewShotSession:
    """A task of named classes on a meta-LoRA.

        session = FewShotSession(model)
        session.add_class("cat", ["cat1.jpg", "cat2.jpg"])
        session.add_class("dog", ["dog1.jpg"])
        (answer,) = session.classify(["new.jpg"])
        session.save()  # a ZIP of the meta-LoRA with the task

    The model may serve several sessions, one call at a time. Each call fits a task of its own, which takes one forward
    pass, so that no session sees the classes of another.

    Args:
        model ([`MetaLoRAForFewShotClassification`]): which meta-LoRA.
    """

    def __init__(self, model: MetaLoRAForFewShotClassification):
        self.model = model
        self.examples: dict[str, list[Any]] = {}

    def add_class(self, name: str, images: Sequence[Any]) -> None:
        """Name a class and show some images of it, in any form that `fit` takes.

        Raises:
            DataError: no name, a name that is taken, no images, or too many.
        """
        name = " ".join(name.split())
        if not name:
            raise DataError("Give the class a name.")
        if name in self.examples:
            raise DataError(f"Two classes are called {name}. Give each its own name.")
        if not images:
            raise DataError(f"{name} has no images yet. Add some, or clear its name.")
        _check_number(sum(map(len, self.examples.values())) + len(images), "examples")
        self.examples[name] = list(images)

    def remove_class(self, name: str) -> None:
        """Forget a class and its images. Raises `DataError` where there is none of this name."""
        if self.examples.pop(" ".join(name.split()), None) is None:
            raise DataError(f"There is no class {name}.")

    def fit(self, skipped: list[str] | None = None) -> SharedTask:
        """A new task on the model, fitted to the classes so far.

        Args:
            skipped: takes why images cannot be read, which are left out.

        Raises:
            DataError: fewer than two classes, or an image, with `skipped` a whole class, that cannot be read.
        """
        failures: dict[int, str] | None = None if skipped is None else {}
        task = self.model.new_task().fit(*self._support(), failures=failures)
        if skipped is not None:
            skipped += (failures or {}).values()
        return task

    def classify(self, images: Sequence[Any], skipped: list[str] | None = None) -> list[Answer]:
        """An answer for each image, without those that `skipped` takes.

        Raises:
            DataError: as `fit`; or no images, too many, or none that can be read.
        """
        if not images:
            raise DataError("Add new images to classify first.")
        _check_number(len(images), "new images")
        task = self.fit(skipped)
        found = task.domain.name if task.domain else None
        domain = found or SHARED
        failures: dict[int, str] | None = None if skipped is None else {}
        backbone = self.model.network(domain)
        parts = list(pixel_batches(list(images), backbone, 64, failures))
        if skipped is not None:
            skipped += (failures or {}).values()
        if not parts:
            raise DataError(f"No new image can be read. The first: {next(iter((failures or {}).values()))}")
        pixels = torch.cat(parts)
        with torch.inference_mode():
            rows = task.probabilities(torch.cat([self.model.features(part, domain) for part in pixels.split(64)]))
        attention = torch.cat([patch_attention(backbone, part) for part in pixels.split(64)]).cpu()
        names, seen = task.label_names, _as_seen(backbone, pixels)
        return [
            Answer(picture, dict(sorted(zip(names, row, strict=True), key=lambda item: -item[1])), looked, found)
            for picture, row, looked in zip(seen, rows.tolist(), attention, strict=True)
        ]

    def save(self, skipped: list[str] | None = None) -> bytes:
        """The meta-LoRA with the fitted task, as a ZIP file of the folder that `save_pretrained` writes.

        Args:
            skipped: as of `fit`.

        Raises:
            DataError: as `fit`.
        """
        packed = io.BytesIO()
        with tempfile.TemporaryDirectory(prefix="lora-recycle-") as folder:
            failures: dict[int, str] | None = None if skipped is None else {}
            self.model.fit(*self._support(), failures=failures).save_pretrained(folder)
            if skipped is not None:
                skipped += (failures or {}).values()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
                for path in sorted(Path(folder).rglob("*")):
                    archive.write(path, f"{FOLDER_IN_ZIP}/{path.relative_to(folder).as_posix()}")
        return packed.getvalue()

    def _support(self) -> tuple[list[Any], list[str]]:
        """All examples and their classes."""
        if len(self.examples) < 2:
            raise DataError("Show images of at least two classes first.")
        images = [image for images in self.examples.values() for image in images]
        return images, [name for name, images in self.examples.items() for _ in images]


@torch.inference_mode()
def patch_attention(backbone: Backbone, pixel_values: torch.Tensor) -> torch.Tensor:
    """The share of the attention of the last layer that each patch gets, mean over heads.

    It is the attention of CLS, whose token the answer rests on; of all tokens where a family has no CLS.

    Args:
        pixel_values: (B, 3, S, S), normalised.

    Returns:
        (B, P), rows sum to 1.
    """
    with backbone.record_attention(len(backbone.layers) - 1) as attention:
        backbone(pixel_values.to(backbone.device))
    patches = attention.row[:, backbone.num_prefix_tokens :]
    return patches / patches.sum(-1, keepdim=True)


def _as_seen(backbone: Backbone, pixel_values: torch.Tensor) -> torch.Tensor:
    """Normalised images back to uint8 (B, 3, S, S)."""
    pixels = pixel_values.to(backbone.device).float() * backbone.std + backbone.mean
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def _check_number(count: int, what: str) -> None:
    if count > MAX_IMAGES:
        raise DataError(f"{count} {what} are more than the page takes ({MAX_IMAGES}). Use lora-recycle predict.")
