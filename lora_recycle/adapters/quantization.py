"""Adapters in 8, 4, 2 or 1 bit for each weight: every matrix as codes of a few centroids that k-means finds in it.

The file holds `codes`, uint8 (bytes,), the packed codes of all matrices one after the other, each from a whole byte
on; `centroids`, bfloat16 (matrices, 2^bits); and the tensors that are no matrices, such as the magnitudes of a DoRA,
as they are. Its metadata has one entry, `header`: JSON with `bits` and `shapes`, the matrices' names and shapes in the
order of their codes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from ..errors import AdapterError, ConfigError
from ..hub.repo_files import CODES_FILE, WEIGHTS_FILE
from ..runtime.untrusted import parse_json
from ..runtime.untrusted_tensors import (
    check_names,
    check_total,
    checked_shape,
    count,
    parse_safetensors_header,
    read_safetensors_header,
)
from .centroids import Coded, coded, coded_product


#: Bits for a weight: what has a plain PEFT file, and what this module codes.
PLAIN_BITS = {32: torch.float32, 16: torch.bfloat16}
CODE_BITS = (8, 4, 2, 1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes below 2^bits, (N,), to bytes (ceil(N bits / 8),), the first code in the lowest bits."""
    per = 8 // bits
    padded = torch.nn.functional.pad(codes.flatten(), (0, -codes.numel() % per)).view(-1, per)
    return (padded << (torch.arange(per) * bits)).sum(1).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """The `length` codes in the bytes that `pack` made: uint8."""
    shifts = (torch.arange(8 // bits) * bits).to(torch.uint8)
    return ((packed[:, None] >> shifts) & (2**bits - 1)).flatten()[:length]


def is_coded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a matrix of numbers. Vectors (norms, magnitudes, scales near 1) are few and stay exact."""
    return tensor.is_floating_point() and sum(size > 1 for size in tensor.shape) >= 2


def weights_bytes(tensors: dict[str, torch.Tensor], bits: int, config: dict[str, Any]) -> tuple[str, bytes]:
    """An adapter's tensors as the bytes of a safetensors file: a plain one (32, 16) or of codes (8, 4, 2, 1).

    Args:
        config: the adapter's, parsed. The two factors of a LoRA are coded together, for their product.

    Returns:
        The name of the file and its content.

    Raises:
        AdapterError: a number is not finite, or so large that it would not be.
    """
    _check_finite(tensors)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in sorted(tensors.items())}
    if bits in PLAIN_BITS:
        plain = {k: t.to(PLAIN_BITS[bits]) if is_coded(t) else t for k, t in tensors.items()}
        return WEIGHTS_FILE, save(plain, metadata={"format": "pt"})
    stored = {key: tensor for key, tensor in tensors.items() if not is_coded(tensor)}
    parts = _coded_matrices({key: tensor for key, tensor in tensors.items() if is_coded(tensor)}, bits, config)
    if parts:
        stored["codes"] = torch.cat([pack(codes, bits) for codes, _ in parts.values()])
        stored["centroids"] = torch.stack([centroids for _, centroids in parts.values()]).bfloat16()
    _check_finite(stored)
    header = {"bits": bits, "shapes": {key: list(tensors[key].shape) for key in parts}}
    return CODES_FILE, save(stored, metadata={"header": json.dumps(header, separators=(",", ":"))})


def _check_finite(tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise AdapterError(f"{key[:200]} holds NaN, infinity, or numbers too large to be stored.")


def _coded_matrices(matrices: dict[str, torch.Tensor], bits: int, config: dict[str, Any]) -> dict[str, Coded]:
    products, parts = config.get("peft_type") == "LORA" and not config.get("use_bdlora"), {}
    for key, a in matrices.items():
        other = key.replace(".lora_A.weight", ".lora_B.weight")
        b = matrices.get(other) if products and other != key else None
        if b is not None and a.ndim == b.ndim == 2 and b.shape[1] == len(a) and a.any() and b.any():
            parts[other], parts[key] = coded_product(b, a, bits)
    return {key: parts[key] if key in parts else coded(matrix, bits) for key, matrix in matrices.items()}


def check_bits(bits: int) -> None:
    """Raise `ConfigError` where weights cannot be stored in so many bits."""
    known = (*PLAIN_BITS, *CODE_BITS)
    if bits not in known:
        raise ConfigError(f"bits must be one of {', '.join(map(str, known))}, got {bits}.")


def store_weights(folder: Path, bits: int | None) -> None:
    """Store a folder's plain weights in so many bits, None as they are. It is one that is being written.

    Raises:
        ConfigError: another number of bits.
    """
    if bits is None:
        return
    check_bits(bits)
    plain = folder / WEIGHTS_FILE
    config = parse_json((folder / "adapter_config.json").read_bytes())
    name, data = weights_bytes(load(plain.read_bytes()), bits, config)
    plain.unlink()
    (folder / name).write_bytes(data)


def read_coded_header(path: Path) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Bits for a weight, and the shape of each tensor that the file stands for, from its header alone.

    Raises:
        ValueError: the header is no such header, or codes and centroids are not as many as its shapes say.
    """
    header = read_safetensors_header(path)
    stored, (bits, shapes) = header.bounded_shapes(), _parse(header.metadata)
    packed = sum(_bytes_of(shape, bits) for shape in shapes.values())
    expected = {"codes": (packed,), "centroids": (len(shapes), 2**bits)} if shapes else {}
    for name, shape in expected.items():
        if stored.pop(name, None) != shape:
            raise ValueError(f"{name} must have the shape {shape} that its matrices need")
    if double := shapes.keys() & stored:
        raise ValueError(f"{min(double)[:200]} is there twice, coded and as it is")
    every = {**stored, **shapes}
    check_total(every.values())
    return bits, every


def decode(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors in the bytes of a file whose header [`read_coded_header`] has checked.

    Raises:
        ValueError: codes that are no bytes, or centroids that are no numbers.
    """
    tensors = load(data)
    bits, shapes = _parse(parse_safetensors_header(data).metadata)
    codes, centroids = (tensors.pop(name, torch.empty(0)) for name in ("codes", "centroids"))
    if shapes and (codes.dtype != torch.uint8 or not centroids.is_floating_point()):
        raise ValueError(f"codes must be bytes and centroids numbers, got {codes.dtype} and {centroids.dtype}")
    start = 0
    for row, (key, shape) in enumerate(shapes.items()):
        stop = start + _bytes_of(shape, bits)
        tensors[key] = centroids[row].float()[unpack(codes[start:stop], bits, count(shape)).int()].view(shape)
        start = stop
    return tensors


def _bytes_of(shape: tuple[int, ...], bits: int) -> int:
    return math.ceil(count(shape) * bits / 8)


def _parse(metadata: Any) -> tuple[int, dict[str, tuple[int, ...]]]:
    header = metadata.get("header") if isinstance(metadata, dict) else None
    header = parse_json(header) if isinstance(header, str) else None
    if not isinstance(header, dict) or not isinstance(header.get("shapes"), dict):
        raise ValueError("its metadata has no header with the bits and shapes of coded matrices")
    bits = header.get("bits")
    if type(bits) is not int or bits not in CODE_BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, CODE_BITS))}, got {str(bits)[:80]}")
    check_names(header["shapes"])
    return bits, {key: checked_shape(key, shape) for key, shape in header["shapes"].items()}
