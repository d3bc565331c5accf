"""Judge ways to use a pool on a task of your own, all on the same episodes.

    python examples/compare_methods.py --data photos/ --pool adapters/ --methods average magnitude nearest-group

`photos/` are images of classes that no adapter has seen. Without arguments: three shipped adapters, of flowers and of
characters, on handwritten digits. What `lora-recycle evaluate`
does, as a start for comparisons of your own.
"""

import argparse

from lora_recycle import AdapterPool, EvaluationConfig, evaluate
from lora_recycle.demo.run import load_digits_images
from lora_recycle.evaluation.results import format_table
from lora_recycle.hub.embedded import pool_path
from lora_recycle.images.labelled import load_labelled_images


SHIPPED = ("vgg_flower-05", "omniglot_small-05", "omniglot_small-06")


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", help="folder of class folders, parquet file or Hub id of classes no adapter has seen"
    )
    parser.add_argument("--pool", nargs="+", help="adapters (default: three shipped ones)")
    parser.add_argument("--methods", nargs="+", default=["average", "magnitude", "nearest-group"])
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--episodes", type=int, default=600)
    args = parser.parse_args(arguments)
    pool = AdapterPool.from_pretrained(args.pool or [pool_path() / name for name in SHIPPED])
    size = pool.backbone.image_size
    data = load_labelled_images(args.data, size) if args.data else load_digits_images(size, max_per_class=20)
    config = EvaluationConfig(methods=args.methods, shots=args.shots, episodes=args.episodes)
    result = evaluate(data, config=config, pool=pool)
    print(format_table(result.rows))
    return result.rows


if __name__ == "__main__":
    main()
