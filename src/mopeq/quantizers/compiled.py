"""Grids and codes by the compiled library, where it is: bit for bit those of grid.py, which defines correct."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from mopeq.native import TYPES, VALUE, check, library, why_not
from mopeq.precision import Precision

__all__ = ["codes_on", "grids", "takes"]


class _Job(ctypes.Structure):
    """``mopeq_grids_job`` of csrc/mopeq_cpu.h."""

    _fields_ = (
        ("weight", c_void_p), ("type", c_int64), ("experts", c_int64), ("rows", c_int64), ("inputs", c_int64),
        ("groups", c_int64), ("bits", c_int64), ("symmetric", c_int64), ("importance", c_void_p),
        ("factors", c_void_p), ("factor_count", c_int64), ("refits", c_int64), ("scale", c_void_p), ("zero", c_void_p),
        ("given", c_int64), ("codes", c_void_p), ("threads", c_int64),
    )  # fmt: skip


def takes(weight: Tensor, importance: Tensor | None = None) -> bool:
    """Whether the library computes this: weights on the CPU, some of them, and no error that counts negative."""
    if weight.device.type != "cpu" or not weight.numel() or why_not():
        return False
    fits = importance is None or importance.shape == (weight.shape[0], weight.shape[2])
    return fits and (importance is None or bool((importance >= 0).all()))


def grids(
    weight: Tensor,
    precision: Precision,
    importance: Tensor | None = None,
    factors: Sequence[float] = (),
    refits: int = 0,
    *,
    codes: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Scale and zero point (experts, out, groups), and the nearest codes (experts, out, in) if they are wanted.

    weight: float32, bfloat16 or float16 (experts, out, in). importance: float32 (experts, in). None where weights are
    not finite or too large.
    """
    experts, out, inp = weight.shape
    scale = torch.empty(experts, out, precision.group_count(inp))
    zero = torch.empty_like(scale)
    made = torch.empty(weight.shape, dtype=torch.uint8) if codes else None
    return (scale, zero, made) if _run(weight, precision, scale, zero, made, importance, factors, refits) else None


def codes_on(weight: Tensor, precision: Precision, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest codes uint8 (experts, out, in) on given grids."""
    made = torch.empty(weight.shape, dtype=torch.uint8)
    _run(weight, precision, scale.contiguous(), zero.contiguous(), made, given=True)
    return made


def _run(
    weight: Tensor,
    precision: Precision,
    scale: Tensor,
    zero: Tensor,
    codes: Tensor | None,
    importance: Tensor | None = None,
    factors: Sequence[float] = (),
    refits: int = 0,
    given: bool = False,
) -> bool:
    """One call; False where the weights are refused."""
    weight = weight.detach().contiguous()
    heavy = None if importance is None else importance.float().contiguous()
    tried = torch.tensor(factors, dtype=torch.float32)
    job = _Job(
        weight.data_ptr(), TYPES[weight.dtype], *weight.shape, scale.shape[-1], precision.bits, precision.symmetric,
        None if heavy is None else heavy.data_ptr(), tried.data_ptr(), len(tried), refits,
        scale.data_ptr(), zero.data_ptr(), given, None if codes is None else codes.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    fault = library().mopeq_grids(ctypes.byref(job))
    if fault != VALUE:
        check(fault)
    return bool(fault != VALUE)
