"""Real images from wherever a user keeps them: a parquet file, a saved data set, a folder of folders, the Hub."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .errors import DataError


IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
SPLITS = ("test", "validation", "valid", "val", "train")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_EXPECTED = "a parquet file, a saved data set, a folder of class folders or a Hub data set id"


@dataclass
class LabelledImages:
    """Images with their classes, ready for a backbone's normalisation.

    Args:
        pixels (`torch.Tensor`): uint8 (N, 3, size, size), RGB, resized, not normalised.
        labels (`torch.Tensor`): int64 (N,), indices into `label_names`.
        label_names (`list[str]`): the class names.
        name (`str`): a short name for tables.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    label_names: list[str]
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def by_class(self) -> dict[int, torch.Tensor]:
        """The indices, (n,) each, of the images of every class that has any."""
        return {label: (self.labels == label).nonzero().flatten() for label in self.labels.unique().tolist()}


@dataclass
class _Source:
    """Encoded images that can be fetched by index, before any is decoded."""

    name: str
    count: int
    fetch: Callable[[list[int]], Iterator[tuple[str, bytes | str | None]]]  # yields (what errors call it, image)
    labels: torch.Tensor | None = None
    label_names: list[str] | None = None


def load_labelled_images(
    path: str | Path,
    size: int,
    resample: int = 3,
    max_per_class: int | None = None,
    split: str | None = None,
    seed: int = 0,
) -> LabelledImages:
    """Read labelled images, convert to RGB and resize to `size` x `size`.

    Args:
        path (`str` or `Path`): a parquet file, a `datasets.save_to_disk` folder, a folder of class folders or a
            Hub data set id.
        resample (`int`, *optional*, defaults to 3): PIL's number of the filter, as image processors give it.
        max_per_class (`int`, *optional*): keep a random subset of each class, drawn before any image is decoded.
        split (`str`, *optional*): which split of a folder or Hub data set; by default test, validation or train.

    Raises:
        DataError: nothing there, no image or label column, an empty class folder, or an image that cannot be read.
    """
    source = _open(path, split, labelled=True)
    kept = _subset(source.labels, max_per_class, seed)
    return LabelledImages(_decode(source, kept, size, resample), source.labels[kept], source.label_names, source.name)


def load_unlabelled_images(
    path: str | Path, size: int, resample: int = 3, limit: int | None = None, seed: int = 0
) -> torch.Tensor:
    """Read images without labels, uint8 (N, 3, size, size): every image below a folder, or those of a data set.

    Args:
        limit (`int`, *optional*): keep a random subset of so many images, drawn before any is decoded.

    Raises:
        DataError: nothing there, no images, or an image that cannot be read.
    """
    source = _open(path, None, labelled=False)
    kept = _subset(torch.zeros(source.count), limit, seed)  # all of one class
    return _decode(source, kept, size, resample)


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB image of any PIL mode; an alpha channel is dropped, as transformers' image processors do."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # PIL would clip at 255: 16-bit X-rays would turn white
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
        image = Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def to_picture(image) -> Image.Image:
    """One image in any form as RGB. Raises `DataError` where it cannot be read."""
    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as opened:
                return to_rgb(opened)
        except (OSError, Image.DecompressionBombError, ValueError) as error:
            raise DataError(f"{image}: cannot be read as an image ({error}).") from error
    if isinstance(image, torch.Tensor):
        image = image.permute(1, 2, 0).cpu().numpy() if image.ndim == 3 and image.shape[0] in (1, 3) else image.numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise DataError(f"Arrays of pixels must be uint8, got {image.dtype}; scale to 0-255 first.")
        image = Image.fromarray(image.squeeze(-1) if image.ndim == 3 and image.shape[-1] == 1 else image)
    if not isinstance(image, Image.Image):
        raise DataError(f"No image can be read from a {type(image).__name__}: pass PIL images, arrays or paths.")
    return to_rgb(image)


