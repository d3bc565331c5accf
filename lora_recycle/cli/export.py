"""`lora-recycle export`: a model as files that run without this library."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .common import (
    META_LORA_HELP,
    Subparsers,
    add_base_model_argument,
    add_data_arguments,
    add_json_argument,
    check_json,
    columns,
    hint,
    notify_failures,
    result,
    table,
    terminal_width,
)


EPILOG = """\
examples:
  lora-recycle export demo --task photos --output deployed            folders photos/cat, photos/dog, ...
  lora-recycle export my_task --output deployed                       a model saved with its task
  lora-recycle export meta_lora --output embedder                     without a task: pixels to embeddings
  lora-recycle export meta_lora --format torch --output embedder      a torch.export program (.pt2)
  lora-recycle export meta_lora --format transformers --output vit    a plain transformers checkpoint

ONNX needs: pip install 'lora-recycle[onnx]'. The exported file is loaded and compared with the model; export.json
describes the preprocessing and the largest difference.
"""


def add_parser(subparsers: Subparsers, **options: Any) -> argparse.ArgumentParser:
    summary = "export a model as ONNX, a torch.export program or a transformers checkpoint"
    parser = subparsers.add_parser("export", help=summary, description=summary, epilog=EPILOG, **options)
    parser.add_argument("model", metavar="MODEL", help=META_LORA_HELP)
    parser.add_argument(
        "--task", metavar="FOLDER", help="folder of examples with one folder per class, or a CSV or parquet file"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="new or empty folder, or that of an earlier export"
    )
    parser.add_argument(
        "--format", choices=("onnx", "torch", "transformers"), default="onnx", help="default: %(default)s"
    )
    parser.add_argument("--head", metavar="NAME", help="few-shot head (default: the one MODEL was saved with)")
    add_json_argument(parser, "the files")
    add_data_arguments(parser)
    add_base_model_argument(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    if args.task and args.format == "transformers":
        raise ConfigError("--task: a transformers checkpoint holds only the network. Use --format onnx or torch.")
    from ..adapters.sources import one_id
    from ..images.labelled import load_labelled_images
    from ..modeling.export import export, output_kind
    from ..modeling.meta_lora import MetaLoRAForFewShotClassification
    from ..runtime.outputs import check_output

    check_json(args, "file", "bytes")
    check_output(args.output, output_kind(args.format))
    name, revision = one_id(args.model)
    model = MetaLoRAForFewShotClassification.from_pretrained(
        name, revision=revision, head=args.head, base_model=args.base_model, base_revision=args.base_revision
    )
    if args.task:
        size, resample = model.backbone.image_size, int(model.backbone.processor.resample)
        failures: dict[int, str] | None = {} if args.skip_errors else None
        support = load_labelled_images(args.task, size, resample, columns=columns(args), failures=failures)
        notify_failures(failures)
        model.fit(support.pixels, [support.label_names[label] for label in support.labels.tolist()])
    if not args.debug:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it lists the libraries that it does without
    described = export(model, args.output, args.format)
    difference = f"{described['checked']['difference']:.0e}"
    written = [path for path in sorted(Path(args.output).iterdir()) if path.is_file() and path.name[0] != "."]
    rows = [(path, path.stat().st_size) for path in written]
    values = [{"file": path, "bytes": size} for path, size in rows]
    result(args, values, table(("file", "bytes"), rows, terminal_width(sys.stdout)))
    gives = f"{described['output']['shape'][1]} {described['output']['name']}"
    hint(
        f"docs/deployment.md says how to run it. It computes {gives} per image; verified with batches of "
        f"{', '.join(map(str, described['checked']['batch_sizes']))}, largest relative difference {difference}."
    )
