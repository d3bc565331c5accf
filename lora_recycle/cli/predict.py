"""`lora-recycle predict`: classify images from a few examples of each class."""

from __future__ import annotations

import argparse
import csv
import io
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError
from ..runtime.terminal import counted, csv_cell, single_line
from .common import (
    META_LORA_HELP,
    Subparsers,
    add_base_model_argument,
    add_data_arguments,
    add_device_argument,
    add_json_argument,
    check_json,
    columns,
    echo,
    hint,
    load_model,
    note,
    notify_failures,
    result,
    table,
    terminal_width,
)


if TYPE_CHECKING:
    import torch


EPILOG = """\
examples:
  lora-recycle predict demo --support examples photo.jpg      folders examples/cat, examples/dog, ...
  lora-recycle predict meta_lora --support examples photos/ --json
  lora-recycle predict meta_lora --support examples photos/ --csv --skip-errors > answers.csv
  lora-recycle predict demo --support examples photos/ --head transductive_em      all photos jointly
  lora-recycle predict fitted_model photo.jpg                 a model saved with its task
  lora-recycle predict demo --support birds.csv --label-column species photos/*.jpg

heads: prototypes, cosine_prototypes, euclidean_prototypes, lda, logistic_regression; and, for images that are given
together and all belong to the classes shown, transductive_laplacian, transductive_transport, transductive_em,
transductive_information.
"""


def add_parser(subparsers: Subparsers, **options: Any) -> argparse.ArgumentParser:
    summary = "classify images from a few examples of each class"
    parser = subparsers.add_parser("predict", help=summary, description=summary, epilog=EPILOG, **options)
    parser.add_argument("model", metavar="MODEL", help=META_LORA_HELP)
    parser.add_argument(
        "--support", metavar="FOLDER", help="folder of examples with one folder per class, or a CSV or parquet file"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="image files and folders of images")
    parser.add_argument(
        "--domain", metavar="NAME", help="with --support: the domain of MODEL to use, or shared (default: chosen)"
    )
    parser.add_argument("--head", metavar="NAME", help="few-shot head (default: the one MODEL was saved with)")
    forms = parser.add_mutually_exclusive_group()
    add_json_argument(forms, "all class probabilities")
    forms.add_argument("--csv", action="store_true", help="print all class probabilities as CSV, in columns p(CLASS)")
    add_data_arguments(parser)
    add_base_model_argument(parser)
    add_device_argument(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    from ..modeling.support import support_set

    check_json(args, "file", "label", "probabilities")
    _check_model(args.model)
    paths = _expand(args.images)
    support = support_set(args.support, None, columns(args)) if args.support else None  # errors before the loading
    model = load_model(args, args.model, args.head)
    failures: dict[int, str] | None = {} if args.skip_errors else None
    if support:
        model.fit(*support, failures=failures, domain=args.domain)
        notify_failures(failures)
    elif args.domain:
        raise ConfigError("--domain is chosen when examples are shown; it goes with --support.")
    elif not model.label_names:
        raise DataError(f"{args.model} was saved without a task: pass examples with --support FOLDER.")
    probabilities = model.predict_proba(paths, failures=failures, progress=not args.quiet and len(paths) > 64)
    notify_failures(failures)
    if failures and len(failures) == len(paths):
        raise DataError(f"None of the {counted(len(paths), 'image')} can be read.")
    read = [number for number in range(len(paths)) if not failures or number not in failures]
    if model.domain is not None and not args.quiet:
        note(f"Domain: {single_line(model.domain.name)}")
    _print(args, [paths[number] for number in read], probabilities[read], model.label_names)
    hint(f"lora-recycle evaluate {shlex.quote(args.model)} --data FOLDER measures the accuracy on labelled images.")


def _check_model(name: str) -> None:
    """Raise `DataError` where an image, or a folder that is no adapter, stands in MODEL's place."""
    from ..hub.repo_files import CONFIG_FILE

    first = Path(name)
    known = (CONFIG_FILE, "config.json")  # of an adapter, or of a base model alone
    if first.is_file() or (first.is_dir() and not any((first / file).exists() for file in known)):
        raise DataError(f"{first} is not a meta-LoRA (it has no {CONFIG_FILE}). Put one, or demo, before the images.")


def _print(args: argparse.Namespace, paths: list[Path], probabilities: torch.Tensor, label_names: list[Any]) -> None:
    """One line or object for each image on stdout, in the form that was asked for."""
    best = probabilities.argmax(1)
    labels = [label_names[i] for i in best.tolist()]
    highest = probabilities.gather(1, best[:, None]).flatten().tolist()
    names = [str(name) for name in label_names]
    if args.csv:
        echo(_csv(names, zip(paths, labels, highest, probabilities.tolist(), strict=True)))
        return
    values = [
        {"file": str(path), "label": label, "probabilities": dict(zip(names, row, strict=True))}
        for path, label, row in zip(paths, labels, probabilities.tolist(), strict=True)
    ]
    rows = zip(paths, labels, [f"{value:.3f}" for value in highest], strict=True)
    result(args, values, table(("file", "label", "probability"), rows, terminal_width(sys.stdout)))


def _csv(names: list[str], rows: Iterable[tuple[Path, Any, float, list[float]]]) -> str:
    """A line for each (file, label, probability, probabilities of all names), no cell of which is a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "label", "probability", *(csv_cell(f"p({name})") for name in names)])
    for path, label, value, shares in rows:
        cells = [csv_cell(str(path)), csv_cell(str(label)), f"{value:.6f}"]
        writer.writerow([*cells, *(f"{share:.6f}" for share in shares)])
    return text.getvalue().rstrip("\n")


def _expand(names: list[str]) -> list[Path]:
    """The files, with those below a folder in its place. Raises `DataError` for what does not exist."""
    from ..images.decode import local_path
    from ..images.sources import images_below

    paths: list[Path] = []
    for path in map(local_path, names):
        if path.is_dir():
            paths += images_below(path, "no images in this folder.")
        elif path.is_file():
            paths.append(path)
        else:
            raise DataError(f"{path}: no such image or folder.")
    return paths
