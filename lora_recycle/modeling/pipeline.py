"""The transformers pipeline of meta-LoRAs: `pipeline("few-shot-image-classification")`. Importing registers it."""

from __future__ import annotations

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

    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _load_processor = False

    def __init__(self, model: MetaLoRAForFewShotClassification, **kwargs):
        if model.head.transductive:
            raise ConfigError(
                f"The head {model.head.name} classifies a set of images together, and a pipeline takes them one by "
                "one. Use model.predict(images), or load the model with another head."
            )
        # the model's own processor: with it transformers can form batches
        super().__init__(model=model, **{"image_processor": model.backbone.processor, **kwargs})

    def _sanitize_parameters(self, support_images=None, support_labels=None, top_k=None):
        if (support_images is None) != (support_labels is None):
            raise ConfigError("support_images and support_labels go together: one label for each image.")
        if support_images is not None:
            self.model.fit([_fetched(image) for image in support_images], support_labels)
        return {}, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, image) -> dict[str, Any]:
        return {"pixel_values": self.model.preprocess(_fetched(image))}

    def _forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"scores": self.model.predict_proba(inputs["pixel_values"])}

    def postprocess(self, outputs: dict[str, Any], top_k: int | None = None) -> list[dict[str, Any]]:
        scores = outputs["scores"][0].tolist()
        rows = [{"label": n, "score": s} for n, s in zip(self.model.label_names, scores, strict=True)]
        return sorted(rows, key=lambda row: -row["score"])[:top_k]


def _fetched(image):
    """An image at an address as PIL; anything else unchanged."""
    is_address = isinstance(image, str) and image.startswith(("http://", "https://"))
    return load_image(image) if is_address else image


class _Loader:
    """What `transformers.pipeline` calls with a repo id or folder."""

    @classmethod
    def from_pretrained(
        cls, name, *, revision=None, dtype=None, token=None, cache_dir=None, local_files_only=False, **_
    ):
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
