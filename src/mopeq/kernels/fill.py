"""Tensors from their files straight into memory, packed matrices as panels on the way, by the compiled library.

One pass over the bytes: reading whole tensors and then turning them into panels (:func:`mopeq.kernels.convert`, the
slow twin) goes over memory three times.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import ExitStack
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from mopeq.native import check, library

__all__ = ["CODES", "PLAIN", "POINTS", "SCALES", "Stored", "fill"]

PLAIN, CODES, SCALES, POINTS = range(4)
"""What is stored: bytes to be taken as they are, or the codes, scales or zero points of a matrix."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, bytes ``begin`` to ``end``, and the address that it goes to.

    Of a packed matrix: its rows; inputs of codes, or groups of scales and zero points; bits of a code.
    """

    file: Path
    begin: int
    end: int
    to: int
    part: int = PLAIN
    rows: int = 0
    columns: int = 0
    bits: int = 0


class _Stored(ctypes.Structure):
    """``mopeq_stored`` of csrc/mopeq_cpu.h."""

    _fields_ = (
        ("file", c_int64), ("begin", c_int64), ("bytes", c_int64), ("to", c_void_p), ("part", c_int64),
        ("rows", c_int64), ("columns", c_int64), ("bits", c_int64),
    )  # fmt: skip


def fill(stored: Sequence[Stored], threads: int) -> None:
    """Read all of them with at most so many threads, without Python's lock; the memory must stay where it is.

    Raises :class:`OSError` where a file cannot be opened, :class:`mopeq.errors.InputError` where one ends early.
    """
    with ExitStack() as stack:
        files: dict[Path, int] = {}
        for path in {one.file for one in stored}:
            files[path] = os.open(path, os.O_RDONLY)
            stack.callback(os.close, files[path])
        ordered = sorted(stored, key=lambda s: (s.file, s.begin))
        jobs = (_Stored * len(ordered))()
        for job, s in zip(jobs, ordered, strict=True):
            job.file, job.begin, job.bytes, job.to = files[s.file], s.begin, s.end - s.begin, s.to
            job.part, job.rows, job.columns, job.bits = s.part, s.rows, s.columns, s.bits
        check(library().mopeq_fill(jobs, len(jobs), threads))
