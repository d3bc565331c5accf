"""The places where users keep images: a parquet file, a saved data set, a folder of folders, the Hub."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..errors import DataError, first_line
from .decode import FORMATS
from .table_checks import MAX_ROWS, check_inside, check_parquet


IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
#: The split that is judged comes first.
SPLITS = ("test", "validation", "valid", "val", "train")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_EXPECTED = "a parquet file, a saved data set, a folder of class folders or a Hub data set id"


@dataclass
class ImageSource:
    """Encoded images that can be fetched by index, before any is decoded.

    Args:
        name: a short name for tables and errors.
        count: how many images there are.
        fetch: yields (what errors call it, path or encoded bytes) of the images of these numbers.
        labels (`torch.Tensor`, *optional*): int64 (N,), indices into `label_names`.
        label_names: what the labels stand for.
    """

    name: str
    count: int
    fetch: Callable[[list[int]], Iterator[tuple[str, bytes | str | None]]]
    labels: torch.Tensor | None = None
    label_names: list[str | int] | None = None

    def __len__(self) -> int:
        return self.count

    def classes(self) -> tuple[torch.Tensor, list[str | int]]:
        """`labels` and `label_names` of a source that was opened with them."""
        assert self.labels is not None and self.label_names is not None, f"{self.name} was opened without labels"
        return self.labels, self.label_names


def open_source(
    path: str | Path, split: str | None = None, labelled: bool = True, order: Sequence[str] = SPLITS
) -> ImageSource:
    """The source behind a path or a Hub data set id, with labels where `labelled`.

    Args:
        split: of a folder or data set that has several; by default the first of `order` that there is.

    Raises:
        DataError: nothing there, of no known form, or without images or labels.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        if folder.suffix != ".parquet":
            raise DataError(f"{path}: expected {_EXPECTED}, got a {folder.suffix or 'nameless'} file.")
        return _table(_read_parquet([folder]), f"{folder.resolve().parent.name}/{folder.stem}", labelled)
    if folder.is_dir():
        return _open_folder(folder.resolve(), split, labelled, order)
    if _HUB_ID.fullmatch(str(path)) and not str(path).endswith(".parquet"):
        return _table(_read_hub(str(path), split, order), str(path), labelled, _caches())
    raise DataError(f"{path}: no such file or folder. Expected {_EXPECTED}.")


def _open_folder(folder: Path, split: str | None, labelled: bool, order: Sequence[str]) -> ImageSource:
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _table(_read_saved(folder, split, order), folder.name, labelled)
    tables = sorted(folder.rglob("*.parquet"))
    if tables:
        splits: dict[str, list[Path]] = {}
        for table in tables:  # a Hub data set on disk: test-00000-of-00002.parquet
            splits.setdefault(re.split(r"[-.]", table.name)[0], []).append(table)
        chosen = _choose_split(list(splits), split, folder, order)
        return _table(_read_parquet(splits[chosen]), f"{folder.name}/{chosen}", labelled)
    if not labelled:
        paths = images_below(folder, "no images below this folder.")
        return ImageSource(folder.name, len(paths), _fetch_paths(paths))
    return _class_folders(folder, split, order)


def _class_folders(folder: Path, split: str | None, order: Sequence[str]) -> ImageSource:
    name, classes = folder.name, _subfolders(folder)
    if classes and (split or {entry.name for entry in classes} <= set(SPLITS)):
        chosen = _choose_split([entry.name for entry in classes], split, folder, order)
        name, classes = f"{name}/{chosen}", _subfolders(folder / chosen)
    if not classes:
        raise DataError(f"{folder}: expected one folder of images for each class, found no folder.")
    paths, labels = [], []
    for label, entry in enumerate(classes):
        files = images_below(entry, "this class folder holds no images. Remove it or fill it.")
        paths += files
        labels += [label] * len(files)
    return ImageSource(name, len(paths), _fetch_paths(paths), torch.tensor(labels), [entry.name for entry in classes])


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _fetch_paths(paths: list[Path]) -> Callable[[list[int]], Iterator[tuple[str, str]]]:
    return lambda indices: ((str(paths[index]), str(paths[index])) for index in indices)


def _read_parquet(files: list[Path]) -> Any:
    from datasets import load_dataset

    for file in files:
        check_parquet(file)
    try:
        return load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except Exception as error:  # pyarrow and datasets share no base error
        raise DataError(f"{files[0]}: not a readable parquet file ({first_line(error)}).") from error


def _read_saved(folder: Path, split: str | None, order: Sequence[str]) -> Any:
    from datasets import load_from_disk

    try:
        loaded = load_from_disk(str(folder))
        for part in loaded.values() if isinstance(loaded, dict) else [loaded]:
            part.data.validate(full=True)  # Arrow reads beyond its buffers where its offsets lie
    except Exception as error:  # pyarrow and datasets share no base error
        raise DataError(f"{folder}: not a readable saved data set ({first_line(error)}).") from error
    return _one_split(loaded, split, folder, order)


def _read_hub(name: str, split: str | None, order: Sequence[str]) -> Any:
    from datasets import load_dataset

    try:
        _ask_hub(name)
        loaded = load_dataset(name)
    except Exception as error:  # network, hub and datasets errors share no base
        raise DataError(
            f"{name}: no such file or folder, and no data set of that name could be loaded from the Hub "
            f"({first_line(error)}). Expected {_EXPECTED}."
        ) from error
    return _one_split(loaded, split, name, order)


