"""What choosing a domain is worth: every data set with the network that each task's support images choose.

    python examples/studies/domains.py --data DATA --work runs/domains --json docs/results/domains.json \
        --figure docs/figures/domains.svg                                                            # 15 minutes

5-way, 1,000 episodes, 15 queries, at most 40 images a class, on the validation and the test splits of the embedded
pool's data sets and on five sets of other kinds. Omniglot_small has no validation split; the 33 characters of its
training split that no adapter saw stand in for it. DATA holds `<set>/<split>.parquet`; far_sets.py makes the last two.
The experts are the exact averages of the pool's domains, before they are cut to a rank. Features are kept in `--work`,
so a run that was cut short continues. The rows: the shared network alone; the pool's exact average; the average of the
nearest of the three groups; the average of the domain's own adapters, which knows the domain; the best network of each
episode, which knows the answers; and the choice of `fit`.
"""

import argparse
import dataclasses
import json
from collections import Counter, defaultdict
from contextlib import nullcontext
from pathlib import Path

import torch
from common import validation_sets
from safetensors.torch import load_file

from lora_recycle import AdapterPool, MetaLoRAForFewShotClassification
from lora_recycle.backbones.backbone import extract_features
from lora_recycle.distillation.experts import pool_domains, reference_spread
from lora_recycle.evaluation.results import confidence
from lora_recycle.evaluation.selection import selected_accuracy
from lora_recycle.fewshot.accuracy import prototype_accuracy
from lora_recycle.fewshot.domains import SHARED, DomainRule, Expert, choose_domain, separability
from lora_recycle.fewshot.episodes import EpisodeSet, sample_episodes
from lora_recycle.hub.embedded import pool_path
from lora_recycle.images.labelled import LabelledImages, load_labelled_images
from lora_recycle.modeling.domains import FROZEN
from lora_recycle.runtime.files import atomic_save_tensors, atomic_write


HOME = ("cifar_fs", "mini_imagenet", "vgg_flower", "omniglot_small")
FAR = ("chestx", "isic", "crop_diseases", "textures", "emoji")
AVERAGE, GROUP = "average", "group "


def splits(data: Path, size: int, resample: int) -> list[LabelledImages]:
    """Validation and test splits of the home sets, then the test splits of the others."""
    limits = {"size": size, "resample": resample, "max_per_class": 40}
    *photos, characters = validation_sets(data, size, resample, each=40)
    validation = [*photos, dataclasses.replace(characters, name="omniglot_small/validation")]
    return validation + [load_labelled_images(data / name / "test.parquet", **limits) for name in (*HOME, *FAR)]


def all_features(
    model: MetaLoRAForFewShotClassification, pool: AdapterPool, data: LabelledImages, work: Path
) -> dict[str, torch.Tensor]:
    """Features (N, D) by the bare backbone, the shared network, each domain's average, the whole average and that of
    each group."""
    path = work / f"{data.name.replace('/', '-')}.safetensors"
    found = load_file(path) if path.exists() else {}
    members = {AVERAGE: list(range(len(pool)))} | {expert.name: group for expert, group in pool_domains(pool)}
    members |= {f"{GROUP}{number}": group for number, group in enumerate(pool.groups())}
    for name, group in {FROZEN: [], SHARED: [], **members}.items():
        if name in found:
            continue
        worn = (
            pool.subset(group).folded() if group else nullcontext(pool.backbone if name == FROZEN else model.network())
        )
        with worn as backbone:
            found[name] = extract_features(backbone, data.pixels)
        atomic_save_tensors(path, found, "{}")
    return found


def cell(
    features: dict[str, torch.Tensor], episodes: EpisodeSet, experts: list[Expert], spread: float, own: str
) -> dict:
    """Gains over the bare backbone, paired, with what was chosen and the mean scores of each expert."""
    domains = [expert.name for expert in experts]
    names = [FROZEN, SHARED, *domains]
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def choice(look, labels):
        found = choose_domain(look(0), look(1), {n: look(i) for i, n in enumerate(names)}, labels, experts, spread)
        for expert, numbers in found.scores.items():
            for key, value in numbers.items():
                scores[expert][key].append(value)
        return names.index(found.name)

    selected = selected_accuracy([features[name] for name in names], episodes, choice)
    groups = [features[name] for name in sorted(features) if name.startswith(GROUP)]

    def nearest(look, labels):
        return int(torch.stack([separability(look(i), labels) for i in range(len(groups))]).argmax())

    by_name = {name: prototype_accuracy(features[name], episodes) for name in (*names, AVERAGE)}
    methods = {
        SHARED: by_name[SHARED],
        AVERAGE: by_name[AVERAGE],
        "nearest-group": selected_accuracy(groups, episodes, nearest).accuracies,
        "chosen": selected.accuracies,
        "best of each episode": torch.stack([by_name[name] for name in (SHARED, *domains)]).max(0).values,
    }
    if own in by_name:
        methods["own average"] = by_name[own]
    counts = Counter(names[i] for i in selected.chosen.tolist())
    return {
        "frozen": confidence(by_name[FROZEN]),
        "gains": {name: confidence(values - by_name[FROZEN]) for name, values in methods.items()},
        "over shared": confidence(selected.accuracies - by_name[SHARED]),
        "chosen": {name: count / len(episodes) for name, count in counts.most_common()},
        "scores": {
            expert: {key: [float(torch.tensor(v).mean()), float(torch.tensor(v).std())] for key, v in numbers.items()}
            for expert, numbers in scores.items()
        },
    }