def _decode(source: _Source, kept: torch.Tensor, size: int, resample: int) -> torch.Tensor:
    """uint8 (len(kept), 3, size, size) images of a source."""
    pixels = torch.empty(len(kept), 3, size, size, dtype=torch.uint8)
    target = pixels.numpy()
    for number, (where, raw) in enumerate(source.fetch(kept.tolist())):
        try:
            with Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw) as opened:
                image = to_rgb(opened)
        except Exception as error:  # decoders of damaged files raise nearly anything
            raise DataError(f"{where}: not a readable image ({error or type(error).__name__}).") from error
        if image.size != (size, size):
            image = image.resize((size, size), resample)
        target[number] = np.asarray(image).transpose(2, 0, 1)
    return pixels


def _subset(labels: torch.Tensor, max_per_class: int | None, seed: int) -> torch.Tensor:
    """(M,) sorted indices with at most `max_per_class` of each label."""
    if max_per_class is None:
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    classes = [(labels == label).nonzero().flatten() for label in labels.unique()]
    kept = [found[torch.randperm(len(found), generator=generator)[:max_per_class]] for found in classes]
    return torch.cat(kept).sort().values


def _open(path: str | Path, split: str | None, labelled: bool) -> _Source:
    """The source behind PATH, with labels where `labelled`."""
    folder = Path(path).expanduser()
    if folder.is_file():
        if folder.suffix != ".parquet":
            raise DataError(f"{path}: expected {_EXPECTED}, got a {folder.suffix or 'nameless'} file.")
        return _table(_read_parquet([folder]), f"{folder.resolve().parent.name}/{folder.stem}", labelled)
    if folder.is_dir():
        return _open_folder(folder.resolve(), split, labelled)
    if _HUB_ID.fullmatch(str(path)) and not str(path).endswith(".parquet"):
        return _table(_read_hub(str(path), split), str(path), labelled)
    raise DataError(f"{path}: no such file or folder. Expected {_EXPECTED}.")


def _open_folder(folder: Path, split: str | None, labelled: bool) -> _Source:
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _table(_read_saved(folder, split), folder.name, labelled)
    tables = sorted(folder.rglob("*.parquet"))
    if tables:
        splits: dict[str, list[Path]] = {}
        for table in tables:  # a Hub data set on disk: test-00000-of-00002.parquet
            splits.setdefault(re.split(r"[-.]", table.name)[0], []).append(table)
        chosen = _choose_split(list(splits), split, folder)
        return _table(_read_parquet(splits[chosen]), f"{folder.name}/{chosen}", labelled)
    if not labelled:
        paths = images_below(folder, "no images below this folder.")
        return _Source(folder.name, len(paths), _fetch_paths(paths))
    return _class_folders(folder, split)


def _class_folders(folder: Path, split: str | None) -> _Source:
    name, classes = folder.name, _subfolders(folder)
    if classes and (split or {entry.name for entry in classes} <= set(SPLITS)):
        chosen = _choose_split([entry.name for entry in classes], split, folder)
        name, classes = f"{name}/{chosen}", _subfolders(folder / chosen)
    if not classes:
        raise DataError(f"{folder}: expected one folder of images for each class, found no folder.")
    paths, labels = [], []
    for label, entry in enumerate(classes):
        found = images_below(entry, "this class folder holds no images. Remove it or fill it.")
        paths += found
        labels += [label] * len(found)
    return _Source(name, len(paths), _fetch_paths(paths), torch.tensor(labels), [entry.name for entry in classes])


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def images_below(folder: Path, complaint: str) -> list[Path]:
    known = Image.registered_extensions()
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known and not p.name.startswith("."))
    if not found:
        raise DataError(f"{folder}: {complaint}")
    return found


def _fetch_paths(paths: list[Path]) -> Callable[[list[int]], Iterator[tuple[str, str]]]:
    return lambda indices: ((str(paths[index]), str(paths[index])) for index in indices)


