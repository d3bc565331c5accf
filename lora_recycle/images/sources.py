"""The places where users keep images: a parquet file, a saved data set, a folder of folders, the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError, first_line
from .decode import image_suffixes
from .table_checks import check_parquet
from .tables import NO_COLUMNS, Columns, ImageSource, csv_source, dataset_table


#: The split that is judged comes first.
SPLITS = ("test", "validation", "valid", "val", "train")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_EXPECTED = "a parquet or CSV file, a saved data set, a folder of class folders or a Hub data set id"
#: Suffixes of files that hold a table of images.
TABLES = (".parquet", ".csv", ".tsv")


def open_source(
    path: str | Path,
    split: str | None = None,
    labelled: bool = True,
    order: Sequence[str] = SPLITS,
    columns: Columns = NO_COLUMNS,
) -> ImageSource:
    """The source behind a path or a Hub data set id, with labels where `labelled`.

    Args:
        split: of a folder or data set that has several; by default the first of `order` that there is.
        columns: of a table, where they are not found by their types and usual names.

    Raises:
        DataError: nothing there, of no known form, or without images or labels.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        name = f"{folder.resolve().parent.name}/{folder.stem}"
        if folder.suffix in (".csv", ".tsv"):
            return csv_source(folder, name, labelled, columns)
        if folder.suffix != ".parquet":
            raise DataError(f"{path}: expected {_EXPECTED}, got a {folder.suffix or 'nameless'} file.")
        return dataset_table(_read_parquet([folder]), name, labelled, columns)
    if folder.is_dir():
        return _open_folder(folder.resolve(), split, labelled, order, columns)
    if _HUB_ID.fullmatch(str(path)) and not str(path).endswith(TABLES):
        return dataset_table(_read_hub(str(path), split, order), str(path), labelled, columns, _caches())
    raise DataError(f"{path}: no such file or folder. Expected {_EXPECTED}.")


def _open_folder(
    folder: Path, split: str | None, labelled: bool, order: Sequence[str], columns: Columns
) -> ImageSource:
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return dataset_table(_read_saved(folder, split, order), folder.name, labelled, columns)
    tables = [path for path in sorted(folder.rglob("*.parquet")) if not _is_hidden(path, folder)]
    if tables:
        splits: dict[str, list[Path]] = {}
        for table in tables:  # a Hub data set on disk: test-00000-of-00002.parquet
            splits.setdefault(re.split(r"[-.]", table.name)[0], []).append(table)
        chosen = _choose_split(list(splits), split, folder, order)
        return dataset_table(_read_parquet(splits[chosen]), f"{folder.name}/{chosen}", labelled, columns)
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
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry, folder))


def _is_hidden(path: Path, folder: Path) -> bool:
    """Whether it lies in a hidden place below `folder`, or in what macOS packs beside the files of a ZIP."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)


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


def dataset_source(
    dataset: Any, labelled: bool, order: Sequence[str] = SPLITS, columns: Columns = NO_COLUMNS
) -> ImageSource:
    """The source behind a `datasets.Dataset`, or one split of a `DatasetDict`. Raises `DataError` as `open_source`."""
    return dataset_table(_one_split(dataset, None, "the data set", order), "the data set", labelled, columns)


def images_below(folder: Path, complaint: str) -> list[Path]:
    """The picture files below a folder, by their names, sorted. Raises `DataError` with the complaint for none."""
    known = image_suffixes()
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known and not _is_hidden(p, folder))
    if not paths:
        raise DataError(f"{folder}: {complaint}")
    return paths