def _caches() -> list[Path]:
    """Where files lie that were downloaded from the Hub."""
    from datasets import config
    from huggingface_hub import constants

    return [Path(config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE)]


def _ask_hub(name: str) -> None:
    """Raise where a data set that is not in the cache is not on the Hub either, or the Hub cannot be reached.

    `datasets` would try for half a minute, and most such names are folders that are spelled otherwise.
    """
    from datasets import config
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if config.HF_HUB_OFFLINE or (config.HF_DATASETS_CACHE / name.replace("/", "___")).is_dir():
        return
    try:
        HfApi().dataset_info(name, timeout=10)
    except RepositoryNotFoundError:
        raise LookupError("it has none, or a private one, which needs a token") from None


def _one_split(loaded: Any, split: str | None, where: str | Path, order: Sequence[str]) -> Any:
    return loaded[_choose_split(list(loaded), split, where, order)] if isinstance(loaded, dict) else loaded


def _choose_split(splits: list[str], split: str | None, where: str | Path, order: Sequence[str]) -> str:
    """The split asked for, else the first of `order` there is, else the first."""
    wanted = (split,) if split else (*order, *splits)
    chosen = next((name for name in wanted if name in splits), None)
    if chosen is None:
        raise DataError(f"{where}: no split {split!r}, it has {', '.join(sorted(splits))}.")
    return chosen


def dataset_source(dataset: Any, labelled: bool, order: Sequence[str] = SPLITS) -> ImageSource:
    """The source behind a `datasets.Dataset`, or one split of a `DatasetDict`. Raises `DataError` as `open_source`."""
    return _table(_one_split(dataset, None, "the data set", order), "the data set", labelled)


def is_dataset(value: Any) -> bool:
    """Whether it is a `datasets.Dataset` or `DatasetDict`; who never imported `datasets` has none."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(value, (datasets.Dataset, datasets.DatasetDict))


def _table(dataset: Any, name: str, labelled: bool, roots: Sequence[Path] | None = None) -> ImageSource:
    """The source behind a `datasets.Dataset`: its image column left encoded, its label column as integers.

    Args:
        roots: folders that hold the images that it names; any, for a table of this machine, which `datasets` writes
            with the paths of images.
    """
    from datasets import Image as ImageFeature

    if not len(dataset):
        raise DataError(f"{name}: the data set has no rows.")
    if len(dataset) > MAX_ROWS:
        raise DataError(f"{name}: the data set has {len(dataset)} rows, more than {MAX_ROWS}.")
    typed = [column for column, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
    image = _column(dataset, typed, IMAGE_COLUMNS, name, "an image column")
    try:
        encoded = dataset.select_columns([image]).cast_column(image, ImageFeature(decode=False))
    except Exception as error:  # pyarrow and datasets share no base error
        raise DataError(f"{name}: column {image!r} holds no images ({first_line(error)}).") from error

    def fetch(indices: list[int]) -> Iterator[tuple[str, bytes | str | None]]:
        batches = encoded.select(indices).iter(batch_size=512)
        cells = (cell or {} for batch in batches for cell in batch[image])
        for index, cell in zip(indices, cells, strict=True):
            where, path = f"{name}, row {index}", cell.get("path")
            if path and not cell.get("bytes") and roots is not None:
                check_inside(path, roots, where)
            yield where, cell.get("bytes") or path

    labels, label_names = _labels(dataset, name) if labelled else (None, None)
    return ImageSource(name, len(dataset), fetch, labels, label_names)


def _labels(dataset: Any, name: str) -> tuple[torch.Tensor, list[str | int]]:
    """(N,) labels and what they stand for, from a ClassLabel, an integer or a string column."""
    from datasets import ClassLabel

    typed = [column for column, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    column = _column(dataset, typed, LABEL_COLUMNS, name, "a label column")
    values, feature = dataset[column][:], dataset.features[column]
    missing = sum(value is None or (column in typed and value < 0) for value in values)
    if missing:
        raise DataError(f"{name}: {missing} of {len(values)} images have no label in column {column!r}.")
    if column in typed:
        if values and max(values) >= len(feature.names):
            raise DataError(
                f"{name}: column {column!r} holds the label {max(values)}, but has {len(feature.names)} names."
            )
        return torch.tensor(values), list(feature.names)
    if not isinstance(values[0], (int, str)):
        raise DataError(f"{name}: column {column!r} must hold one integer or string a row, got {feature}.")
    names = sorted(set(values))
    position = {value: index for index, value in enumerate(names)}
    return torch.tensor([position[value] for value in values]), names


def _column(dataset: Any, typed: list[str], names: tuple[str, ...], where: str, what: str) -> str:
    """The column of the right type, a usual name first; else a column with a usual name."""
    candidates = typed or dataset.column_names
    usual = [name for name in names if name in candidates]
    if usual or typed:
        return (usual or typed)[0]
    columns = ", ".join(dataset.column_names)
    raise DataError(f"{where}: expected {what} (by type, or named {' or '.join(names)}), found columns {columns}.")


def images_below(folder: Path, complaint: str) -> list[Path]:
    """The picture files below a folder, by their names, sorted. Raises `DataError` with the complaint for none."""
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS} | {".heic", ".heif"}
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known and not p.name.startswith("."))
    if not paths:
        raise DataError(f"{folder}: {complaint}")
    return paths
