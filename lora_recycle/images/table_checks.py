"""Tables of images that anyone may have written: looked at before `datasets` copies all of them to its cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..runtime.untrusted_files import open_regular


MAX_ROWS = 2**22
#: Bytes that a parquet file may become: so many, or so many times its own.
_MAX_BYTES, _MAX_GROWTH = 2**30, 20
#: Bytes of a CSV file, which is read as a whole.
MAX_CSV_BYTES = 2**28
_ROWS_AT_A_TIME = 4096
#: Bytes of a file up to which its values are counted, which takes twice as long as to read it.
_SMALL = 2**27


def check_parquet(path: Path) -> None:
    """Raise `DataError` where a file has too many rows, or is small only because its values repeat or compress.

    Values that repeat lie in a parquet file once, in a dictionary: a kilobyte can stand for gigabytes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_regular(path) as file:
            metadata = pq.ParquetFile(file).metadata
            most = max(_MAX_BYTES, _MAX_GROWTH * path.stat().st_size)
            _check(path, metadata.num_rows <= MAX_ROWS, f"{metadata.num_rows} rows, more than {MAX_ROWS}")
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            size = sum(group.total_byte_size for group in groups)
            _check(path, size <= most, f"{size} bytes without compression, more than {most}")
            if path.stat().st_size <= _SMALL and metadata.num_rows * size > most:
                _check(path, _text_bytes(file, most) <= most, f"more than {most} bytes of repeated values")
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a readable parquet file ({reason}).") from error


def _text_bytes(file: Any, most: int) -> int:
    """Bytes of all texts and encoded images, read until there are more than `most`."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    file.seek(0)
    schema, total = pq.ParquetFile(file).schema, 0
    # of the columns' own metadata nothing is asked: on damaged ones this library ends the process
    columns = [schema.column(i) for i in range(len(schema))]
    for name in [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]:
        file.seek(0)
        reader = pq.ParquetFile(file, read_dictionary=[name])  # repeated values stay as small as they are in the file
        # each row group has its own dictionary, and Arrow joins no structs of two
        groups = (reader.iter_batches(_ROWS_AT_A_TIME, [i], [name]) for i in range(reader.num_row_groups))
        for batch in itertools.chain.from_iterable(groups):
            values = batch.column(0)
            for part in name.split(".")[1:]:
                values = pc.struct_field(values, part) if hasattr(values.type, "get_field_index") else values
            if hasattr(values, "dictionary"):
                values = pc.binary_length(values.dictionary).take(values.indices)
                total += pc.sum(values).as_py() or 0
            else:
                total += values.nbytes
            if total > most:
                return total
    return total


def _check(path: Path, condition: bool, found: str) -> None:
    if not condition:
        raise DataError(f"{path}: it has {found}. Split it, or take fewer images.")


def check_inside(path: str, roots: Sequence[Path], where: str) -> str:
    """The path of an image that a table names, which must lie in one of `roots`.

    Raises:
        DataError: it lies elsewhere, and so would pass a file of this machine for one of the data set.
    """
    target = Path(path).resolve()
    if not any(target.is_relative_to(root.resolve()) for root in roots):
        raise DataError(
            f"{where}: names the file {path}, which is not of the data set. Store images as bytes, or beside it."
        )
    return path
