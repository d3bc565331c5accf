"""The same steps as one writes them with PyTorch, transformers and PEFT alone: the yardstick of the benchmark.

No mistakes are built in: base weights need no gradient, attention is SDPA, nothing is recomputed within a step but
what the plain way recomputes (the teacher in each episode, images that several episodes share).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel


RANK = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def tuned_classifier(config: ViTConfig) -> PeftModel:
    """A ViT with a head and a LoRA on all linear layers, all weights random."""
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, modules_to_save=["classifier"])
    return _moved(get_peft_model(ViTForImageClassification(config), lora))


def wearing(vit: ViTModel) -> PeftModel:
    """A ViT without a head that wears a random LoRA on all linear layers."""
    return _moved(get_peft_model(vit, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)))


def _moved(model: PeftModel) -> PeftModel:
    """Its LoRA away from zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    return model.eval()


class Normalize(nn.Module):
    """Images in [0, 1], or uint8, to pixel values with mean and standard deviation one half."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return ((images.float() / 255 if images.dtype == torch.uint8 else images) - 0.5) / 0.5


def inversion_step(teacher: PeftModel, starts: torch.Tensor, labels: torch.Tensor, autocast) -> Callable[[], None]:
    """LoRA inversion: pixels (B, 3, S, S) by Adam, cross-entropy and total variation, jitter and clipping."""
    pixels, normalize = nn.Parameter(starts.clone()), Normalize()
    optimizer = torch.optim.Adam([pixels], lr=0.05)
    teacher.requires_grad_(False)

    def step() -> None:
        dy, dx = torch.randint(-4, 5, (2,)).tolist()
        images = pixels.roll((dy, dx), (-2, -1))
        with autocast():
            logits = teacher(pixel_values=normalize(images)).logits
        variation = images.diff(dim=-2).abs().mean() + images.diff(dim=-1).abs().mean()
        loss = F.cross_entropy(logits.float(), labels) + 0.1 * variation
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)

    return step


def distillation_step(student: PeftModel, teacher: PeftModel, images, labels, draw, autocast) -> Callable[[], None]:
    """Meta-training: episode by episode, teacher and student forwarded, KL of the queries' class probabilities.

    Args:
        images: uint8 (N, 3, S, S), `labels` (N,) their classes in the teacher's head.
        draw: gives the episodes of a step, a list of (support, query) with indices (ways, shots), (ways, queries).
    """
    normalize = Normalize()
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        episodes = draw()
        for support, query in episodes:
            chosen, classes = torch.cat([support.flatten(), query.flatten()]), labels[support[:, 0]]
            pixel_values = normalize(images[chosen])
            with autocast():
                features = student(pixel_values=pixel_values).last_hidden_state[:, 0].float()
            prototypes = features[: support.numel()].view(*support.shape, -1).mean(1)
            scores = F.normalize(features[support.numel() :], dim=-1) @ F.normalize(prototypes, dim=-1).T / 0.1
            with torch.no_grad(), autocast():
                target = teacher(pixel_values=pixel_values[support.numel() :]).logits[:, classes].float()
            loss = F.kl_div(scores.log_softmax(1), target.log_softmax(1), log_target=True, reduction="batchmean")
            (loss / len(episodes)).backward()
        optimizer.step()

    return step


@torch.inference_mode()
def embed(model: PeftModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) to (B, D)."""
    return model(pixel_values=pixel_values).last_hidden_state[:, 0]


@torch.inference_mode()
def fit(model: PeftModel, pixel_values: torch.Tensor, labels: torch.Tensor, ways: int) -> torch.Tensor:
    """Prototypes (ways, D), class by class."""
    return torch.stack([embed(model, pixel_values[labels == c]).mean(0) for c in range(ways)])


@torch.inference_mode()
def predict(model: PeftModel, pixel_values: torch.Tensor, prototypes: torch.Tensor) -> list[int]:
    """The class of each image."""
    scores = F.normalize(embed(model, pixel_values), dim=-1) @ F.normalize(prototypes, dim=-1).T / 0.1
    return scores.softmax(-1).argmax(-1).tolist()


@torch.inference_mode()
def evaluate(model: PeftModel, images: torch.Tensor, episodes) -> float:
    """Accuracy over episodes, each forwarded by itself."""
    normalize, correct = Normalize(), []
    for episode in episodes:
        ways, shots = episode.support.shape
        prototypes = embed(model, normalize(images[episode.support.flatten()])).view(ways, shots, -1).mean(1)
        found = predict(model, normalize(images[episode.query]), prototypes)
        correct.append((torch.tensor(found) == episode.query_labels).float().mean())
    return torch.stack(correct).mean().item()
