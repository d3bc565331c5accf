"""Put the numbers of result files into the documentation.

    python examples/studies/write_tables.py

Reads `docs/benchmarks/**/results.json` of `lora-recycle benchmark` and `docs/results/*.json`, as `lora-recycle
evaluate --json` and the scripts choose_recipe.py, choose_tuning.py, benchmark.py, scale.py and efficiency.py write
them, and replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->` in README.md, docs/*.md and
docs/studies/*.md.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from more_tables import more_tables
from speed import price
from speed.report import markdown


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
BENCHMARKS = ROOT / "docs" / "benchmarks"
HOME = ("cifar_fs", "mini_imagenet", "vgg_flower", "omniglot_small")
GROUPED = ("restored", "undiluted", "group-sum", "nearest-group")
BASELINES = ("frozen", *GROUPED, "ties", "dare", "knots", "magnitude", "arrow")
#: folder of the results of one pool's benchmark, and the methods shown beside frozen, random and average
POOLS = {
    "mixed-100": (*GROUPED, "undiluted-16", "judged", "learnt", "last-step", "real-data", "ensemble"),
    "cifar-100": ("average-rank-16", "judged", "last-step", "real-data", "ensemble"),
    "second-backbone": (*GROUPED, "undiluted-16", "judged", "learnt", "last-step", "real-data", "ensemble"),
}
#: the columns of docs/benchmarks.md beside frozen and average, and what the pools of POOLS call the meta-LoRA
FRONT = ("restored", "undiluted", "nearest-group", "meta-lora", "ensemble", "real-data")
DEFAULT_RECIPE = {"meta-lora": "judged"}
METHODS = ("frozen", "frozen-centred", "random", "average", "meta-lora", "ensemble")
IN_DOMAIN = ("frozen", "random", "average", "meta-lora", "magnitude", "dare", "ties", "knots", "arrow", "ensemble")
TUNED = (
    "linear-probe",
    "full-tuning",
    "lora-linear",
    "average-linear",
    "average-lora",
    "learned-composition",
    "lorahub",
    "meta-lora-tuned",
)


def cell(row: dict) -> str:
    if row["method"] == "frozen":
        return f"{row['accuracy']:.1f} ± {row['ci95']:.1f}"
    return f"{row['accuracy']:.1f} ({row['delta_vs_frozen']:+.1f} ± {row['delta_ci95']:.1f})"


def gain(row: dict) -> str:
    return f"{row['delta_vs_frozen']:+.1f} ± {row['delta_ci95']:.1f}"


def evaluation_table(rows: list[dict], methods: tuple[str, ...] = METHODS, show: Callable[[dict], str] = cell) -> str:
    """One line a data set and shot, one column a method: the accuracy of `frozen`, differences for the others."""
    lines = ["| data | shots | " + " | ".join(methods) + " |", "|---|---|" + "---|" * len(methods)]
    for data in dict.fromkeys(row["data"] for row in rows):
        for shots in sorted({row["shots"] for row in rows if row["data"] == data}):
            found = {row["method"]: row for row in rows if (row["data"], row["shots"]) == (data, shots)}
            cells = [show(found[method]) if method in found else "" for method in methods]
            lines.append(f"| {data} | {shots} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tuned_table(rows: list[dict]) -> str:
    """One line a data set and shot: what each method gains over frozen on the episodes that it tuned on."""
    judged = {row["method"] for row in rows}
    methods = tuple(method for method in ("average", "meta-lora", *TUNED) if method in judged)
    return evaluation_table(rows, methods, gain)


def rows_of(*paths: Path) -> list[dict]:
    return [row for path in paths if path.exists() for row in json.loads(path.read_text())["rows"]]


def pool_benchmark_table(name: str, methods: tuple[str, ...]) -> str:
    """One pool: accuracies, and paired differences to its average; where asked for, the average of the set's own."""
    path = BENCHMARKS / name / "results.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    rows = {(row["data"], row["shots"], row["method"].partition(" @ ")[::2]): row for row in found["rows"]}
    details = {(row["data"], row["shots"], row["method"]): row for row in found["details"]}
    owned = any(pool for _, _, (_, pool) in rows)
    header = ["data", "shots", "frozen", "random", "average", *methods, *(["average of its own"] if owned else [])]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for data, shots in dict.fromkeys(key[:2] for key in rows):
        plain = {method: row for (d, k, (method, pool)), row in rows.items() if (d, k, pool) == (data, shots, "")}
        own = [row for (d, k, (_, pool)), row in rows.items() if (d, k) == (data, shots) and pool]
        cells = [data, str(shots), *(f"{plain[method]['accuracy']:.1f}" for method in ("frozen", "random", "average"))]
        for method in methods:
            delta, half = (details[data, shots, method][f"delta_vs_average{end}"] for end in ("", "_ci95"))
            cells.append(f"{plain[method]['accuracy']:.1f} ({delta:+.1f} ± {half:.1f})")
        if owned:
            cells.append(f"{own[0]['accuracy']:.1f}" if own else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def front_table(*paths: Path, names: dict[str, str] | None = None) -> str:
    """The methods that decide: accuracies, and paired differences to the average. `names` are those in the files."""
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    rows = {(row["data"], row["shots"], row["method"]): row for file in reversed(found) for row in file["rows"]}
    details = {(row["data"], row["shots"], row["method"]): row for file in reversed(found) for row in file["details"]}
    header = ["data", "shots", "frozen", "average", *FRONT]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for data, shots in dict.fromkeys(key[:2] for key in rows):
        cells = [data, str(shots), *(f"{rows[data, shots, name]['accuracy']:.1f}" for name in ("frozen", "average"))]
        for method in FRONT:
            key = data, shots, (names or {}).get(method, method)
            delta, half = (details[key][f"delta_vs_average{end}"] for end in ("", "_ci95"))
            cells.append(f"{rows[key]['accuracy']:.1f} ({delta:+.1f} ± {half:.1f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def choice_table() -> str:
    """Each variant's paired gain over the exact average, 1-shot / 5-shot, and the seconds it took."""
    results = json.loads((RESULTS / "choice.json").read_text())
    keys = [key for key in next(iter(results.values())) if key != "seconds"]
    sets = list(dict.fromkeys(key.rsplit(" ", 1)[0] for key in keys))
    lines = ["| variant | " + " | ".join(sets) + " | mean | seconds |", "|---|" + "---|" * (len(sets) + 2)]
    for name, values in results.items():
        cells = [
            " / ".join(f"{values[f'{s} {k}'][0]:+.1f} ± {values[f'{s} {k}'][1]:.1f}" for k in (1, 5)) for s in sets
        ]
        means = [sum(values[f"{s} {k}"][0] for s in sets) / len(sets) for k in (1, 5)]
        lines.append(f"| {name} | " + " | ".join(cells) + " | " + " / ".join(f"{m:+.2f}" for m in means))
        lines[-1] += f" | {values.get('seconds', '')} |"
    return "\n".join(lines)


def tuning_table(path: Path) -> str:
    """What tuning gains over the same model untuned, 1-shot / 5-shot, and the seconds of a task."""
    if not path.exists():
        return ""
    results = json.loads(path.read_text())
    sets = [
        key.removesuffix(" 1") for key in next(iter(results.values())) if key.endswith(" 1") and "seconds" not in key
    ]
    lines = ["| settings | " + " | ".join(sets) + " | seconds a task |", "|---|" + "---|" * (len(sets) + 1)]
    for name, row in results.items():
        if name == "untuned":
            continue
        gains = [" / ".join(f"{row[f'{s} {k}'][0]:+.1f} ± {row[f'{s} {k}'][1]:.1f}" for k in (1, 5)) for s in sets]
        seconds = " / ".join(f"{row[f'seconds {k}']:.1f}" for k in (1, 5))
        lines.append(f"| {name} | " + " | ".join(gains) + f" | {seconds} |")
    return "\n".join(lines)


def pool_table() -> str:
    """Accuracy of the shipped adapters on unseen images, as their cards say."""
    lines = [
        "| adapter | classes | adapter and layers | accuracy on unseen images | frozen backbone, prototypes |",
        "|---|---|---|---|---|",
    ]
    for card in sorted((ROOT / "lora_recycle" / "demo" / "assets" / "pool").glob("*/README.md")):
        text = card.read_text()
        classes = re.search(r"for (\d+) classes", text)[1]
        kind, rank, layers = re.search(r"(\w+) adapter \(rank (\d+), layers: ([^)]*)\)", text).groups()
        tuned, frozen = re.search(r"classes: ([\d.]+) %.*?: ([\d.]+) %", text, re.DOTALL).groups()
        lines.append(f"| {card.parent.name} | {classes} | {kind}, rank {rank}, {layers} | {tuned} | {frozen} |")
    return "\n".join(lines)


def speed_tables() -> str:
    """Every run of the benchmark, `speed.json` and `speed-*.json`."""
    runs = sorted(RESULTS.glob("speed*.json"))
    return "\n\n".join(markdown(json.loads(path.read_text())) for path in runs)


def scale_table() -> str:
    """Time per adapter and peak memory of each stage against the number of adapters."""
    rows = json.loads((RESULTS / "scale.json").read_text())["rows"]
    counts = sorted({row["adapters"] for row in rows})
    lines = [
        "| stage | " + " | ".join(f"{count:,} adapters" for count in counts) + " |",
        "|---|" + "---:|" * len(counts),
    ]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        found = {row["adapters"]: row for row in rows if row["stage"] == stage}
        cells = [
            f"{1e3 * found[count]['cpu_seconds_per_adapter']:.1f} ms, {found[count]['peak_mb']:.0f} MB"
            for count in counts
        ]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def efficiency_table() -> str:
    return price.table(json.loads((RESULTS / "efficiency.json").read_text()))


def tables() -> dict[str, str]:
    """Name of each generated table to its Markdown."""
    judged, chosen = rows_of(BENCHMARKS / "results.json"), rows_of(BENCHMARKS / "validation" / "results.json")
    home = [row for row in judged if row["data"].split("/")[0] in HOME]
    real = [row for row in rows_of(BENCHMARKS / "real-data" / "results.json") if row["method"] == "real-data"]
    frozen = rows_of(*(RESULTS / f"frozen_{name}.json" for name in FROZEN_SETS))
    starts = ("frozen", "average", *GROUPED, "meta-lora", "learnt")
    return {
        "front-shipped": front_table(BENCHMARKS / "results.json", BENCHMARKS / "real-data" / "results.json"),
        **{
            f"front-{name}": front_table(BENCHMARKS / name / "results.json", names=DEFAULT_RECIPE)
            for name in ("mixed-100", "second-backbone")
        },
        "results": evaluation_table(home, ("frozen", "average", "meta-lora")),
        "test": evaluation_table(judged + real, (*METHODS, "real-data")),
        "in-domain": evaluation_table(rows_of(BENCHMARKS / "in-domain" / "results.json"), IN_DOMAIN),
        "in-domain-tuned": tuned_table(rows_of(BENCHMARKS / "in-domain" / "results.json")),
        "tuning-baselines": tuned_table(rows_of(BENCHMARKS / "tuning" / "results.json")),
        "baselines": evaluation_table(judged, BASELINES),
        "validation": evaluation_table(chosen, starts),
        **{name: pool_benchmark_table(name, methods) for name, methods in POOLS.items()},
        "backbone": evaluation_table(frozen, ("frozen", "frozen-centred")),
        "demo": evaluation_table(rows_of(RESULTS / "demo_digits.json")),
        "choice": choice_table() if (RESULTS / "choice.json").exists() else "",
        "pool": pool_table(),
        "tuning": tuning_table(RESULTS / "tuning.json"),
        "tuning_test": tuning_table(RESULTS / "tuning_test.json"),
        "speed": speed_tables(),
        "scale": scale_table(),
        "efficiency": efficiency_table() if (RESULTS / "efficiency.json").exists() else "",
        **more_tables(RESULTS),
    }


def pages() -> list[Path]:
    """The pages that hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/studies").glob("*.md"))]


def fill(text: str, tables: dict[str, str]) -> str:
    """A page with what stands between its markers replaced."""
    for name, table in tables.items():
        replacement = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, t=replacement: t, text, flags=re.DOTALL)
    return text


def main() -> None:
    made = tables()
    for path in pages():
        path.write_text(fill(path.read_text(encoding="utf-8"), made), encoding="utf-8")
    if (RESULTS / "efficiency.json").exists():
        measured = json.loads((RESULTS / "efficiency.json").read_text(encoding="utf-8"))
        (RESULTS / "efficiency.svg").write_text(price.curves(measured), encoding="utf-8")


FROZEN_SETS = (
    "cifar_fs_validation",
    "cifar_fs_test",
    "mini_imagenet_validation",
    "mini_imagenet_test",
    "vgg_flower_validation",
    "vgg_flower_test",
    "omniglot_small_test",
)


if __name__ == "__main__":
    main()
