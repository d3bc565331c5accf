"""Tables of the documentation, from what small_files.py, adapter_types.py, fscil.py, rejection.py, choose_adapters.py,
group_weights.py, shares.py, choose_without_images.py, second_backbone.py, domains.py, better_experts.py and
ablations.py wrote."""

import json
from pathlib import Path


def more_tables(results: Path) -> dict[str, str]:
    """Name of the table, and of its file, to its Markdown, for the result files that there are."""
    makers = {
        "small_files": small_files,
        "adapter_types": adapter_types,
        "fscil": fscil,
        "rejection": rejection,
        "choose_adapters": choose_adapters,
        "group_weights": group_weights,
        "shares": shares,
        "figures": figures,
        "second_backbone": second_backbone,
        "domains": domains,
        "better_experts": better_experts,
    }
    paths = {name: results / f"{name}.json" for name in makers}
    found = {name: makers[name](json.loads(path.read_text())) for name, path in paths.items() if path.exists()}
    studies = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("ablation-*.json"))}
    return found | {name: ablation(study) for name, study in studies.items()}


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def ablation(study: dict) -> str:
    """A line for each point and data set: gains over frozen, 1 and 5 shots or what else it was judged on."""
    rows = []
    for point in study["points"]:
        sets = dict.fromkeys(task.split(" ")[0] for task in point["tasks"])
        for name in sets:
            tasks = [task for task in point["tasks"] if task.split(" ")[0] == name]
            cells = []
            for method, reference in (("average", "frozen"), ("from zero", "frozen"), ("from average", "average")):
                gains = [point["tasks"][task][method][f"vs {reference}"] for task in tasks]
                cells.append(" / ".join(f"{mean:+.1f} ± {half:.1f}" for mean, half in gains))
            rows.append([point["name"], *([name] if len(sets) > 1 else []), *cells])
    header = [study["axis"], *(["data"] if rows and len(rows[0]) == 5 else [])]
    return markdown([*header, "average", "distilled from zero", "distilled from the average, against it"], rows)


def second_backbone(found: dict) -> str:
    """Accuracy at 1 and 5 shots of each cut of eight blocks and more that ends with the trained norm."""
    rows = [row for row in found["rows"] if row["norm"] == "trained" and row["blocks"] >= 8]
    sets, cells = list(dict.fromkeys(row["data"] for row in rows)), []
    for size, blocks in dict.fromkeys((row["size"], row["blocks"]) for row in rows):
        own = {(r["data"], r["shots"]): r["accuracy"] for r in rows if (r["size"], r["blocks"]) == (size, blocks)}
        cells.append([size, blocks, *(f"{own[name, 1]:.1f} / {own[name, 5]:.1f}" for name in sets)])
    return markdown(["pixels", "blocks", *(f"{name}/validation" for name in sets)], cells)


def group_weights(found: dict) -> str:
    tasks = list(found["rows"][0]["tasks"])
    sets = list(dict.fromkeys(task.rpartition(" ")[0] for task in tasks))
    rows = []
    for row in found["rows"][1:]:
        name = f"{row['name'].partition(',')[0]}, cut to rank {row['rank']}" if row["rank"] else row["name"]
        cells = [name, " / ".join(f"{factor:.2g}" for factor in row["factors"] or ())]
        for name in sets:
            gains = [row["tasks"][f"{name} {shots}"]["frozen"] for shots in (1, 5)]
            cells.append(" / ".join(f"{mean:+.1f} ± {half:.1f}" for mean, half in gains))
        rows.append(cells)
    return markdown(["merge", " / ".join(found["groups"]), *sets], rows)


def domains(found: dict) -> str:
    """Gains over frozen at 1 and 5 shots of each method on each data set, and the share of tasks by domain."""
    sets = list(dict.fromkeys(row["data"] for row in found["rows"]))
    cells = {(row["data"], row["shots"]): row for row in found["rows"]}
    methods = [*found["rows"][0]["gains"]]
    rows = []
    for name in sets:
        own = [cells[name, shots] for shots in (1, 5)]
        gains = [" / ".join(f"{row['gains'][m][0]:+.1f}" if m in row["gains"] else "" for row in own) for m in methods]
        over = " / ".join("{:+.2f} ± {:.2f}".format(*row["over shared"]) for row in own)
        chosen = dict.fromkeys(domain for row in own for domain in row["chosen"])
        shares = [f"{d} " + " / ".join(f"{row['chosen'].get(d, 0):.0%}" for row in own) for d in chosen]
        rows.append([name, *(gain if gain != " / " else "-" for gain in gains), over, ", ".join(shares)])
    return markdown(["data", *methods, "chosen over shared", "what was chosen"], rows)


