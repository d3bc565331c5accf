"""Rows of arrays on disk: the ones asked for, in the order asked for."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_recycle.errors import DataError
from lora_recycle.runtime.array_files import open_rows, safetensors_rows, write_rows
from lora_recycle.runtime.untrusted_tensors import read_safetensors_header


def test_rows_are_those_of_the_array_in_the_order_asked(tmp_path):
    array = torch.arange(60, dtype=torch.float16).view(10, 3, 2)
    rows = write_rows(tmp_path / "a" / "b.npy", np.float16, (10, 3, 2), array.split(4))
    assert len(rows) == 10 and rows == open_rows(rows.path)
    index = torch.tensor([7, 0, 7, 9])
    assert torch.equal(rows.read(index), array[index]) and rows.read(index[:0]).shape == (0, 3, 2)
    assert torch.equal(rows.read_range(2, 5), array[2:5]) and torch.equal(rows.read_range(8, 99), array[8:])
    assert np.array_equal(np.load(rows.path), array.numpy())  # an ordinary .npy
    assert [path.name for path in rows.path.parent.iterdir()] == ["b.npy"]


def test_tensors_of_a_safetensors_file(tmp_path):
    tensors = {"x": torch.randn(4, 5), "y": torch.arange(4), "z": torch.randint(0, 9, (4, 2), dtype=torch.uint8)}
    save_file(tensors, tmp_path / "t.safetensors")
    path = tmp_path / "t.safetensors"
    rows = safetensors_rows(path, read_safetensors_header(path))
    assert rows.keys() == tensors.keys()
    for name, file in rows.items():
        assert torch.equal(file.read(torch.tensor([3, 1])), tensors[name][[3, 1]])
    bfloat = {"x": torch.zeros(2).bfloat16()}
    save_file(bfloat, tmp_path / "t.safetensors")
    assert safetensors_rows(path, read_safetensors_header(path))["x"].dtype == np.void  # numpy has none


def test_a_file_cut_short_is_an_error(tmp_path):
    rows = write_rows(tmp_path / "a.npy", np.int64, (6,), [torch.arange(6)])
    rows.path.write_bytes(rows.path.read_bytes()[:-8])
    assert rows.read(torch.tensor([4])).item() == 4
    for read in (lambda: rows.read(torch.tensor([5])), lambda: rows.read_range(0, 6)):
        with pytest.raises(DataError, match="ends before its last row"):
            read()
    with pytest.raises(DataError, match="a.npy: damaged"):
        open_rows(rows.path)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def blocks():
        yield torch.zeros(2)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_rows(tmp_path / "a.npy", np.float32, (4,), blocks())
    assert not list(tmp_path.iterdir())
