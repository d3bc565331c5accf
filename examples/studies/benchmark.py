"""Time every stage beside a plain PyTorch + PEFT version of the same step, on random weights.

    python examples/studies/benchmark.py --quick                              ViT-B/16, inversion and distillation
    python examples/studies/benchmark.py --backbone tiny --json speed.json --plot speed.svg
    python examples/studies/benchmark.py --end-to-end --json docs/results/end-to-end.json       the shipped pool, whole
    python examples/studies/benchmark.py --device cuda --dtype bfloat16 --backbone vit-b16 --profile

For every step: steps and images in a second, FLOPs of an image, the share that is of what a large matrix product
reaches on this machine in the same rounds, and the memory that the step holds beside weights and data. All steps of a
stage take turns round by round; a ratio is the median of the quotients within a round, so that what else the machine
does weighs on both sides.

With `--end-to-end`: seconds, processor time and peak memory of each stage from adapters to meta-LoRA, its accuracy,
and what the published settings and a plain loop would take, extrapolated from three steps of each.

Peak memory is `torch.cuda.max_memory_allocated` on CUDA; on a CPU every tensor that a step makes is followed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path


#: Ratio: the step that is compared, and the slower one.
RATIOS = {
    "inversion_pruned_75": ("inversion_pruned_75", "inversion_plain"),
    "inversion_vs_baseline": ("inversion_plain", "inversion_baseline"),
    "inversion_pruned_75_vs_baseline": ("inversion_pruned_75", "inversion_baseline"),
    "distillation_masked_25": ("distillation_masked_25", "distillation_masked_0"),
    "distillation_masked_50": ("distillation_masked_50", "distillation_masked_0"),
    "distillation_masked_75": ("distillation_masked_75", "distillation_masked_0"),
    "distillation_vs_baseline": ("distillation_masked_0", "distillation_baseline"),
    "distillation_masked_75_vs_baseline": ("distillation_masked_75", "distillation_baseline"),
    "predict_1_vs_features": ("predict_1", "predict_1_features"),
    "predict_1_vs_bare": ("predict_1", "predict_1_bare"),
    "predict_1_vs_baseline": ("predict_1", "predict_1_baseline"),
    "predict_64_vs_features": ("predict_64", "predict_64_features"),
    "predict_64_vs_bare": ("predict_64", "predict_64_bare"),
    "predict_64_vs_baseline": ("predict_64", "predict_64_baseline"),
    "preprocess_vs_baseline": ("preprocess", "preprocess_baseline"),
    "files_vs_features": ("files", "files_features"),
    "files_vs_decoded": ("files", "files_decoded"),
    "fit_vs_baseline": ("fit", "fit_baseline"),
    "evaluate_vs_baseline": ("evaluate", "evaluate_baseline"),
}
#: The same of peak memory.
MEMORY_RATIOS = {
    "inversion_pruned_75_memory": ("inversion_pruned_75", "inversion_plain"),
    "distillation_masked_75_memory": ("distillation_masked_75", "distillation_masked_0"),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    from speed.stages import SHAPES, STAGES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cpu", help="as torch names it (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--backbone", choices=tuple(SHAPES), help="default: tiny; with --quick vit-b16")
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), help="default: all; with --quick the first two")
    parser.add_argument("--rounds", type=int, help="default: 7; with --quick 4")
    parser.add_argument("--quick", action="store_true", help="ViT-B/16, inversion and distillation, in a few minutes")
    parser.add_argument(
        "--profile", action="store_true", help="also the operations in which each step spends its time"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write machine, rows and ratios")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write throughput against keep ratio as an SVG")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--end-to-end", action="store_true", help="the shipped pool, from adapters to meta-LoRA")
    parser.add_argument("--adapters", type=int, metavar="N", help="with --end-to-end: so many of the 40")
    parser.add_argument("--images-per-class", type=int, metavar="N", help="with --end-to-end: of the inversion")
    parser.add_argument("--steps", type=int, metavar="N", help="with --end-to-end: of the distillation")
    parser.add_argument("--episodes", type=int, default=600, metavar="N", help="with --end-to-end: of the evaluation")
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="with --end-to-end: labelled images (default: digits)"
    )
    parser.add_argument("--seed", type=int, default=0, help="with --end-to-end (default: %(default)s)")
    args = parser.parse_args(argv)
    args.backbone = args.backbone or ("vit-b16" if args.quick else "tiny")
    args.stages = args.stages or (["inversion", "distillation"] if args.quick else list(STAGES))
    args.rounds = args.rounds or (4 if args.quick else 7)
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    # what `accelerate launch --mixed_precision bf16` sets; the library reads it there
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if args.dtype == "bfloat16" else "no"
    os.environ.setdefault("ACCELERATE_USE_CPU", str(args.device == "cpu").lower())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if args.end_to_end:
            return whole_way(args)
        result = run(args)
    from speed.report import markdown, plot, text_table

    if args.plot:
        args.plot.write_text(plot(result), encoding="utf-8")
    if args.markdown:
        print(markdown(result))
    else:
        print(text_table(result["rows"]), "\n")
        print("\n".join(f"{ratio['name']:<36} {ratio['ratio']:6.2f}" for ratio in result["ratios"]))
        for row in result["rows"]:
            if "host_share" in row:
                print(f"{row['name']}: {row['host_share']:.1%} of the time the model waits for data")
            if "operations" in row:
                print(f"{row['name']}: " + ", ".join(f"{k} {v:.0%}" for k, v in row["operations"].items()))
    return result


def whole_way(args: argparse.Namespace) -> dict:
    """`--end-to-end`."""
    import torch
    from speed.end_to_end import end_to_end, text
    from speed.measure import machine

    inversion, distillation = {"seed": args.seed}, {"seed": args.seed}
    inversion |= {"images_per_class": args.images_per_class} if args.images_per_class else {}
    distillation |= {"steps": args.steps} if args.steps else {}
    with tempfile.TemporaryDirectory() as folder:
        found = end_to_end(Path(folder), args.adapters, inversion, distillation, args.data, args.episodes)
    result = {"machine": machine(torch.device("cpu")), **found}
    print(text(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


def run(args: argparse.Namespace) -> dict:
    """Measure all stages and return what `--json` writes, which is there after every stage."""
    import torch
    from speed.measure import machine
    from speed.stages import make_world

    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    rows, achievable, started, result = [], [], time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(args.backbone, device, dtype, Path(folder))
        for number, name in enumerate(args.stages, 1):
            print(f"{name} ... ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)
            found, reached = measure_stage(name, world, args)
            rows += found
            achievable += reached
            setting = {key: getattr(args, key) for key in ("backbone", "dtype", "rounds")}
            result = {
                "machine": machine(device),
                "setting": setting | {"stages": args.stages[:number]},
                "achievable_gflops": statistics.median(achievable) / 1e9,
                "ratios": ratios(rows),
                "rows": rows,
                "seconds": round(time.perf_counter() - started, 1),
            }
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def measure_stage(name: str, world, args: argparse.Namespace) -> tuple[list[dict], list[float]]:
    """Rows of a stage, and the FLOP/s that a matrix product reached in each of its rounds."""
    from speed.measure import cost, interleaved, matmul_case, top_operations
    from speed.stages import STAGES

    matmul = matmul_case(world.device, world.dtype)
    with STAGES[name](world) as cases:
        costs = {case.name: cost(case.step, world.device) for case in [matmul, *cases]}
        least = 0.05 if args.quick else 0.3
        seconds = interleaved([matmul, *cases], args.rounds, world.device, least)
        reached = [costs["matmul"][0] / second for second in seconds["matmul"]]
        rows = []
        for case in cases:
            row = make_row(case, name, *costs[case.name], seconds[case.name], reached)
            if args.profile and not case.name.endswith(("_baseline", "_bare", "_features")):
                repeats = min(5, max(1, round(0.2 * row["steps_per_second"])))
                row["operations"] = top_operations(case.step, repeats, world.device)
            rows.append(row)
    return rows, reached


def make_row(case, stage: str, flops: int, peak: int, seconds: list[float], reached: list[float]) -> dict:
    typical = statistics.median(seconds)
    shares = [flops / second / best for second, best in zip(seconds, reached, strict=True)]
    row = {
        "name": case.name,
        "stage": stage,
        "images": case.images,
        "keep_ratio": case.keep_ratio,
        "steps_per_second": 1 / typical,
        "images_per_second": case.images / typical,
        "gflops_per_image": flops / case.images / 1e9,
        "share_of_achievable": statistics.median(shares),
        "peak_memory_mb": peak / 1e6 if flops else None,  # what runs in numpy or PIL cannot be followed
        "seconds": seconds,
    }
    return row if case.host_share is None else row | {"host_share": case.host_share()}


def ratios(rows: list[dict]) -> list[dict]:
    """Every ratio of which both sides were measured."""
    from speed.measure import paired_ratio

    found = {row["name"]: row for row in rows}
    times = [
        {"name": name, "ratio": paired_ratio(found[slow]["seconds"], found[fast]["seconds"])}
        for name, (fast, slow) in RATIOS.items()
        if fast in found and slow in found
    ]
    memory = [
        {"name": name, "ratio": found[much]["peak_memory_mb"] / found[little]["peak_memory_mb"]}
        for name, (little, much) in MEMORY_RATIOS.items()
        if little in found and much in found
    ]
    return times + memory


if __name__ == "__main__":
    main()
