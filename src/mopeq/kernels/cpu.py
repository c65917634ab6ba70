"""The compiled kernel for CPUs: ``libmopeq_cpu`` behind torch operators (docs/kernels.md).

It reads matrices in panels, splits activations into int8 digits, and adds integers up exactly, so its results do not
depend on the instruction set, the number of threads, or what else is in the batch. ``naive`` defines correct.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mopeq.errors import InputError
from mopeq.kernels.layout import Form, PackedGroup
from mopeq.native import ISAS, TYPES, check, isa, library, why_not
from mopeq.seam import Gate

__all__ = [
    "COARSE", "DIGITS", "ISAS", "TYPES", "check", "convert", "digits_of", "experts", "grouped_linear", "isa",
    "library", "why_not",
]  # fmt: skip

DIGITS = {torch.float32: 3, torch.bfloat16: 2, torch.float16: 2}
"""int8 digits of an activation, to the base 128: 22 bits for float32, 15 for the 16-bit types."""
COARSE = 2
"""With two digits, matrices of up to so many bits use the first alone; ``MOPEQ_COARSE`` says otherwise, 0 to 8."""


class Group(ctypes.Structure):
    """``mopeq_group`` of csrc/mopeq_cpu.h."""

    _fields_ = (
        ("codes", c_void_p), ("codes_size", c_int64), ("scales", c_void_p), ("scales_size", c_int64),
        ("zeros", c_void_p), ("zeros_size", c_int64), ("matrices", c_void_p), ("experts", c_int64),
        ("per_expert", c_int64),
    )  # fmt: skip


class _Job(ctypes.Structure):
    """``mopeq_job``."""

    _fields_ = (
        ("x", c_void_p), ("rows", c_int64), ("inputs", c_int64), ("x_type", c_int64), ("group", Group),
        ("offsets", c_void_p), ("out", c_void_p), ("out_features", c_int64), ("digits", c_int64),
        ("coarse", c_int64), ("threads", c_int64),
    )  # fmt: skip


class ExpertsJob(ctypes.Structure):
    """``mopeq_experts_job``."""

    _fields_ = (
        ("x", c_void_p), ("tokens", c_int64), ("hidden", c_int64), ("x_type", c_int64), ("index", c_void_p),
        ("weights", c_void_p), ("k", c_int64), ("gate_up", Group), ("down", Group), ("gate_up_bias", c_void_p),
        ("down_bias", c_void_p), ("bias_type", c_int64), ("interleaved", c_int64), ("alpha", c_float),
        ("limit", c_float), ("shift", c_float), ("out", c_void_p), ("digits", c_int64), ("coarse", c_int64),
        ("threads", c_int64),
    )  # fmt: skip


@cache
def _coarse() -> int:
    asked = os.environ.get("MOPEQ_COARSE") or str(COARSE)
    if asked not in map(str, range(9)):
        raise InputError(f"MOPEQ_COARSE is {asked}; expected a width in bits, 0 to 8")
    return int(asked)


def digits_of(dtype: torch.dtype, digits: int | None = None) -> tuple[int, int]:
    """Digits of an activation of ``dtype``, and the width up to which matrices use the first alone.

    ``digits`` asks for so many, all of them used. The first of two digits is int8 by the largest of 32: its error is
    far below that of a matrix at 2 bits (docs/results.md), and it halves the products.
    """
    if digits is None:
        digits = DIGITS.get(dtype, 0)
        return digits, _coarse() if digits == 2 else 0
    return digits, 0


def _parts(name: str, tensor: Tensor | None, dtype: torch.dtype) -> tuple[int | None, int]:
    """Address and elements of a buffer."""
    if tensor is None:
        return None, 0
    if tensor.dtype is not dtype or not tensor.is_cpu or not tensor.is_contiguous():
        raise InputError(
            f"the CPU kernel got {name} as {tensor.dtype} on {tensor.device}, contiguous: {tensor.is_contiguous()}; "
            f"expected contiguous {dtype} on the CPU"
        )
    return tensor.data_ptr(), tensor.numel()


def _fits(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise InputError(f"the CPU kernel got {name} {list(tensor.shape)}; expected {list(shape)}")


def group_of(qweight: Tensor, scales: Tensor | None, zeros: Tensor | None, table: Tensor) -> Group:
    if table.dim() != 3 or table.shape[2] != 8:
        raise InputError(f"the CPU kernel got a table {list(table.shape)}; expected (experts, matrices, 8)")
    return Group(
        *_parts("qweight", qweight, torch.uint8), *_parts("scales", scales, torch.float16),
        *_parts("zeros", zeros, torch.uint8), _parts("table", table, torch.int64)[0], *table.shape[:2],
    )  # fmt: skip


def _grouped_linear(
    x: Tensor, qweight: Tensor, scales: Tensor | None, zeros: Tensor | None, table: Tensor, offsets: Tensor | None,
    out_features: int, digits: int, coarse: int = 0,
) -> Tensor:  # fmt: skip
    x = x.contiguous()
    if x.dim() != 2 or x.dtype not in TYPES or out_features < 1:
        raise InputError(
            f"the CPU kernel got x {x.dtype} {list(x.shape)} and {out_features} outputs; "
            f"expected float32, bfloat16 or float16 (rows, inputs), and at least one output"
        )
    group = group_of(qweight, scales, zeros, table)
    at, count = _parts("offsets", offsets, torch.int64)
    if offsets is not None and count != group.experts + 1:
        raise InputError(
            f"the CPU kernel got {count} offsets for {group.experts} experts; expected {group.experts + 1}"
        )
    out = torch.empty(x.shape[0], out_features, dtype=x.dtype)
    job = _Job(
        _parts("x", x, x.dtype)[0], *x.shape, TYPES[x.dtype], group, at, out.data_ptr(), out_features, digits, coarse,
        torch.get_num_threads(),
    )  # fmt: skip
    if x.shape[0]:
        check(library().mopeq_grouped_linear(ctypes.byref(job)))
    return out


def _experts(
    x: Tensor, index: Tensor, weights: Tensor,
    gate_up: Tensor, gate_up_scales: Tensor | None, gate_up_zeros: Tensor | None, gate_up_table: Tensor,
    down: Tensor, down_scales: Tensor | None, down_zeros: Tensor | None, down_table: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, interleaved: bool, gate: Sequence[float], digits: int,
    coarse: int = 0,
) -> Tensor:  # fmt: skip
    x, index, weights = x.contiguous(), index.contiguous(), weights.float().contiguous()
    biases = [b for b in (gate_up_bias, down_bias) if b is not None]
    if x.dim() != 2 or x.dtype not in TYPES or any(b.dtype not in TYPES or b.dtype != biases[0].dtype for b in biases):
        raise InputError(
            f"the CPU kernel got x {x.dtype} {list(x.shape)} and biases {[b.dtype for b in biases]}; expected float32, "
            f"bfloat16 or float16 (tokens, hidden), and biases of one of these types"
        )
    groups = (
        group_of(gate_up, gate_up_scales, gate_up_zeros, gate_up_table),
        group_of(down, down_scales, down_zeros, down_table),
    )
    (tokens, hidden), experts, inner = x.shape, len(down_table), int(down_table[0, 0, 4]) if down_table.numel() else 0
    _fits("index", index, (tokens, *index.shape[1:2]))
    _fits("weights", weights, tuple(index.shape))
    _fits("gate_up_bias", gate_up_bias, (experts, 2 * inner))
    _fits("down_bias", down_bias, (experts, hidden))
    out = torch.empty_like(x)
    job = ExpertsJob(
        _parts("x", x, x.dtype)[0], tokens, hidden, TYPES[x.dtype], _parts("index", index, torch.int64)[0],
        _parts("weights", weights, torch.float32)[0], index.shape[1], *groups,
        *(None if b is None else _parts("bias", b, b.dtype)[0] for b in (gate_up_bias, down_bias)),
        TYPES[biases[0].dtype] if biases else 0, interleaved, *gate, out.data_ptr(), digits, coarse,
        torch.get_num_threads(),
    )  # fmt: skip
    if tokens:
        check(library().mopeq_experts(ctypes.byref(job)))
    return out


def _shape_of_linear(
    x: Tensor, qweight: Tensor, scales: Tensor | None, zeros: Tensor | None, table: Tensor, offsets: Tensor | None,
    out_features: int, digits: int, coarse: int = 0,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], out_features)


def _shape_of_experts(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x)


_LIBRARY: Any = torch.library.Library("mopeq", "DEF")  # type: ignore[no-untyped-call]
_PACKED = "Tensor {0}, Tensor? {0}_scales, Tensor? {0}_zeros, Tensor {0}_table"
for _name, _schema, _call, _fake in (
    ("grouped_linear", "Tensor x, Tensor qweight, Tensor? scales, Tensor? zeros, Tensor table, Tensor? offsets, "
     "int out_features, int digits, int coarse=0", _grouped_linear, _shape_of_linear),
    ("experts", f"Tensor x, Tensor index, Tensor weights, {_PACKED.format('gate_up')}, {_PACKED.format('down')}, "
     "Tensor? gate_up_bias, Tensor? down_bias, bool interleaved, float[] gate, int digits, int coarse=0", _experts,
     _shape_of_experts),
):  # fmt: skip
    _LIBRARY.define(f"{_name}({_schema}) -> Tensor")
    # without torch.compiler.disable, which imports Dynamo, 1.5 s: operators in a graph run with Dynamo off
    _LIBRARY.impl(_name, _call, "CPU")
    torch.library.register_fake(f"mopeq::{_name}", _fake, lib=_LIBRARY)


def grouped_linear(x: Tensor, packed: PackedGroup, offsets: Tensor | None = None, digits: int | None = None) -> Tensor:
    """As :func:`mopeq.kernels.naive.grouped_linear`, for matrices in panels; without gradients.

    ``offsets`` None gives all rows to the only expert. ``digits`` of an activation, 1 to 3, all of them
    used; by default :func:`digits_of`.
    """
    if packed.form != "panels":
        raise InputError(f"the CPU kernel got matrices in {packed.form} form; expected panels; convert them first")
    out: Tensor = torch.ops.mopeq.grouped_linear.default(
        x, packed.qweight, packed.scales, packed.zeros, packed.layout.table, offsets, packed.out_features,
        *digits_of(x.dtype, digits),
    )  # fmt: skip
    return out


def experts(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: PackedGroup, down: PackedGroup, gate: Gate,
    biases: tuple[Tensor | None, Tensor | None] = (None, None), digits: int | None = None,
) -> Tensor:  # fmt: skip
    """A layer's experts in one call, for matrices in panels; without gradients.

    ``x`` (tokens, H), ``index`` int64 (tokens, k) of which numbers of no expert add nothing, ``weights`` (tokens, k),
    ``biases`` of gate and up (experts, 2I) and of down (experts, H) as the module has them. The twin that defines
    correct is :class:`mopeq.runtime.MixedExperts` on torch; here all that lies between ``x`` and the result is in
    float32, and only the result is rounded to ``x``'s type.
    """
    if gate_up.form != "panels" or down.form != "panels":
        raise InputError(
            f"the CPU kernel got matrices in {gate_up.form} and {down.form} form; expected panels; convert them first"
        )
    out: Tensor = torch.ops.mopeq.experts.default(
        x, index, weights, gate_up.qweight, gate_up.scales, gate_up.zeros, gate_up.layout.table,
        down.qweight, down.scales, down.zeros, down.layout.table, *biases, gate.interleaved,
        (gate.alpha, gate.limit, gate.shift), *digits_of(x.dtype, digits),
    )  # fmt: skip
    return out


def convert(packed: PackedGroup, form: Form) -> PackedGroup:
    """The same matrices in another form, in the same buffers, which are overwritten one matrix after the other."""
    if packed.form == form:
        return packed
    if not packed.layout.has_panels:
        raise InputError(f"rows of {packed.layout.shapes[0][1]} inputs have no panels; expected a multiple of 32")
    lib, forward, threads = library(), int(form == "panels"), torch.get_num_threads()
    assert packed.layout.table.numel()  # made before the first product, because torch.compile could not make it
    _ = packed.layout.left_out  # so is this
    for expert, precision in enumerate(packed.layout.precisions):
        if precision.bits == 16:
            continue
        for q in packed.stored(expert):
            rows, inputs = q.shape[0], q.shape[1] // precision.weights_per_code
            groups, bits = q.scales.shape[1], precision.code_bits
            before = q.qweight.clone()
            check(lib.mopeq_repack_codes(before.data_ptr(), _parts("qweight", q.qweight, torch.uint8)[0],
                                          rows, inputs, bits, forward, threads))  # fmt: skip
            before = q.scales.clone()
            check(lib.mopeq_repack_scales(before.data_ptr(), _parts("scales", q.scales, torch.float16)[0],
                                           rows, groups, forward))  # fmt: skip
            if q.zeros is not None:
                before = q.zeros.clone()
                check(lib.mopeq_repack_zeros(before.data_ptr(), _parts("zeros", q.zeros, torch.uint8)[0],
                                              rows, groups, bits, forward))  # fmt: skip
    return PackedGroup(packed.layout, packed.qweight, packed.scales, packed.zeros, form)
