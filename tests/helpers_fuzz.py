"""Damage to files, drawn from a seeded generator."""

import json
import random


#: Values that code trips over.
NASTY = (None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.0, -0.5, 1e308, "", "x", "LORA", "../..", "/etc/passwd")
NASTY += (
    "\u0000",
    "a" * 5000,
    "(a+)+$",
    ".*",
    "all-linear",
    "pissa",
    [],
    {},
    [[]],
    [None],
    ["q_proj"],
    {"a": {}},
    [0, -1],
)
KEYS = (
    "r",
    "peft_type",
    "auto_map",
    "auto_mapping",
    "bias",
    "target_modules",
    "rank_pattern",
    "lora_alpha",
    "use_dora",
)
KEYS += ("layers_to_transform", "init_lora_weights", "target_parameters", "runtime_config", "revision", "\ud83d\ude00")


def spoil_bytes(data: bytes, rng: random.Random, reach: int | None = None) -> bytes:
    """Flip, cut, insert, double or cut off, within the first `reach` bytes."""
    data, reach = bytearray(data), min(len(data), reach or len(data))
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(reach + 1)
        how = rng.randrange(5)
        if how == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif how == 1:
            del data[at : at + rng.choice((1, 4, 100))]
        elif how == 2:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 8))))
        elif how == 3:
            data[at:at] = data[at : at + rng.randrange(1, 60)]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def spoil_json(value, rng: random.Random, keys):
    """Change one place of a JSON value: another value, a key more, less or renamed."""
    if isinstance(value, dict) and (value and rng.random() < 0.85):
        result = dict(value)
        key = rng.choice(sorted(result))
        how = rng.random()
        if how < 0.15:
            del result[key]
        elif how < 0.3:
            result[rng.choice(keys)] = rng.choice(NASTY)
        elif how < 0.4:
            result[key[: rng.randrange(len(key) + 1)] + rng.choice(("", ".", "x", ".weight"))] = result.pop(key)
        else:
            result[key] = spoil_json(result[key], rng, keys)
        return result
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], spoil_json(value[at], rng, keys), *value[at + rng.randrange(2) :]]
    if isinstance(value, (int, float)) and rng.random() < 0.5:
        return value + rng.choice((1, -1, 7, 0.5, 2**20))
    return rng.choice(NASTY)


def spoil_header(data: bytes, rng: random.Random) -> bytes:
    """One place of the header's JSON, with the length that fits (or nearly) before it."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(spoil_json(json.loads(data[8 : 8 + length]), rng, KEYS)).encode()
    if rng.random() < 0.1:  # a key twice
        header = header[:-1] + b"," + header[1:]
    length_field = len(header) + (rng.choice((0, 0, 0, 1, -1, 2**40)) if rng.random() < 0.3 else 0)
    return length_field.to_bytes(8, "little") + header + data[8 + length :]


def spoil_numbers(data: bytes, rng: random.Random) -> bytes:
    """Numbers of the tensors: NaN, infinity, huge, or noise over a stretch."""
    length = 8 + int.from_bytes(data[:8], "little")
    data, at = bytearray(data), rng.randrange(length, len(data) - 3) // 4 * 4
    stretch = rng.choice((1, 1, 64))
    for place in range(at, min(at + 4 * stretch, len(data) - 3), 4):
        data[place : place + 4] = rng.choice(
            (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f", b"\x01\x02\x03\x04")
        )
    return bytes(data)


def spoil_config(data: bytes, rng: random.Random) -> bytes:
    text = json.dumps(spoil_json(json.loads(data), rng, KEYS))
    if rng.random() < 0.1:
        text = text.replace("null", rng.choice(("NaN", "1e999", "nul", "{}")), 1)
    return text.encode()


def respoil(data: bytes, spoil) -> bytes:
    """`spoil(data)`, or `data` where an earlier change left nothing to parse."""
    try:
        return spoil(data)
    except (ValueError, IndexError):
        return data
