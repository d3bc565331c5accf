"""The upper bound with real images: the same LoRA, trained by prototypes on the real images of training classes.

    python examples/studies/real_data_reference.py --data DATA/cifar_fs/train.parquet --output runs/real/cifar_fs
    lora-recycle evaluate runs/real/cifar_fs --data DATA/cifar_fs/test.parquet --pool demo

Meta-training of a prototypical network (arXiv 1703.05175) on the student of distillation: the frozen backbone with one
LoRA on all linear layers, of the rank, schedule and seed of `lora-recycle distill`, in place of whose
surrogate images stand episodes of the real ones that the adapters were tuned on. `--data` may name several files, as
for a mixed pool: each step draws its episodes from one of them after the other. The result is a meta-LoRA like any
other, for `evaluate` and as one of the `meta_loras` of a `benchmark` recipe. A killed run goes on from its last
checkpoint. `accelerate launch --mixed_precision bf16 examples/studies/real_data_reference.py ...` runs in bfloat16.
Of omniglot_small's training split this reads 33 characters that the shipped pool leaves out.
"""

import argparse
import dataclasses
import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from lora_recycle import AdapterPool, Backbone, DistillationConfig
from lora_recycle.distillation.checkpoints import Checkpoints
from lora_recycle.distillation.schedule import learning_rate
from lora_recycle.distillation.student import Student
from lora_recycle.fewshot.prototypes import class_prototypes, prototype_logits
from lora_recycle.hub.embedded import backbone_name, pool_path
from lora_recycle.images.labelled import LabelledImages, load_labelled_images
from lora_recycle.pool.training import augment
from lora_recycle.runtime.launch import choose_device, mixed_precision


#: What differs from the defaults of distillation: queries enough to learn from, no relational loss.
DEFAULTS = {"steps": 400, "lr": 1e-3, "episodes": 4, "ways": 5, "shots": 1, "queries": 5, "init": "zero"}


def draw_episode(data: LabelledImages, classes: dict[int, torch.Tensor], config, generator: torch.Generator):
    """Images of one episode, uint8 (W x (S + Q), 3, H, W), way by way, support first."""
    least = config.shots + config.queries
    usable = [label for label, found in classes.items() if len(found) >= least]
    chosen = torch.randperm(len(usable), generator=generator)[: config.ways].tolist()
    index = [classes[usable[c]][torch.randperm(len(classes[usable[c]]), generator=generator)[:least]] for c in chosen]
    return data.pixels[torch.cat(index)]


def episode_loss(features: torch.Tensor, config: DistillationConfig) -> torch.Tensor:
    """Cross-entropy of the queries against the support's prototypes: (W x (S + Q), D) to a scalar."""
    features = features.view(-1, config.shots + config.queries, features.shape[-1])
    support, query = features[:, : config.shots], features[:, config.shots :]
    ways = torch.arange(len(features), device=features.device)
    prototypes = class_prototypes(support.flatten(0, 1), ways.repeat_interleave(config.shots), len(ways))
    logits = prototype_logits(query.flatten(0, 1), prototypes, config.metric, config.temperature)
    return F.cross_entropy(logits, ways.repeat_interleave(config.queries))


def train(
    backbone: Backbone,
    sets: list[LabelledImages],
    config: DistillationConfig,
    work: Path,
    pool: AdapterPool | None = None,
    flip: bool = True,
    progress: bool = True,
) -> Student:
    """Meta-train a student; `pool` gives the start where `config.init` is `average`.

    The episodes of a step depend on the seed and its number alone, so a run that goes on draws the same ones.
    """
    student = Student(backbone, config.rank, backbone_name(backbone.name), config.seed)
    if config.init == "average":
        student.start_from_average(pool)
    parameters = student.trainable()
    optimizer = torch.optim.Adam(parameters, lr=config.lr)
    sums = [hashlib.sha256(data.pixels.numpy()).hexdigest() for data in sets]
    checkpoints = Checkpoints(work, {"config": config.to_dict(), "data": sums, "flip": flip})
    start, history = checkpoints.load(parameters, optimizer)
    by_class, accelerator = [data.by_class() for data in sets], mixed_precision()
    for step in tqdm(range(start, config.steps), initial=start, total=config.steps, disable=not progress):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        which = step % len(sets)
        drawn = [draw_episode(sets[which], by_class[which], config, generator) for _ in range(config.episodes)]
        images = augment(torch.cat(drawn), flip, generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        with accelerator.autocast():
            features = student(backbone.normalize(images))
        features = features.float()
        losses = [episode_loss(part, config) for part in features.split([len(one) for one in drawn])]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.setdefault("prototype", []).append(loss.item())
        if (step + 1) % config.save_steps == 0 or step + 1 == config.steps:
            checkpoints.save(parameters, optimizer, step + 1, history)
    return student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="training images, one set or several")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where the checkpoint lies (default: OUTPUT-work)")
    parser.add_argument("--base-model", default="demo")
    parser.add_argument("--pool", nargs="+", metavar="POOL", help="adapters whose average is the start")
    parser.add_argument("--max-per-class", type=int, help="use at most so many images of each class")
    parser.add_argument("--no-flip", action="store_true", help="mirror no image: where left and right matter")
    parser.add_argument("--device", help="as torch names it")
    for name in ("steps", "rank", "shots", "ways", "queries", "episodes", "seed"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--lr", type=float)
    args = parser.parse_args()
    fields = {f.name for f in dataclasses.fields(DistillationConfig)}
    given = {key: value for key, value in vars(args).items() if key in fields and value is not None}
    init = {"init": "average"} if args.pool else {}
    config = DistillationConfig(**{**DEFAULTS, **init, **given})
    backbone, pool = Backbone.from_pretrained(args.base_model, device=choose_device(args.device)), None
    if args.pool:
        sources = [pool_path() if name == "demo" else name for name in args.pool]
        pool = AdapterPool.from_pretrained(sources, backbone=backbone)
    size, resample = backbone.image_size, int(backbone.processor.resample)
    sets = [load_labelled_images(path, size, resample, args.max_per_class, "train", config.seed) for path in args.data]
    work = args.work or args.output.with_name(f"{args.output.name}-work")
    student = train(backbone, sets, config, work, pool, flip=not args.no_flip)
    settings = {"real_data": [data.name for data in sets], "meta_training": config.to_dict()}
    model = student.to_model({"metric": config.metric, **settings})
    model.save_pretrained(args.output)
    print(f"Next: lora-recycle evaluate {args.output} --data TEST_IMAGES")


if __name__ == "__main__":
    main()
