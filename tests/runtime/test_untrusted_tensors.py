"""Headers of safetensors files: one parser agrees with the library's, and refuses what is out of bounds."""

import json
import struct

import pytest

from lora_recycle.runtime.untrusted_tensors import checked_shape, parse_safetensors_header


def file_of(header):
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"short", "truncated"),
        (struct.pack("<Q", 100) + b"{}", "truncated, a header of 100 bytes in a file of 10"),
        (file_of([]), "must be a JSON object, got a list"),
        (file_of({"a": 1}), "a has no shape"),
        (file_of({"a": ENTRY | {"shape": [True]}}), "a has no shape of whole numbers"),
        (file_of({"a": ENTRY | {"data_offsets": [0]}}), "a has no dtype and data_offsets"),
        (file_of({"a": ENTRY | {"dtype": 3}}), "a has no dtype and data_offsets"),
        (file_of(b'{"a": 1, "a": 1}'), "appears twice"),
    ],
)
def test_damaged_headers(data, reason):
    with pytest.raises(ValueError, match=reason):
        parse_safetensors_header(data)


def test_sizes_are_bounded_one_by_one_and_together():
    with pytest.raises(ValueError, match="holds no tensors"):
        parse_safetensors_header(file_of({})).bounded_shapes()
    two = parse_safetensors_header(file_of({"a": ENTRY | {"shape": [300]}, "b": ENTRY | {"shape": [300]}}))
    assert two.bounded_shapes(most=2400) == {"a": (300,), "b": (300,)}
    with pytest.raises(ValueError, match="would take 2400 bytes as float32, more than 2399"):
        two.bounded_shapes(most=2399)
    with pytest.raises(ValueError, match="more than 2 GiB"):
        checked_shape("a", [2**30])


def test_only_the_factors_of_adalora_may_be_empty():
    assert checked_shape("layer.lora_A", [0, 4]) == (0, 4)
    for shape in ([0, 4], [-1], [1] * 9):
        with pytest.raises(ValueError, match="impossible shape"):
            checked_shape("layer.weight", shape)