def _read_parquet(files: list[Path]) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except Exception as error:  # pyarrow and datasets share no base error
        raise DataError(f"{files[0]}: not a readable parquet file ({_first_line(error)}).") from error


def _read_saved(folder: Path, split: str | None) -> Any:
    from datasets import load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # pyarrow and datasets share no base error
        raise DataError(f"{folder}: not a readable saved data set ({_first_line(error)}).") from error
    return _one_split(loaded, split, folder)


def _read_hub(name: str, split: str | None) -> Any:
    from datasets import load_dataset

    try:
        loaded = load_dataset(name)
    except Exception as error:  # network, hub and datasets errors share no base
        raise DataError(
            f"{name}: no such file or folder, and no data set of that name could be loaded from the Hub "
            f"({_first_line(error)}). Expected {_EXPECTED}."
        ) from error
    return _one_split(loaded, split, name)


def _one_split(loaded: Any, split: str | None, where: str | Path) -> Any:
    return loaded[_choose_split(list(loaded), split, where)] if isinstance(loaded, dict) else loaded


def _choose_split(found: list[str], split: str | None, where: str | Path) -> str:
    """The split asked for, else the first of `SPLITS` there is, else the first."""
    wanted = (split,) if split else (*SPLITS, *found)
    chosen = next((name for name in wanted if name in found), None)
    if chosen is None:
        raise DataError(f"{where}: no split {split!r}, it has {', '.join(sorted(found))}.")
    return chosen


def _table(dataset: Any, name: str, labelled: bool) -> _Source:
    """The source behind a `datasets.Dataset`: its image column left encoded, its label column as integers."""
    from datasets import Image as ImageFeature

    if not len(dataset):
        raise DataError(f"{name}: the data set has no rows.")
    typed = [column for column, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
    image = _column(dataset, typed, IMAGE_COLUMNS, name, "an image column")
    try:
        encoded = dataset.select_columns([image]).cast_column(image, ImageFeature(decode=False))
    except Exception as error:  # pyarrow and datasets share no base error
        raise DataError(f"{name}: column {image!r} holds no images ({_first_line(error)}).") from error

    def fetch(indices: list[int]) -> Iterator[tuple[str, bytes | str | None]]:
        batches = encoded.select(indices).iter(batch_size=512)
        cells = (cell or {} for batch in batches for cell in batch[image])
        for index, cell in zip(indices, cells, strict=True):
            yield f"{name}, row {index}", cell.get("bytes") or cell.get("path")

    labels, label_names = _labels(dataset, name) if labelled else (None, None)
    return _Source(name, len(dataset), fetch, labels, label_names)


def _labels(dataset: Any, name: str) -> tuple[torch.Tensor, list[str]]:
    """(N,) labels and their names, from a ClassLabel, an integer or a string column."""
    from datasets import ClassLabel

    typed = [column for column, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    column = _column(dataset, typed, LABEL_COLUMNS, name, "a label column")
    values, feature = dataset[column][:], dataset.features[column]
    missing = sum(value is None or (column in typed and value < 0) for value in values)
    if missing:
        raise DataError(f"{name}: {missing} of {len(values)} images have no label in column {column!r}.")
    if column in typed:
        return torch.tensor(values), list(feature.names)
    if not isinstance(values[0], (int, str)):
        raise DataError(f"{name}: column {column!r} must hold one integer or string a row, got {feature}.")
    names = sorted(set(values))
    position = {value: index for index, value in enumerate(names)}
    return torch.tensor([position[value] for value in values]), [str(value) for value in names]


def _column(dataset: Any, typed: list[str], names: tuple[str, ...], where: str, what: str) -> str:
    """The column of the right type, a usual name first; else a column with a usual name."""
    candidates = typed or dataset.column_names
    usual = [name for name in names if name in candidates]
    if usual or typed:
        return (usual or typed)[0]
    columns = ", ".join(dataset.column_names)
    raise DataError(f"{where}: expected {what} (by type, or named {' or '.join(names)}), found columns {columns}.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
