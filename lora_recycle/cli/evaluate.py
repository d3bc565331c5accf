"""`lora-recycle evaluate`: a meta-LoRA and the baselines on real images, all on the same episodes."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..evaluation.config import EvaluationConfig
from ..hub.embedded import backbone_name
from ..runtime.terminal import counted
from .arguments import add_config_arguments, build_config
from .common import (
    META_LORA_HELP,
    POOL_HELP,
    Subparsers,
    add_base_model_argument,
    add_data_arguments,
    add_device_argument,
    add_features_argument,
    add_json_argument,
    add_on_error_argument,
    check_json,
    columns,
    hint,
    load_model,
    load_pool,
    note,
    notify_failures,
    result,
    table,
    terminal_width,
)


if TYPE_CHECKING:
    from ..evaluation.fixed_split import SplitResult
    from ..modeling.meta_lora import MetaLoRAForFewShotClassification
    from ..pool.pool import AdapterPool


EPILOG = """\
examples:
  lora-recycle evaluate demo --data photos                    folders photos/cat, photos/dog, ...
  lora-recycle evaluate meta_lora --data test.parquet --pool pool --json results.json
  lora-recycle evaluate someone/meta-lora --data cifar10 --split test --ways 10 --shots 1 5 20
  lora-recycle evaluate demo --support photos --data test     your own classes: accuracy, confusion matrix, mistakes
  lora-recycle evaluate demo --support photos --data test --json results.json --report report.html
  lora-recycle evaluate demo --data photos --no-pool          faster: only frozen and meta-lora
  lora-recycle evaluate demo --data photos --methods average ties nearest-group
  lora-recycle evaluate demo --data photos --heads lda transductive_em     more few-shot heads

methods: frozen (prototypes on the bare backbone) and meta-lora, always; frozen-centred, frozen-euclidean. With a pool,
all without tuning: average (of all weight changes), average-rank-16, ensemble (all adapters, one forward pass each),
random (a control), magnitude, dare, ties, knots (merges), restored, undiluted, group-sum, nearest-group (groups of
similar adapters), class-statistics (the adapter whose classes are most similar to the support set; needs heads), arrow
(routes tokens to adapters). A merge takes a scale in its name: ties:0.3. docs/methods.md says when to use which.

