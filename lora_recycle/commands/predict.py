"""`lora-recycle predict`: classify images after one look at a few examples of each class."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import DataError
from .common import META_LORA_HELP, add_base_model_argument, add_device_argument, checked_device, hint, table


EPILOG = """\
examples:
  lora-recycle predict demo --support examples photo.jpg      folders examples/cat, examples/dog, ...
  lora-recycle predict meta_lora --support examples photos/ --json
  lora-recycle predict demo --support examples photos/ --head transductive_em      all photos as one set
  lora-recycle predict fitted_model photo.jpg                 a model that was saved with its task

heads: class_centres, cosine_centres, euclidean_centres, lda, logistic_regression; and, for images that come together
and belong to the classes shown, transductive_laplacian, transductive_transport, transductive_em.
"""


def add_parser(subparsers, **options) -> argparse.ArgumentParser:
    summary = "classify images after one look at a few examples of each class"
    parser = subparsers.add_parser("predict", help=summary, description=summary, epilog=EPILOG, **options)
    parser.add_argument("model", metavar="MODEL", help=META_LORA_HELP)
    parser.add_argument(
        "--support", metavar="FOLDER", help="folder with one folder of examples for each class (or a parquet file)"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="image files, and folders of them")
    parser.add_argument("--head", metavar="NAME", help="few-shot head (default: the one that MODEL was saved with)")
    parser.add_argument("--json", action="store_true", help="print all class probabilities as JSON")
    add_base_model_argument(parser)
    add_device_argument(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    from ..hub.sources import one_id
    from ..images import load_labelled_images
    from ..modeling.meta_lora import MetaLoRAForFewShotClassification

    paths = _expand(args.images)
    name, revision = one_id(args.model)
    model = MetaLoRAForFewShotClassification.from_pretrained(
        name,
        revision=revision,
        head=args.head,
        base_model=args.base_model,
        base_revision=args.base_revision,
        device=checked_device(args.device),
    )
    if args.support:
        size, resample = model.backbone.image_size, int(model.backbone.processor.resample)
        support = load_labelled_images(args.support, size, resample)
        model.fit(support.pixels, [support.label_names[label] for label in support.labels.tolist()])
    elif not model.label_names:
        raise DataError(f"{args.model} was saved without a task: show examples with --support FOLDER.")
    probabilities = model.predict_proba(paths)
    best = probabilities.max(1)
    labels = [model.label_names[i] for i in best.indices.tolist()]
    if args.json:
        names = [str(name) for name in model.label_names]
        rows = [
            {"file": str(path), "label": label, "probabilities": dict(zip(names, row, strict=True))}
            for path, label, row in zip(paths, labels, probabilities.tolist(), strict=True)
        ]
        print(json.dumps(rows, indent=1))
    else:
        shown = [f"{value:.3f}" for value in best.values.tolist()]
        print(table(("file", "label", "probability"), zip(paths, labels, shown, strict=True)))
    hint("lora-recycle evaluate MODEL --data PATH measures how often such answers are right.")


def _expand(names: list[str]) -> list[Path]:
    """The files, with those below a folder in its place. Raises `DataError` for what does not exist."""
    from ..images import images_below

    paths: list[Path] = []
    for path in map(Path, names):
        if path.is_dir():
            paths += images_below(path, "no images below this folder.")
        elif path.is_file():
            paths.append(path)
        else:
            raise DataError(f"{path}: no such image or folder.")
    return paths