def better_experts(found: dict) -> str:
    """Differences to the average of a domain's adapters at 1 and 5 shots, a line for each domain."""
    cells = {(row["domain"], row["shots"]): row for row in found["rows"]}
    variants, rows = list(found["rows"][0]["over the average"]), []
    for name in dict.fromkeys(row["domain"] for row in found["rows"]):
        own = [cells[name, shots] for shots in (1, 5)]
        gain = " / ".join(f"{row['gain'][0]:+.1f}" for row in own)
        over = [
            " / ".join("{:+.2f} ± {:.2f}".format(*row["over the average"][key]) for row in own) for key in variants
        ]
        rows.append([name, gain, *over])
    return markdown(["domain", "average, over frozen", *variants], rows)


def shares(found: dict) -> str:
    rows = []
    for row in found["rows"]:
        sets = list(dict.fromkeys(task.rpartition(" ")[0] for task in row["gains"]))
        cells = [row["pool"], row["blend"]]
        for name in sets:
            gains = [row["gains"][f"{name} {shots}"] for shots in (1, 5)]
            cells.append(" / ".join(f"{mean:+.2f} ± {half:.2f}" for mean, half in gains))
        rows.append(cells)
    return markdown(["pool", "blend", *sets], rows)


def figures(found: dict) -> str:
    rows = []
    for kind, group in found["kinds"].items():
        for name, row in group["figures"].items():
            called = row["said to be better than the start"]
            rows.append([kind, name, f"{row['rank correlation']:+.2f}", f"{row['and were']} of {called}"])
            rows[-1].append(f"{row['their mean gain']:+.2f}" if called else "")
    return markdown(["learns by", "figure", "rank correlation", "calls better, and is", "their mean gain"], rows)


def small_files(found: dict) -> str:
    rows = sorted(found["rows"], key=lambda row: -row["bits"])
    whole, sets = rows[0]["bytes"], _sets(rows[0])
    cells = [
        [row["bits"], f"{row['bytes'] / 1e3:.0f} kB", f"{whole / row['bytes']:.1f}x", row["relative_error"]]
        + [*_gains(row, sets), _mean(row)]
        for row in rows
    ]
    return markdown(["bits", "file", "smaller", "error", *sets, "mean gain"], cells)


def adapter_types(found: dict) -> str:
    sets = _sets(found["rows"][0])
    cells = [
        [row["variant"], *_gains(row, sets), _mean(row), f"{row['learned']:,}", f"{row['stored']:,}"]
        + [f"{row['seconds_a_step'] / found['rows'][0]['seconds_a_step']:.2f}"]
        for row in found["rows"]
    ]
    return markdown(["type, start", *sets, "mean gain", "learned", "stored", "time of a step"], cells)


def fscil(found: dict) -> str:
    count = len(found["rows"][0]["sessions"])
    header = ["method", "head", "base images", *map(str, range(count)), "average", "drop", "base, end", "new, end"]
    cells = [
        [row["method"], row["head"], row["base_images"], *(f"{value:.1f}" for value in row["sessions"])]
        + [f"{row[name]:.2f} ± {row[f'{name}_ci95']:.2f}" for name in ("average", "drop")]
        + [f"{row['base_at_the_end']:.1f}", f"{row['new_at_the_end']:.1f}"]
        for row in found["rows"]
    ]
    return markdown(header, cells)


def rejection(found: dict) -> str:
    scores, temperatures = ("max_softmax", "max_cosine", "energy"), ("default", "surrogate", "validation")
    header = ["data", "shots", "method", *(f"AUROC {score}" for score in scores), *(f"ECE {t}" for t in temperatures)]
    rows = sorted(found["rows"], key=lambda row: (row["data"], row["shots"]))
    cells = [
        [row["data"], row["shots"], row["method"]]
        + [f"{row['auroc'][score][0]:.1f} ± {row['auroc'][score][1]:.1f}" for score in scores]
        + [f"{row['ece'][name]:.1f}" for name in temperatures]
        for row in rows
    ]
    return markdown(header, cells)


def choose_adapters(found: dict) -> str:
    header = ["way to choose", *(f"{shots}-shot" for shots in (1, 5)), "picks of the target's own adapters"]
    cells = [
        [row["way"], *(f"{row['gain'][str(k)][0]:+.2f} ± {row['gain'][str(k)][1]:.2f}" for k in (1, 5))]
        + ["" if row["own_share"] is None else f"{100 * row['own_share']:.0f} %"]
        for row in found["rows"]
    ]
    return markdown(header, cells)


def _sets(row: dict) -> list[str]:
    return list(dict.fromkeys(key.rsplit(" ", 1)[0] for key in row["gain_over_frozen"]))


def _gains(row: dict, sets: list[str]) -> list[str]:
    """1-shot / 5-shot."""
    every = row["gain_over_frozen"]
    return [
        " / ".join(f"{every[f'{name} {k}'][0]:+.1f} ± {every[f'{name} {k}'][1]:.1f}" for k in (1, 5)) for name in sets
    ]


def _mean(row: dict) -> str:
    gains = [gain for gain, _ in row["gain_over_frozen"].values()]
    return f"{sum(gains) / len(gains):+.2f}"