heads, each on frozen and on meta-lora: cosine_prototypes, euclidean_prototypes, lda, logistic_regression,
transductive_laplacian, transductive_transport, transductive_em, transductive_information; the transductive ones
classify all queries of an episode jointly. docs/concepts.md says what they assume.
"""


def add_parser(subparsers: Subparsers, **options: Any) -> argparse.ArgumentParser:
    summary = "compare a meta-LoRA with baselines on real images"
    parser = subparsers.add_parser("evaluate", help=summary, description=summary, epilog=EPILOG, **options)
    parser.add_argument("model", metavar="MODEL", help=META_LORA_HELP)
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="labelled images: a parquet or CSV file, a data set folder, a folder of class folders or a Hub id",
    )
    parser.add_argument(
        "--support",
        metavar="FOLDER",
        help="instead of random episodes, fit to these examples, as predict does, and judge on the images of --data",
    )
    parser.add_argument("--report", metavar="FILE", help="with --support: also write a page with a confusion matrix")
    parser.add_argument(
        "--split",
        metavar="S",
        help="split of the data set (default: test, else validation, else train)",
    )
    pools = parser.add_mutually_exclusive_group()
    pools.add_argument("--pool", nargs="+", metavar="POOL", help=f"compare with these {POOL_HELP}")
    pools.add_argument("--no-pool", action="store_true", help="skip the methods that need a pool")
    add_json_argument(parser, "the rows")
    add_features_argument(parser)
    add_data_arguments(parser)
    add_on_error_argument(parser)
    add_base_model_argument(parser)
    add_device_argument(parser)
    add_config_arguments(parser, EvaluationConfig)
    return parser


def run(args: argparse.Namespace) -> None:
    config = build_config(args, EvaluationConfig)
    if args.support:
        return _run_split(args)
    if args.report:
        raise ConfigError("--report shows one classifier: pass its examples with --support.")
    from ..evaluation.evaluate import evaluate
    from ..evaluation.results import format_table
    from ..evaluation.stored_features import OUTPUT
    from ..images.labelled import load_labelled_images
    from ..runtime.outputs import claim_output

    check_json(args, "rows")
    if args.features:
        claim_output(args.features, OUTPUT)
    model = load_model(args, args.model)
    size, resample = model.backbone.image_size, int(model.backbone.processor.resample)
    failures: dict[int, str] | None = {} if args.skip_errors else None
    reading: Any = {"columns": columns(args), "failures": failures}
    data = load_labelled_images(args.data, size, resample, config.max_per_class, args.split, config.seed, **reading)
    notify_failures(failures)
    pool = _load_pool(args, model)
    found = evaluate(data, model, config, pool=pool, features_dir=args.features, progress=not args.quiet)
    result(args, {"rows": found.rows}, format_table(found.rows, terminal_width(sys.stdout)))
    for remark in found.notes:
        note(remark)
    for line in () if args.quiet else found.domains:
        note(line)
    hint(f"lora-recycle predict {shlex.quote(args.model)} --support FOLDER_OF_CLASS_FOLDERS IMAGES...")


def _run_split(args: argparse.Namespace) -> None:
    """A model fitted to the examples, on a fixed set of test images."""
    from ..evaluation.fixed_split import evaluate_split
    from ..images.sources import open_source
    from ..modeling.support import support_set
    from ..reports.html_page import is_page
    from ..reports.split_page import write_split_page
    from ..runtime.outputs import check_file

    if args.pool:
        raise ConfigError("--pool is for random episodes; leave it out with --support.")
    check_json(args, "confusion")
    if args.report:
        check_file(args.report, is_page, "a report")
    support = support_set(args.support, None, columns(args))
    source = open_source(args.data, args.split, columns=columns(args))
    numbers, label_names = source.classes()
    model = load_model(args, args.model).fit(*support)
    found = evaluate_split(model, source, [label_names[i] for i in numbers.tolist()], progress=not args.quiet)
    result(args, found.to_dict(), _described(found))
    mistakes = [(row["file"], row["label"], row["predicted"], round(row["probability"], 3)) for row in found.worst(5)]
    if mistakes:
        note("Wrong answers, the surest first:")
        note(table(("file", "label", "answer", "probability"), mistakes))
    if args.report:
        write_split_page(args.report, found, f"{args.model} on {source.name}")
    hint(f"lora-recycle predict {shlex.quote(args.model)} --support {shlex.quote(args.support)} IMAGES...")


def _described(found: SplitResult) -> str:
    """The accuracy, and a table of the classes."""
    low, high = found.interval
    rows = [
        (row["class"], row["images"], *map(_percent, (row["recall"], row["precision"]))) for row in found.per_class()
    ]
    return (
        f"accuracy {found.accuracy:.1f}%, 95% interval {low:.1f} to {high:.1f} (exact binomial), "
        f"{counted(len(found.labels), 'image')}\n{table(('class', 'images', 'recall', 'precision'), rows)}"
    )


def _percent(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _load_pool(args: argparse.Namespace, model: MetaLoRAForFewShotClassification) -> AdapterPool | None:
    """The pool to compare with, None without one. Raises `ConfigError` where it adapts another base than `model`."""
    if not args.no_pool and args.pool is None and args.model == "demo":
        args.pool = ["demo"]
    if not args.pool:
        return None
    pool = load_pool(args)
    mine, theirs = backbone_name(model.backbone.name), backbone_name(pool.backbone.name)
    if mine != theirs:
        raise ConfigError(
            f"{args.model} adapts {mine}, but the pool adapts {theirs}. Pass --base-model if they are the same."
        )
    return pool
