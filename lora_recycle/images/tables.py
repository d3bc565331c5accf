"""Tables of images in the forms that users have them: data sets, CSV files, DataFrames, and which columns to read."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import DataError, first_line
from ..runtime.untrusted_files import open_regular
from .decode import image_suffixes
from .table_checks import MAX_CSV_BYTES, MAX_ROWS, check_inside


IMAGE_COLUMNS = ("image", "img", "file_name", "filename", "path", "file")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "category")


@dataclass(frozen=True)
class Columns:
    """The columns to read, by name; None are found by their types and usual names."""

    image: str | None = None
    label: str | None = None


NO_COLUMNS = Columns()


@dataclass
class ImageSource:
    """Encoded images that can be fetched by index, before any is decoded.

    Args:
        name: a short name for tables and errors.
        count: how many images there are.
        fetch: yields (what errors call it, path or encoded bytes, or an image in memory) of the images of these
            numbers.
        labels (`torch.Tensor`, *optional*): int64 (N,), indices into `label_names`.
        label_names: what the labels stand for.
    """

    name: str
    count: int
    fetch: Callable[[list[int]], Iterator[tuple[str, Any]]]
    labels: torch.Tensor | None = None
    label_names: list[str | int] | None = None

    def __len__(self) -> int:
        return self.count

    def classes(self) -> tuple[torch.Tensor, list[str | int]]:
        """`labels` and `label_names` of a source that was opened with them."""
        assert self.labels is not None and self.label_names is not None, f"{self.name} was opened without labels"
        return self.labels, self.label_names


def is_dataset(value: Any) -> bool:
    """Whether it is a `datasets.Dataset` or `DatasetDict`; who never imported `datasets` has none."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(value, (datasets.Dataset, datasets.DatasetDict))


