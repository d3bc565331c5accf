"""Arrays on disk of which only the rows asked for are read, so that memory holds a batch and never the array."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ..errors import DataError
from .files import replacing
from .untrusted_tensors import SafetensorsHeader


_NUMPY_TYPES = {"U8": np.uint8, "I16": np.int16, "I64": np.int64, "F16": np.float16, "F32": np.float32}


class Rows(Protocol):
    """Rows of which some are read at a time."""

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """int64 (B,) row numbers to (B, ...), in this order."""


@dataclasses.dataclass(frozen=True)
class RowFile:
    """One array of a file: `shape[0]` rows, one after the other from byte `offset` on.

    Rows are read, not mapped into memory: pages of a map stay in the process for as long as the map does.
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def _row_size(self) -> int:
        return math.prod(self.shape[1:])

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """int64 (B,) row numbers to (B, ...), in this order."""
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        places = values.reshape(len(rows), self._row_size)
        with self.path.open("rb", buffering=0) as file:
            for place, row in zip(places, rows.tolist(), strict=True):
                file.seek(self.offset + row * place.nbytes)
                self._fill(file, place)
        return torch.from_numpy(values)

    def read_range(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop`, the last one not included."""
        values = np.empty((min(stop, len(self)) - start, *self.shape[1:]), self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * self._row_size * self.dtype.itemsize)
            self._fill(file, values)
        return torch.from_numpy(values)

    def _fill(self, file: io.FileIO, place: np.ndarray) -> None:
        rest = place.reshape(-1).view(np.uint8).data
        while len(rest):
            count = file.readinto(rest)  # a single call reads 2 GiB at most
            if not count:
                raise DataError(f"{self.path}: ends before its last row. Was it changed during the run?")
            rest = rest[count:]


def safetensors_rows(path: Path, header: SafetensorsHeader) -> dict[str, RowFile]:
    """Tensors of a safetensors file, which the caller has opened with `safetensors` and so checked, by name."""
    return {
        name: RowFile(path, np.dtype(_NUMPY_TYPES.get(entry.dtype, np.void)), entry.shape, header.size + entry.begin)
        for name, entry in header.tensors.items()
    }


def write_rows(path: Path, dtype: np.dtype | type, shape: tuple[int, ...], blocks: Iterable[torch.Tensor]) -> RowFile:
    """Write blocks of rows, in order, as one `.npy` file that is whole or absent, and open it."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with replacing(path) as partial:
        with partial.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for block in blocks:
                file.write(np.ascontiguousarray(block.numpy()).data)
    return open_rows(path)


def open_rows(path: Path) -> RowFile:
    """Open a `.npy` file. Raises `DataError` where it is damaged."""
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            rows = RowFile(path, dtype, shape, file.tell())
        size = math.prod(shape) * dtype.itemsize
        if path.stat().st_size != rows.offset + size:
            raise ValueError(f"{path.stat().st_size} bytes, expected {rows.offset + size}")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}). Delete it; it is made again.") from error
    return rows
