"""Tables of images that anyone may have written: looked at before `datasets` copies all of them to its cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..runtime.untrusted import open_regular


MAX_ROWS = 2**22
#: Bytes that a parquet file may become: so many, or so many times its own.
_MAX_BYTES, _MAX_GROWTH = 2**30, 20
_ROWS_AT_A_TIME = 4096


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
            _check(path, _repeated_bytes(file, groups, most) <= most, f"more than {most} bytes of repeated values")
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a readable parquet file ({reason}).") from error


def _repeated_bytes(file: Any, groups: Sequence[Any], most: int) -> int:
    """Bytes that values of dictionaries become, read until there are more than `most`."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    text = {c.path_in_schema for c in columns if c.physical_type == "BYTE_ARRAY" and c.has_dictionary_page}
    large = {c.path_in_schema for c in columns if c.num_values * c.total_uncompressed_size > most} & text
    total = 0
    for column in sorted(large):
        file.seek(0)
        reader = pq.ParquetFile(file, read_dictionary=[column])
        for batch in reader.iter_batches(_ROWS_AT_A_TIME, columns=[column]):
            values = batch.column(0)
            for part in column.split(".")[1:]:
                values = pc.struct_field(values, part) if hasattr(values.type, "get_field_index") else values
            if hasattr(values, "dictionary"):
                lengths = pc.binary_length(values.dictionary).take(values.indices)
                total += pc.sum(lengths).as_py() or 0
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
