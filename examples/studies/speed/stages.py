"""The library's own steps, each beside its baseline, on random weights. The steps are those that the library runs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from lora_recycle import AdapterPool, Backbone, DistillationConfig, InversionConfig, LoRAInverter, MetaLoRATrainer
from lora_recycle.backbones.backbone import extract_features
from lora_recycle.distillation.student import Student
from lora_recycle.fewshot.accuracy import prototype_accuracy
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.modeling.meta_lora import MetaLoRAForFewShotClassification
from lora_recycle.modeling.preprocessing import pixel_batches, to_pixel_values
from lora_recycle.surrogate.dataset import Shard, SurrogateDataset, save_shard, write_manifest

from . import baselines
from .measure import Case


#: Pixels, patch size, width, layers and heads.
SHAPES = {
    "tiny": (64, 8, 192, 6, 3),
    "vit-s16": (224, 16, 384, 12, 6),
    "vit-b16": (224, 16, 768, 12, 12),
}
CLASSES, WAYS, BATCH, MASKED = 10, 5, 64, (0, 25, 50, 75)


@dataclasses.dataclass
class World:
    """What all stages share.

    Args:
        pool: one adapter with a head of `CLASSES` classes, on the library's view of the network.
        teacher: the same network, adapter and head as PEFT runs them.
        dtype: float32, or bfloat16: autocast where something is trained, the weights' own type where it is used.
        folder: for surrogate data.
        batch: images of a training step, or a few more.
    """

    pool: AdapterPool
    teacher: torch.nn.Module
    dtype: torch.dtype
    folder: Path
    batch: int

    @property
    def backbone(self) -> Backbone:
        return self.pool.backbone

    @property
    def device(self) -> torch.device:
        return self.pool.backbone.device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def bare(self) -> Backbone:
        """A copy of the backbone without any adapter."""
        return copy.deepcopy(self.backbone)

    def pixels(self, count: int) -> torch.Tensor:
        """Random images, uint8 (count, 3, S, S), on the CPU."""
        return torch.randint(0, 256, (count, 3, *(self.backbone.image_size,) * 2), dtype=torch.uint8)


def make_world(backbone: str, device: torch.device, dtype: torch.dtype, folder: Path) -> World:
    """Random weights of a shape of `SHAPES`, and a random adapter saved by PEFT."""
    size, patch, width, layers, heads = SHAPES[backbone]
    config = ViTConfig(
        image_size=size,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_labels=CLASSES,
    )
    teacher = baselines.tuned_classifier(config)
    teacher.save_pretrained(folder / "adapter")
    vit = ViTModel(config, add_pooling_layer=False)
    own = {name.replace(".base_layer", ""): value for name, value in teacher.base_model.model.vit.state_dict().items()}
    vit.load_state_dict({name: value for name, value in own.items() if "lora_" not in name})
    processor = ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    view = Backbone(vit, processor, backbone).to(device)
    pool = AdapterPool.from_pretrained(folder / "adapter", backbone=view)
    batch = 120 if device.type != "cpu" else 60 if backbone == "tiny" else 10
    return World(pool, teacher.to(device), dtype, folder, batch)


@contextlib.contextmanager
def inversion(world: World) -> Iterator[list[Case]]:
    """One iteration on a batch, with all patches, and with 75% of them dropped after a third of the layers."""
    size, count, layers = world.backbone.image_size, min(world.batch, 64), len(world.backbone.layers)
    starts, labels = torch.rand(count, 3, size, size), torch.arange(count) % CLASSES
    last = max(0, layers // 3 - 1)
    cases = []
    with world.pool.folded(0):
        for name, prune in (("plain", {}), ("pruned_75", {last: 0.25})):
            inverter = LoRAInverter(world.pool, InversionConfig(prune=prune, stop_at=1.0))
            batch = inverter.batch(0, starts, labels, torch.Generator().manual_seed(0))
            kept = (last + 1 + 0.25 * (layers - last - 1)) / layers if prune else 1.0
            cases.append(Case(f"inversion_{name}", batch.step, count, kept))
        step = baselines.inversion_step(
            world.teacher, starts.to(world.device), labels.to(world.device), world.autocast
        )
        yield [*cases, Case("inversion_baseline", step, count, 1.0)]


@contextlib.contextmanager
def distillation(world: World) -> Iterator[list[Case]]:
    """One meta-training step on episodes of one adapter each, its own head the teacher, 0 to 75% of patches masked."""
    queries = 5 if world.batch >= 30 else 1
    episodes = max(1, world.batch // (WAYS * (1 + queries)))
    config = DistillationConfig(
        steps=10**6,
        rank=baselines.RANK,
        validation_fraction=0.0,
        relational_weight=0.0,
        kl_weight=1.0,
        episodes=episodes,
        ways=WAYS,
        shots=1,
        queries=queries,
    )
    images = world.pixels(CLASSES * (1 + queries) * (2 if episodes > 1 else 1))
    labels = torch.arange(len(images)) % CLASSES
    count, cases, trainers = episodes * WAYS * (1 + queries), [], []
    with contextlib.ExitStack() as stack:
        for masked in MASKED:
            surrogate = save_surrogate(world, images, labels, 1 - masked / 100)
            trainer = MetaLoRATrainer(world.pool, surrogate, config)
            trainer.prepare(progress=False)
            stack.callback(trainer.close)
            trainers.append(trainer)
            step = _counting(trainer.step)
            cases.append(Case(f"distillation_masked_{masked}", step, count, 1 - masked / 100, _host_share(trainer)))
        sampler, generator = trainers[0].make_batch.sampler, torch.Generator().manual_seed(0)

        def draw() -> list[tuple[torch.Tensor, torch.Tensor]]:
            drawn = [sampler.single_source(generator) for _ in range(episodes)]
            return [(episode.support, episode.query) for episode in drawn]

        student = baselines.wearing(world.bare().model)
        step = baselines.distillation_step(
            student, world.teacher, images.to(world.device), labels.to(world.device), draw, world.autocast
        )
        yield [*cases, Case("distillation_baseline", step, count, 1.0)]


def _counting(step: Callable[[int], object]) -> Callable[[], object]:
    """A step that numbers itself."""
    numbers = itertools.count()
    return lambda: step(next(numbers))


def _host_share(trainer: MetaLoRATrainer) -> Callable[[], float]:
    return lambda: trainer.host_share


def save_surrogate(world: World, images: torch.Tensor, labels: torch.Tensor, keep_ratio: float) -> SurrogateDataset:
    """Random surrogate data of the world's adapter, of whose patches a random share is kept."""
    backbone, info = world.backbone, world.pool[0].info
    folder = world.folder / f"surrogate-{keep_ratio}"
    kept = None
    if keep_ratio < 1:
        order = torch.rand(len(images), backbone.num_patches).argsort(1)
        kept = order[:, : round(keep_ratio * backbone.num_patches)].sort(1).values.to(torch.int16)
    shard = Shard(
        {"name": info.name, "sha256": info.sha256, "labels": [str(c) for c in range(CLASSES)]},
        images,
        labels,
        torch.randn(len(images), CLASSES),
        torch.randn(len(images), backbone.hidden_size).half(),
        kept,
    )
    path = folder / "shards" / "0.safetensors"
    save_shard(path, shard, "random")
    return write_manifest(folder, {"config": {}}, [path])