def is_frame(value: Any) -> bool:
    """Whether it is a pandas `DataFrame`; who never imported pandas has none."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame)


def frame_source(frame: Any, labelled: bool, columns: Columns = NO_COLUMNS) -> ImageSource:
    """The source behind a pandas `DataFrame`, whose images are paths, encoded bytes, PIL images or arrays.

    Raises:
        DataError: no rows, or no image or label column.
    """
    values = {str(name): list(frame.iloc[:, place]) for place, name in enumerate(frame.columns)}
    return _record_source(values, "the DataFrame", labelled, columns)


def csv_source(path: Path, name: str, labelled: bool, columns: Columns = NO_COLUMNS) -> ImageSource:
    """The source behind a CSV or TSV file with a header. Relative paths of images start at its folder.

    Raises:
        DataError: no table, too large, without rows, or without an image or a label column.
    """
    values: dict[str, list[Any]] = {}
    try:
        with open_regular(path) as file:
            content = file.read(MAX_CSV_BYTES + 1)
        if len(content) > MAX_CSV_BYTES:
            raise DataError(f"{path}: it has more than {MAX_CSV_BYTES} bytes. Split it.")
        text = io.StringIO(content.decode("utf-8-sig"), newline="")
        reader = csv.reader(text, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        header = next(reader, [])
        values = {column: [] for column in header}
        if len(values) < len(header):
            raise DataError(f"{path}: two columns are called {next(n for n in header if header.count(n) > 1)}.")
        for number, row in enumerate(reader, 2):
            if not row:
                continue
            if len(row) != len(values):
                raise DataError(f"{path}: line {number} has {len(row)} cells, the header {len(header)} columns.")
            for column, cell in zip(values, row, strict=True):
                values[column].append(cell or None)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable CSV file in UTF-8 ({first_line(error)}).") from error
    return _record_source(values, name, labelled, columns, path.parent)


def _record_source(
    values: Mapping[str, list[Any]], name: str, labelled: bool, columns: Columns, folder: Path | None = None
) -> ImageSource:
    """The source behind columns of Python values.

    Args:
        folder: where relative paths of images start; by default at the working directory.
    """
    count = len(next(iter(values.values()), []))
    _check_rows(count, name)
    known = image_suffixes()
    typed = [column for column, cells in values.items() if _is_image_cell(cells[0], known)]
    image = _choose(list(values), columns.image, typed, IMAGE_COLUMNS, name, "image")
    cells = values[image]

    def fetch(indices: list[int]) -> Iterator[tuple[str, Any]]:
        for index in indices:
            cell = cells[index]
            cell = (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell
            if folder is not None and isinstance(cell, str) and "://" not in cell:
                cell = str(folder / cell)
            yield f"{name}, row {index}" + (f" ({cell})" if isinstance(cell, str) else ""), cell

    if not labelled:
        return ImageSource(name, count, fetch)
    others = [column for column in values if column != image]
    column = _choose(others, columns.label, [], LABEL_COLUMNS, name, "label")
    plain = [value.item() if isinstance(value, np.generic) else value for value in values[column]]
    return ImageSource(name, count, fetch, *_numbered(plain, name, column))


def _is_image_cell(cell: Any, suffixes: frozenset[str]) -> bool:
    if isinstance(cell, dict):
        return bool(cell.get("bytes") or cell.get("path"))
    if isinstance(cell, (str, Path)):
        return Path(cell).suffix.lower() in suffixes
    return isinstance(cell, (bytes, Image.Image)) or getattr(cell, "ndim", 0) in (2, 3)


def dataset_table(
    dataset: Any, name: str, labelled: bool, columns: Columns = NO_COLUMNS, roots: Sequence[Path] | None = None
) -> ImageSource:
    """The source behind a `datasets.Dataset`: its image column left encoded, its label column as integers.

    Args:
        roots: folders that hold the images that it names; any, for a table of this machine, which `datasets` writes
            with the paths of images.

    Raises:
        DataError: no rows or too many, or no image or label column.
    """
    from datasets import Image as ImageFeature

    _check_rows(len(dataset), name)
    typed = [column for column, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
    image = _choose(dataset.column_names, columns.image, typed, IMAGE_COLUMNS, name, "image")
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

    labels, label_names = _labels(dataset, name, image, columns.label) if labelled else (None, None)
    return ImageSource(name, len(dataset), fetch, labels, label_names)


def _check_rows(count: int, name: str) -> None:
    if not count:
        raise DataError(f"{name}: the data set has no rows.")
    if count > MAX_ROWS:
        raise DataError(f"{name}: the data set has {count} rows, more than {MAX_ROWS}.")


def _labels(dataset: Any, name: str, image: str, asked: str | None) -> tuple[torch.Tensor, list[str | int]]:
    """(N,) labels and what they stand for, from a ClassLabel, an integer or a string column."""
    from datasets import ClassLabel

    typed = [column for column, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    others = [column for column in dataset.column_names if column != image]
    column = _choose(others, asked, typed, LABEL_COLUMNS, name, "label")
    values, feature = dataset[column][:], dataset.features[column]
    if column not in typed:
        return _numbered(values, name, column)
    _check_labelled(sum(value is None or value < 0 for value in values), len(values), name, column)
    if max(values) >= len(feature.names):
        raise DataError(
            f"{name}: column {column!r} holds the label {max(values)}, but has {len(feature.names)} names."
        )
    return torch.tensor(values), list(feature.names)


def _numbered(values: list[Any], name: str, column: str) -> tuple[torch.Tensor, list[str | int]]:
    """(N,) labels of a column of names or integers, and the sorted values that they stand for."""
    missing = [value is None or value != value for value in values]  # NaN is what pandas has in place of None
    kinds = {type(value).__name__ for value in values if value is not None}
    if any(missing) and kinds - {"float"} <= {"int", "str"} and kinds != {"float"}:
        _check_labelled(sum(missing), len(values), name, column)
    if kinds not in ({"int"}, {"str"}, {"bool"}):
        found = " and ".join(sorted(kinds)) or "nothing"
        raise DataError(f"{name}: column {column!r} must hold one integer or string a row, got {found}.")
    names = sorted(set(values))
    position = {value: index for index, value in enumerate(names)}
    return torch.tensor([position[value] for value in values]), names


def _check_labelled(missing: int, count: int, name: str, column: str) -> None:
    if missing:
        raise DataError(f"{name}: {missing} of {count} images have no label in column {column!r}.")


def _choose(
    known: list[str], asked: str | None, typed: list[str], usual: tuple[str, ...], where: str, what: str
) -> str:
    """The column asked for; else one of the right type, a usual name first; else a usual name; else the only label."""
    columns = ", ".join(known) or "none besides the images"
    if asked is not None:
        if asked not in known:
            raise DataError(f"{where}: has no column {asked!r} of {what}s. Columns: {columns}.")
        return asked
    found = [name for name in usual if name in (typed or known)] or typed
    if not found and what == "label" and len(known) == 1:  # beside the images there is nothing else
        found = known
    if found:
        return found[0]
    raise DataError(
        f"{where}: expected {'an' if what == 'image' else 'a'} {what} column (by type, or named "
        f"{' or '.join(usual)}), found columns {columns}. Name it as {what}_column (--{what}-column)."
    )