def figure(found: dict) -> str:
    """Scores of each expert on each data set at 5 shots, mean and deviation over episodes, as an SVG."""
    rows = [row for row in found["rows"] if row["shots"] == 5]
    experts = list(rows[0]["scores"])
    left, width, height, gap = 190, 300, 26, 40
    panels = (("separability", -0.4, 1.4), ("displacement", -2.0, 3.5))
    total_width, total_height = left + 2 * width + gap + 10, 70 + height * len(rows)
    marks = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "M-4 -4h8v8h-8z", "M0 -5L5 4H-5z", "M-4 -4l8 8m0 -8l-8 8")
    parts = [
        "<style>text{font:12px sans-serif;fill:#333}.m{fill:none;stroke:#225;stroke-width:1.6}.a{stroke:#999}"
        "@media(prefers-color-scheme:dark){text{fill:#ddd}.m{stroke:#ace}}</style>"
    ]
    for number, (expert, mark) in enumerate(zip(experts, marks, strict=False)):
        x = left + number * 150
        parts.append(
            f'<path class="m" transform="translate({x} 14)" d="{mark}"/><text x="{x + 10}" y="18">{expert}</text>'
        )
    for panel, (key, low, high) in enumerate(panels):
        start = left + panel * (width + gap)

        def place(value: float, start=start, low=low, high=high) -> float:
            return start + width * (min(max(value, low), high) - low) / (high - low)

        parts.append(f'<text x="{start}" y="42">log {key}, against the shared network</text>')
        parts.append(f'<path class="a" d="M{place(0):.0f} 48V{total_height - 14}"/>')
        parts.append(f'<text x="{place(0):.0f}" y="{total_height - 2}" text-anchor="middle">0</text>')
        for line, row in enumerate(rows):
            y = 64 + height * line
            if not panel:
                parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{row["data"]}</text>')
            for expert, mark in zip(experts, marks, strict=False):
                mean, std = row["scores"][expert][key]
                parts.append(
                    f'<path class="a" d="M{place(mean - std):.1f} {y}H{place(mean + std):.1f}"/>'
                    f'<path class="m" transform="translate({place(mean):.1f} {y})" d="{mark}"/>'
                )
    label = "How far each expert separates and moves the support images of each data set, against the shared network"
    view = f'viewBox="0 0 {total_width} {total_height}" role="img" aria-label="{label}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {view}>\n' + "\n".join(parts) + "\n</svg>\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DATA")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="keeps the features")
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    model = MetaLoRAForFewShotClassification.from_pretrained("demo")
    pool = AdapterPool.from_pretrained(pool_path())
    experts, spread, rows = [expert for expert, _ in pool_domains(pool)], reference_spread(pool.backbone), []
    for data in splits(args.data, model.backbone.image_size, int(model.backbone.processor.resample)):
        features = all_features(model, pool, data, args.work)
        for shots in (1, 5):
            episodes = sample_episodes(data.labels, 5, shots, 15, args.episodes, 0, data.label_names, data.name)
            row = cell(features, episodes, experts, spread, data.name.split("/")[0])
            rows.append({"data": data.name, "shots": shots, **row})
            print(data.name, shots, {name: round(gain[0], 2) for name, gain in row["gains"].items()}, flush=True)
    found = {"episodes": args.episodes, "reference_spread": spread, "rule": vars(DomainRule()), "rows": rows}
    found["experts"] = [vars(expert) for expert in experts]
    atomic_write(args.json, json.dumps(found, indent=1, allow_nan=False).encode())
    if args.figure:
        atomic_write(args.figure, figure(found).encode())


if __name__ == "__main__":
    main()
