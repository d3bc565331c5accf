"""Which adapters to learn from, for a target domain of which a few labelled images are at hand: a bandit over sources.

    python examples/studies/choose_adapters.py --data DATA --surrogate runs/choice/07 \\
        --json docs/results/choose_adapters.json

FLAD (arXiv 2302.00674): every step takes the surrogate images of one adapter, and the reward for choosing it is the
cosine between the gradient of its loss and that of the target's loss. EXP3 and UCB1 are compared with choosing evenly
and with the gradient of the target alone, at equal cost: as many steps on as many images. The target is half of the
classes of vgg_flower/validation with 5 images each; the gain over the average of the adapters is measured on the other
half. The surrogate images are those of choose_recipe.py. No test class is read.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from lora_recycle import AdapterPool, DistillationConfig, MetaLoRATrainer, SurrogateDataset
from lora_recycle.adapters.places import find_adapters
from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.backbones.backbone import extract_features
from lora_recycle.evaluation.results import confidence
from lora_recycle.fewshot.accuracy import prototype_accuracy
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.fewshot.prototypes import class_prototypes, prototype_logits
from lora_recycle.fewshot.relations import relational_divergence
from lora_recycle.hub.embedded import pool_path
from lora_recycle.images.labelled import load_labelled_images
from lora_recycle.runtime.files import atomic_write


LR = 3e-4
SHOTS = 5  # target images of each class: two of them make its prototype, three are asked
BATCH = 16  # surrogate images of a step
WAYS_A_STEP = 4


class Even:
    """Every source as often as any other, in random order."""

    def __init__(self, arms: int, generator: torch.Generator):
        self.arms, self.generator, self.order = arms, generator, []

    def choose(self) -> int:
        self.order = self.order or torch.randperm(self.arms, generator=self.generator).tolist()
        return self.order.pop()

    def learn(self, arm: int, reward: float) -> None:
        pass


class Exp3:
    """Exponential weights of rewards divided by the chance of their arm, mixed with a share of even choice."""

    def __init__(self, arms: int, generator: torch.Generator):
        self.totals, self.step, self.generator = torch.zeros(arms), 0, generator

    def chances(self) -> torch.Tensor:
        arms, step = len(self.totals), self.step + 1
        rate = min(1 / arms, math.sqrt(math.log(arms) / (arms * step)))
        return (1 - arms * rate) * (rate * self.totals).softmax(0) + rate

    def choose(self) -> int:
        return int(self.chances().multinomial(1, generator=self.generator))

    def learn(self, arm: int, reward: float) -> None:
        self.totals[arm] += reward / self.chances()[arm]
        self.step += 1


class Ucb1:
    """The arm of the highest mean reward plus what may be missing of it; each arm once at first."""

    def __init__(self, arms: int, generator: torch.Generator):
        self.totals, self.counts = torch.zeros(arms), torch.zeros(arms)

    def choose(self) -> int:
        if (self.counts == 0).any():
            return int((self.counts == 0).nonzero()[0])
        bonus = (2 * math.log(self.counts.sum()) / self.counts).sqrt()
        return int((self.totals / self.counts + bonus).argmax())

    def learn(self, arm: int, reward: float) -> None:
        self.totals[arm] += reward
        self.counts[arm] += 1


WAYS = {"target alone": None, "all, evenly": Even, "EXP3": Exp3, "UCB1": Ucb1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--target", default="vgg_flower")
    parser.add_argument("--surrogate", type=Path, required=True)
    parser.add_argument("--pool", type=Path, default=pool_path())
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    surrogate = SurrogateDataset.from_pretrained(args.surrogate)
    inverted = [entry["adapter"]["sha256"] for entry in surrogate.manifest["shards"]]
    pool = AdapterPool.from_pretrained([p for p in find_adapters(args.pool) if pull_adapter(p).sha256 in inverted])
    own = [entry["adapter"]["name"].startswith(args.target) for entry in surrogate.manifest["shards"]]
    backbone = pool.backbone
    path = args.data / args.target / "validation.parquet"
    data = load_labelled_images(path, backbone.image_size, int(backbone.processor.resample), 30)
    classes = torch.randperm(len(data.label_names), generator=torch.Generator().manual_seed(0))
    seen, asked = classes[: len(classes) // 2], classes[len(classes) // 2 :]
    shown = torch.stack([data.pixels[data.labels == label][:SHOTS] for label in seen])  # (classes, SHOTS, 3, H, W)
    held = torch.isin(data.labels, asked)
    drawn = {k: sample_episodes(data.labels[held], 5, k, 15, 600, seed=1) for k in (1, 5)}
    rows, average = [], None
    for name, bandit in {"average of the adapters": None, **WAYS}.items():
        student = MetaLoRATrainer(pool, None, DistillationConfig(steps=0, rank=16, init="average")).student
        picks = None if average is None else learn(student, bandit, surrogate, shown, args.steps)
        features = extract_features(student.backbone, data.pixels[held])
        found = {k: prototype_accuracy(features, episodes) for k, episodes in drawn.items()}
        average = average or found
        gain = {k: [round(number, 2) for number in confidence(found[k] - average[k])] for k in found}
        share = sum(own[arm] for arm in picks) / len(picks) if picks else None
        rows.append({"way": name, "gain": gain, "own_share": share, "picks": picks})
        print(json.dumps(rows[-1]), flush=True)
    settings = {"target": args.target, "steps": args.steps, "own_adapters": sum(own), "adapters": len(own), "seed": 0}
    atomic_write(args.json, json.dumps({**settings, "rows": rows}, indent=1).encode())


def learn(student, bandit, surrogate: SurrogateDataset, shown: torch.Tensor, steps: int) -> list[int]:
    """Let the student take `steps` steps, each along the sum of the target's gradient and that of one adapter; the
    adapters that were chosen. Without a bandit the target's images take the place of the adapter's."""
    generator = torch.Generator().manual_seed(0)
    shards = [surrogate.shard(i) for i in range(surrogate.num_shards)]
    sources = None if bandit is None else bandit(len(shards), generator)
    parameters, picks = student.eval().trainable(), []
    optimizer = torch.optim.Adam(parameters, lr=LR)
    for _ in range(steps):
        gradient = gradient_of(target_loss(student, shown, WAYS_A_STEP, generator), parameters)
        if sources is None:
            other = gradient_of(target_loss(student, shown, BATCH // SHOTS, generator), parameters)
        else:
            picks.append(sources.choose())
            other = gradient_of(source_loss(student, shards[picks[-1]], generator), parameters)
            sources.learn(picks[-1], cosine(gradient, other))
        for parameter, one, two in zip(parameters, gradient, other, strict=True):
            parameter.grad = one + two
        optimizer.step()
    return picks


def target_loss(student, shown: torch.Tensor, ways: int, generator: torch.Generator) -> torch.Tensor:
    """Cross-entropy of some images of some classes against prototypes of the others: (classes, SHOTS, 3, H, W)."""
    chosen = shown[torch.randperm(len(shown), generator=generator)[:ways]]
    chosen = chosen[:, torch.randperm(SHOTS, generator=generator)]
    features = student(student.backbone.normalize(chosen.flatten(0, 1))).float().unflatten(0, (ways, SHOTS))
    way = torch.arange(ways)
    prototypes = class_prototypes(features[:, :2].flatten(0, 1), way.repeat_interleave(2), ways)
    logits = prototype_logits(features[:, 2:].flatten(0, 1), prototypes, temperature=0.1)
    return F.cross_entropy(logits, way.repeat_interleave(SHOTS - 2))


def source_loss(student, shard, generator: torch.Generator) -> torch.Tensor:
    """How far the student's similarities of an adapter's surrogate images are from the adapter's own."""
    rows = torch.randperm(len(shard), generator=generator)[:BATCH]
    features = student(student.backbone.normalize(shard.pixels[rows])).float()
    return relational_divergence(features, shard.teacher_features[rows].float())


def gradient_of(loss: torch.Tensor, parameters) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, parameters))


def cosine(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    product = sum((a * b).sum() for a, b in zip(one, other, strict=True))
    lengths = [sum(a.square().sum() for a in part).sqrt() for part in (one, other)]
    return (product / (lengths[0] * lengths[1]).clamp_min(1e-12)).item()


if __name__ == "__main__":
    main()
