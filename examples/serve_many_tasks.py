"""A thousand fitted tasks on one backbone, and queries of many tasks in one forward pass.

    python examples/serve_many_tasks.py
    python examples/serve_many_tasks.py --model ME/META-LORA --tasks 1000 --queries 64 --device cuda

Each task is fitted to random images of its own. Then batches of queries, each of another task, are answered in one
forward pass (`model.predict_tasks`) and in one for each task (`task.predict`), in turns; the ratio is the median of
the quotients within a turn. At the end threads ask their own tasks all at once, and the answers are compared.
"""

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch

from lora_recycle import MetaLoRAForFewShotClassification


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="folder or repo id of a meta-LoRA (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--ways", type=int, default=5, help="classes of a task, one image each (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=64, help="of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--device", help="as torch names it")
    args = parser.parse_args(argv)
    model = MetaLoRAForFewShotClassification.from_pretrained(args.model, device=args.device).merge()
    images = random_images(model, args.queries, seed=0)
    model.embed(images)  # warm up, so that the memory below is the tasks'
    before, start = memory(), time.perf_counter()
    tasks = fitted_tasks(model, args.tasks, args.ways)
    found = {
        "tasks": len(tasks),
        "kB of a task": held(tasks[0]) / 1e3,
        "MB more memory": (memory() - before) / 1e6,
        "MB in all": memory() / 1e6,
        "tasks fitted in a second": len(tasks) / (time.perf_counter() - start),
    }
    asked = [tasks[i % len(tasks)] for i in range(args.queries)]
    found |= throughput(model, images, asked, args.rounds)
    found["threads that got other answers"] = disagreeing_threads(images, asked, args.threads)
    for name, value in found.items():
        print(f"{name:<40} {value:10.1f}" if isinstance(value, float) else f"{name:<40} {value:10}")
    return found


def random_images(model, count: int, seed: int) -> torch.Tensor:
    """uint8 (count, 3, S, S)."""
    size, generator = model.backbone.image_size, torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def fitted_tasks(model, count: int, ways: int) -> list:
    names = [f"class {way}" for way in range(ways)]
    return [model.new_task().fit(random_images(model, ways, seed), names) for seed in range(1, count + 1)]


def held(task) -> int:
    """Bytes of the tensors of a fitted task."""
    known = task._task
    return sum(tensor.nbytes for tensor in (*known.statistics.values(), *known.prepared.values()))


def memory() -> int:
    """Bytes that this process holds now."""
    return psutil.Process().memory_info().rss


def throughput(model, images: torch.Tensor, asked: list, rounds: int) -> dict:
    """Answers in a second, mixed in one forward pass and one by one."""
    mixed, single = [], []
    for _ in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        model.predict_tasks(images, asked)
        mixed.append(time.perf_counter() - start)
        start = time.perf_counter()
        for image, task in zip(images.split(1), asked, strict=True):
            task.predict(image)
        single.append(time.perf_counter() - start)
    ratio = statistics.median(slow / fast for slow, fast in zip(single[1:], mixed[1:], strict=True))
    return {
        "answers in a second, one forward pass": len(images) / statistics.median(mixed[1:]),
        "answers in a second, one for each task": len(images) / statistics.median(single[1:]),
        "times as many": ratio,
    }


def disagreeing_threads(images: torch.Tensor, asked: list, threads: int) -> int:
    """How many of the threads, which all ask at once, get other answers than they get alone."""
    alone = [task.predict(image) for image, task in zip(images.split(1), asked, strict=True)]

    def ask(_) -> bool:
        return alone == [task.predict(image) for image, task in zip(images.split(1), asked, strict=True)]

    with ThreadPoolExecutor(threads) as executor:
        return threads - sum(executor.map(ask, range(threads)))


if __name__ == "__main__":
    main()