@contextlib.contextmanager
def use(world: World) -> Iterator[tuple[MetaLoRAForFewShotClassification, torch.nn.Module]]:
    """The merged model, fitted, and the same as PEFT runs it, weights in the world's type."""
    student = Student(world.backbone, baselines.RANK, "random")
    worn = baselines.wearing(world.bare().model).to(world.dtype)
    with torch.no_grad():
        for parameter in student.trainable():
            parameter.normal_(0, 0.01)
    student.peft_model.to(world.dtype)
    model = student.to_model().merge()
    model.fit(world.pixels(2 * WAYS), list(range(WAYS)) * 2)
    yield model, worn


def images_and_pixel_values(world: World, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as the model takes them, uint8, and as the network below it does, normalised; both on the device."""
    pixels = world.pixels(count).to(world.device)
    return pixels, world.backbone.normalize(pixels).to(world.dtype)


@contextlib.contextmanager
def predict(world: World) -> Iterator[list[Case]]:
    """Predictions for images of the model's size, one and many at a time, and the preprocessing of 64 pictures by
    itself."""
    cases = []
    with use(world) as (model, worn):
        backbone = model.backbone  # merged; a copy elsewhere in memory would be up to a tenth faster or slower
        features, bare = (torch.inference_mode()(forward) for forward in (backbone.features, backbone.model))
        prototypes = model.prototypes.to(world.dtype)
        for count in (1, 64):
            images, x = images_and_pixel_values(world, count)
            cases += [
                Case(f"predict_{count}", lambda images=images: model.predict(images), count, 1.0),
                Case(f"predict_{count}_features", lambda x=x: features(x), count, 1.0),
                Case(f"predict_{count}_bare", lambda x=x: bare(x), count, 1.0),
                Case(f"predict_{count}_baseline", lambda x=x: baselines.predict(worn, x, prototypes), count, 1.0),
            ]
        side = 2 * world.backbone.image_size
        rng = np.random.default_rng(0)
        pictures = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(64)]
        processor = world.backbone.processor
        cases.append(Case("preprocess", lambda: to_pixel_values(pictures, world.backbone), 64))
        cases.append(Case("preprocess_baseline", lambda: processor(images=pictures, return_tensors="pt"), 64))
        yield cases


@contextlib.contextmanager
def files(world: World) -> Iterator[list[Case]]:
    """JPEG files of twice the model's side, decoded and classified; the same pixels without files; decoding alone.

    `host_share` of the first is the share of its time in which the forward waits for pixels.
    """
    count = 3 * BATCH if world.device.type != "cpu" or world.backbone.image_size < 200 else 16
    size, side = (BATCH if count > BATCH else 4), 2 * world.backbone.image_size
    rng, folder = np.random.default_rng(0), world.folder / "files"
    folder.mkdir()
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for path in paths:  # smooth, as photos are: noise would take much longer to decode
        small = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)
    seconds = {"waiting": 0.0, "all": 0.0}

    def waited(*arguments: object) -> Iterator[torch.Tensor]:
        batches = pixel_batches(*arguments)
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            seconds["waiting"] += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    with use(world) as (model, _):
        pixels = torch.cat([batch.cpu() for batch in pixel_batches(paths, world.backbone, size)])

        def classify() -> None:
            begun = time.perf_counter()
            with mock.patch("lora_recycle.modeling.networks.pixel_batches", waited):
                model.embed(paths, size)
            seconds["all"] += time.perf_counter() - begun

        def forward() -> None:
            with torch.inference_mode():
                for part in pixels.split(size):
                    model.features(part)

        def decode() -> None:
            for _ in pixel_batches(paths, world.backbone, size):
                pass

        share = lambda: seconds["waiting"] / seconds["all"]  # noqa: E731
        yield [
            Case("files", classify, count, 1.0, share),
            Case("files_features", forward, count, 1.0),
            Case("files_decoded", decode, count),
        ]


@contextlib.contextmanager
def fit(world: World) -> Iterator[list[Case]]:
    """A 5-way 5-shot support set of images of the model's size."""
    with use(world) as (model, worn):
        images, x = images_and_pixel_values(world, 5 * WAYS)
        labels = torch.arange(WAYS).repeat(5)
        names = labels.tolist()
        yield [
            Case("fit", lambda: model.fit(images, names), len(x), 1.0),
            Case("fit_baseline", lambda: baselines.fit(worn, x, labels.to(world.device), WAYS), len(x), 1.0),
        ]


@contextlib.contextmanager
def evaluate(world: World) -> Iterator[list[Case]]:
    """Episodes of 5 ways, 1 shot and 3 queries over a few images. More episodes widen the gap: only the baseline's
    forwards grow with them."""
    each, episodes = (20, 20) if world.batch > 10 else (5, 5)
    images, labels = world.pixels(each * WAYS), torch.arange(WAYS).repeat(each)
    drawn = sample_episodes(labels, WAYS, 1, 3, episodes, seed=0)
    with use(world) as (model, worn):
        on_device = images.to(world.device)

        def own() -> torch.Tensor:
            return prototype_accuracy(extract_features(model.backbone, images), drawn)

        def baseline() -> float:
            with world.autocast():
                return baselines.evaluate(worn, on_device, drawn)

        count = episodes * WAYS * 4
        yield [Case("evaluate", own, count, 1.0), Case("evaluate_baseline", baseline, count, 1.0)]


STAGES = {
    "inversion": inversion,
    "distillation": distillation,
    "predict": predict,
    "files": files,
    "fit": fit,
    "evaluate": evaluate,
}
