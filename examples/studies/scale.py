"""Seconds and memory against the number of adapters: 10, 100 and 1,000 tiny ones.

    python examples/studies/scale.py --adapters 10 100 1000 --stages load average groups invert --json runs/scale.json

The adapters are random LoRAs with heads of 5 classes on a random ViT (2 layers, 32 wide, 32x32 pixels; others with
--hidden and --layers). Every stage and number has a process of its own, which does the stage with two adapters first,
so that what is paid once is not counted. `MB` is the peak resident memory of the stage above that of the process then
(torch, library and backbone loaded, `warm_mb` in the JSON). Seconds are those of the clock and of the processor, per
adapter; the second are what to compare on a busy machine. `distill` is 5 steps with all that comes before them, and
needs the images of `invert`.

    python examples/studies/scale.py --adapters 1000 2000 4000 --stages groups --domains 4

Groups of more than a thousand adapters are those of a sample, which the others join.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil
from transformers.utils import logging

from lora_recycle import AdapterPool, DistillationConfig, InversionConfig, LoRAInverter, MetaLoRATrainer
from lora_recycle.runtime.plans import peak_memory
from lora_recycle.surrogate.dataset import SurrogateDataset


STAGES = ("load", "average", "groups", "invert", "distill")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
CLASSES = 5
#: Forwards of an image before distillation; `max_teachers` bounds them (32 by default), whatever the pool's size.
TEACHERS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES[:-1])
    parser.add_argument("--hidden", type=int, default=32, help="width of the ViT")
    parser.add_argument(
        "--domains", type=int, default=1, help="so many groups of similar adapters (default: 1, random)"
    )
    parser.add_argument("--layers", type=int, default=2, help="layers of the ViT")
    parser.add_argument("--iterations", type=int, default=10, help="of the inversion")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each cell, of which the fastest counts")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cell", nargs=3, metavar=("WORK", "STAGE", "COUNT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        work, stage, count = args.cell
        print(json.dumps(measure(Path(work), stage, int(count), args.iterations)))
        return
    with tempfile.TemporaryDirectory() as work:
        write_adapters(Path(work), max(args.adapters), args.hidden, args.layers, args.domains)
        rows = []
        for stage in args.stages:
            for count in args.adapters:
                runs = [run_cell(work, stage, count, args.iterations) for _ in range(args.repeats)]
                rows.append({name: min(run[name] for run in runs) for name in runs[0]} | {"stage": stage})
                print_row(rows[-1])
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1), encoding="utf-8")


def write_adapters(folder: Path, count: int, hidden: int, layers: int, domains: int = 1) -> None:
    """`backbone/` and `pool/00000` ..., the files as PEFT writes them, each with random numbers of its own, and with
    those of its domain where there are several."""
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden // 64),
        intermediate_size=2 * hidden,
        image_size=32,
        patch_size=8,
        num_labels=CLASSES,
    )
    torch.manual_seed(0)
    classifier = ViTForImageClassification(config)
    classifier.vit.save_pretrained(folder / "backbone")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "backbone")
    lora = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["classifier"])
    lora.base_model_name_or_path = str(folder / "backbone")
    model = get_peft_model(classifier, lora)
    lora.base_model_name_or_path = str(folder / "backbone")
    lora.inference_mode = True
    shapes = {key: tensor.shape for key, tensor in get_peft_model_state_dict(model).items()}
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        tensors = {key: 0.2 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        if domains > 1:
            common = torch.Generator().manual_seed(10**6 + i % domains)
            tensors = {key: 0.3 * own + 0.2 * torch.randn(own.shape, generator=common) for key, own in tensors.items()}
        path = folder / "pool" / f"{i:05d}"
        lora.save_pretrained(path)
        save_file(tensors, path / "adapter_model.safetensors")


def run_cell(work: str, stage: str, count: int, iterations: int) -> dict:
    command = [sys.executable, __file__, "--cell", work, stage, str(count), "--iterations", str(iterations)]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def measure(work: Path, stage: str, count: int, iterations: int) -> dict:
    """One stage with `count` adapters, after the same with two."""
    logging.disable_progress_bar()
    folders = sorted((work / "pool").iterdir())[:count]
    few = AdapterPool.from_pretrained(folders[:2])
    with tempfile.TemporaryDirectory(dir=work) as output:
        if stage == "distill":
            do_stage("invert", few, folders[:2], Path(output), iterations)
        do_stage(stage, few, folders[:2], Path(output), iterations)
    pool = few if stage == "load" else AdapterPool.from_pretrained(folders, backbone=few.backbone)
    output = work / "surrogate" / str(count)
    if stage == "invert":
        shutil.rmtree(output, ignore_errors=True)  # of the run before
    before, clock, processor = peak_mb(), time.perf_counter(), time.process_time()
    do_stage(stage, pool, folders, output, iterations)
    return {
        "adapters": count,
        "seconds_per_adapter": (time.perf_counter() - clock) / count,
        "cpu_seconds_per_adapter": (time.process_time() - processor) / count,
        "warm_mb": before,
        "peak_mb": peak_mb() - before,
    }


def do_stage(stage: str, pool: AdapterPool, folders: list[Path], output: Path, iterations: int) -> None:
    if stage == "load":
        AdapterPool.from_pretrained(folders, backbone=pool.backbone)
    elif stage == "average":
        pool.average(4)
    elif stage == "groups":
        pool.groups()
    elif stage == "invert":
        config = InversionConfig(images_per_class=2, iterations=iterations, stop_at=1.0, keep_ratio=1.0)
        LoRAInverter(pool, config).run(output, progress=False)
    else:
        data = SurrogateDataset.from_pretrained(output)
        MetaLoRATrainer(pool, data, DistillationConfig(steps=5, max_teachers=TEACHERS, validation_fraction=0.0)).train(
            progress=False
        )


def peak_mb() -> float:
    return peak_memory(torch.device("cpu")) / 2**20


def print_row(row: dict) -> None:
    print(
        f"{row['stage']:8} {row['adapters']:6} adapters {1e3 * row['seconds_per_adapter']:9.1f} ms "
        f"{1e3 * row['cpu_seconds_per_adapter']:9.1f} ms of processor {row['peak_mb']:8.1f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()
