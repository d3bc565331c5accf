"""The transformers pipeline of meta-LoRAs: `pipeline("few-shot-image-classification")`. Importing registers it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Pipeline
from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY

from ..errors import ConfigError
from .meta_lora import MetaLoRAForFewShotClassification


TASK = "few-shot-image-classification"


class FewShotImageClassificationPipeline(Pipeline):
    """Classifies images after a look at a support set, given at construction or at a call.

    Args:
        model ([`MetaLoRAForFewShotClassification`]): or, through `transformers.pipeline`, its repo id or folder. Its
            head must not be transductive.
        **kwargs: what every pipeline takes, `support_images` and `support_labels` as
            [`MetaLoRAForFewShotClassification.fit`] takes them, and `top_k`, how many classes to return (all by
            default). A support set given at a call replaces the task that was there. A model that was saved fitted
            needs none.

    `transformers.pipeline` wants its `revision` in the base model's repo too. To pin the meta-LoRA alone, pass a model
    that [`MetaLoRAForFewShotClassification.from_pretrained`] loaded.

    A call takes an image (PIL, path or address) or a list of them, and returns a list of `{"label", "score"}` for
    each, best first.
    """

    # transformers types these by their default, None
    _load_tokenizer = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_processor = False  # type: ignore[assignment]
    model: Any  # a `MetaLoRAForFewShotClassification`, not the `PreTrainedModel` that other pipelines have

    def __init__(self, model: MetaLoRAForFewShotClassification, **kwargs: Any):
        if model.head.transductive:
            raise ConfigError(
                f"The head {model.head.name} classifies a set of images together, and a pipeline takes them one by "
                "one. Use model.predict(images), or load the model with another head."
            )
        # the model's own processor: with it transformers can form batches
        worn: Any = model
        super().__init__(model=worn, **{"image_processor": model.backbone.processor, **kwargs})

    def _sanitize_parameters(  # type: ignore[override]  # transformers' own pipelines name their arguments too
        self,
        support_images: Sequence[Any] | None = None,
        support_labels: Sequence[Any] | None = None,
        top_k: int | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if (support_images is None) != (support_labels is None):
            raise ConfigError("support_images and support_labels go together: one label for each image.")
        if support_images is not None:
            self.model.fit([_fetched(image) for image in support_images], support_labels)
        return {}, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, image: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"pixel_values": self.model.preprocess(_fetched(image))}

    def _forward(self, inputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        return {"scores": self.model.probabilities(self.model.features(inputs["pixel_values"]))}

    def postprocess(  # type: ignore[override]
        self, outputs: dict[str, Any], top_k: int | None = None
    ) -> list[dict[str, Any]]:
        scores = outputs["scores"][0].tolist()
        rows = [{"label": n, "score": s} for n, s in zip(self.model.label_names, scores, strict=True)]
        return sorted(rows, key=lambda row: -row["score"])[:top_k]


def _fetched(image: Any) -> Any:
    """An image at an address as PIL; anything else unchanged."""
    is_address = isinstance(image, str) and image.startswith(("http://", "https://"))
    return load_image(image) if is_address else image


class _Loader:
    """What `transformers.pipeline` calls with a repo id or folder."""

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        dtype: Any = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **_: Any,
    ) -> MetaLoRAForFewShotClassification:
        # transformers asks the base model for the same revision, and gives it here with the base's commit attached
        return MetaLoRAForFewShotClassification.from_pretrained(
            name,
            revision=None if revision in (None, "main") else str(revision),
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            dtype=None if dtype == "auto" else dtype,
        )


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=FewShotImageClassificationPipeline, pt_model=_Loader, type="image"
)
