"""Safetensors files: their headers, checked, and plain reads of the bytes of a tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch

from mopeq.errors import ModelError

__all__ = ["DTYPE_BITS", "TYPES", "Header", "read_header", "read_span", "unreadable"]

LARGEST_HEADER = 100_000_000
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "C64": 64, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64,
}  # fmt: skip
"""Bits of an element of each safetensors dtype."""
TYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip

Header = dict[str, tuple[str, tuple[int, ...], int, int]]
"""``{key: (dtype, shape, first byte in the file, byte after the last)}``"""


def read_header(file: Path) -> Header:
    """The header of a safetensors file, whose size must agree with it."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise ModelError(
                    f"{file} is truncated or not a safetensors file: its first eight bytes announce a header of "
                    f"{length} bytes, it has {size} in all; download it again"
                )
            raw = stream.read(length)
        header = json.loads(raw, object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(unreadable(file, error)) from error
    if not isinstance(header, dict):
        raise ModelError(unreadable(file, "its header is not a JSON object"))
    header.pop("__metadata__", None)
    entries = {key: _entry(file, key, entry) for key, entry in header.items()}
    end = _covered(file, ((key, begin, stop) for key, (_, _, begin, stop) in entries.items()))
    if end != size - 8 - length:
        kind = "is truncated" if end > size - 8 - length else "has bytes after its last tensor"
        raise ModelError(
            f"{file} {kind}: {size} bytes where its header describes {8 + length + end}; download it again"
        )
    at = 8 + length
    return {key: (dtype, shape, at + begin, at + stop) for key, (dtype, shape, begin, stop) in entries.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"it names {next(key for key in names if names.count(key) > 1)!r} twice")
    return made


def _entry(file: Path, key: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, byte after the last) of one tensor of a header."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            if not key.isprintable():  # names go into messages, which are one line
                raise ModelError(unreadable(file, f"the tensor name {key!r} has control characters"))
            if dtype not in DTYPE_BITS:
                raise ModelError(unreadable(file, f"{key!r} has dtype {dtype!r}, unknown to this mopeq"))
            numbers = (*shape, begin, end)
            if all(type(n) is int and 0 <= n < 2**62 for n in numbers):
                bits = prod(shape) * DTYPE_BITS[dtype]
                if bits % 8 or end - begin != bits // 8:
                    raise ModelError(
                        unreadable(file, f"{key!r}, {dtype} {list(shape)}, is given bytes {begin} to {end}")
                    )
                return dtype, tuple(shape), begin, end
    raise ModelError(unreadable(file, f"its entry for {key!r} is not a dtype, a shape and two offsets"))


def _covered(file: Path, spans: Iterable[tuple[str, int, int]]) -> int:
    """Bytes that the tensors cover from 0 on, or an error where two overlap or leave a hole."""
    end = 0
    for key, begin, stop in sorted(spans, key=lambda span: span[1:]):
        if begin != end:
            raise ModelError(unreadable(file, f"{key!r} begins at byte {begin} where the tensor before ends at {end}"))
        end = stop
    return end


def unreadable(file: Path, reason: object) -> str:
    """What an error says of a file that cannot be read."""
    return f"{file} is not a readable safetensors file: {reason}; expected one that is complete; download it again"


def read_span(file: Path, key: str, begin: int, into: memoryview) -> None:
    """Fill ``into`` with the bytes of a file from ``begin`` on, which are those of the tensor ``key``.

    Raises :class:`ModelError` where the file is not there, or shorter than it was.
    """
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(begin)
            while into:
                got = stream.readinto(into)
                if not got:
                    raise ModelError(f"{file} ends before {key!r} does; it was whole when opened; download it again")
                into = into[got:]
    except OSError as error:
        raise ModelError(unreadable(file, error)) from error
