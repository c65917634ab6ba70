"""The kernel for CUDA devices, in Triton: every expert of a layer at its own width, in one launch.

It reads matrices as a checkpoint has them (plain form), so nothing is laid out anew. A program multiplies a block of
one expert's rows by a block of one of its matrices; the width is a number that it loads, and one formula unpacks every
width. Weights are dequantized in float32 and rounded once to the activations' type, as ``naive`` does. Bytes read
follow the widths; arithmetic does not.

With ``TRITON_INTERPRET=1`` it runs on CPU tensors, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopeq.kernels.layout import PackedGroup

__all__ = ["Prepared", "apply", "compiled", "prepare"]

ROWS, COLUMNS, INPUTS = (16, 32, 64), 64, 32
"""A program's block: rows of activations (the choices), rows of the matrix, inputs at a time.

Group sizes are multiples of 32 or the whole row, so a step over the inputs has one scale for each row of the matrix.
"""


@triton.jit
def _codes(start, index, bits, inside):  # type: ignore[no-untyped-def]
    """Codes ``index`` of bit strings that begin at ``start``, ``bits`` each, little-endian; zeros where not inside."""
    at, shift = start + index * bits // 8, index * bits % 8
    low = tl.load(at, mask=inside, other=0).to(tl.int32)
    high = tl.load(at + 1, mask=inside & (shift + bits > 8), other=0).to(tl.int32)
    return ((low | (high << 8)) >> shift) & ((1 << bits) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _grouped(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, table, tiles, offsets, out, experts, matrices, inputs, columns,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # blocks of rows are counted expert after expert; how many each has is data, so there are programs to spare
    block, every = tl.program_id(0), tl.arange(0, EXPERTS)
    begins = tl.load(offsets + every, mask=every < experts, other=0)
    counts = tl.load(offsets + every + 1, mask=every < experts, other=0) - begins
    blocks = (counts + ROWS - 1) // ROWS
    ends = tl.cumsum(blocks, 0)
    expert = tl.sum((ends <= block).to(tl.int32), 0)
    if expert >= experts:
        return
    mine = every == expert
    before = tl.sum(tl.where(mine, ends - blocks, 0), 0)
    begin = tl.sum(tl.where(mine, begins, 0), 0)
    end = begin + tl.sum(tl.where(mine, counts, 0), 0)
    m = begin + (block - before) * ROWS + tl.arange(0, ROWS)

    tile = tiles + tl.program_id(1) * 3  # matrix, its first row, where its outputs begin
    matrix, n = tl.load(tile), tl.load(tile + 1) + tl.arange(0, COLUMNS)
    about = table + (expert * matrices + matrix) * 8  # GroupLayout.table
    bits, size = tl.load(about).to(tl.int32), tl.load(about + 1).to(tl.int32)
    symmetric, height = tl.load(about + 2), tl.load(about + 3).to(tl.int32)
    codes += tl.load(about + 5)
    scales += tl.load(about + 6)
    zeros += tl.load(about + 7)
    some_m, some_n, groups = m < end, n < height, inputs // size

    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, inputs, INPUTS):
        k = first + tl.arange(0, INPUTS)
        some_k = k < inputs
        some = some_k[:, None] & some_n[None, :]
        rows = tl.load(x + m[:, None] * inputs + k[None, :], mask=some_m[:, None] & some_k[None, :], other=0.0)
        if bits == 16:  # bfloat16: the upper half of a float32
            at = codes + (n[None, :] * inputs + k[:, None]) * 2
            low, high = tl.load(at, mask=some, other=0).to(tl.int32), tl.load(at + 1, mask=some, other=0).to(tl.int32)
            weight = ((low << 16) | (high << 24)).to(tl.float32, bitcast=True)
        else:
            group = first // size
            scale = tl.load(scales + n * groups + group, mask=some_n, other=0.0).to(tl.float32)
            stored = tl.where(symmetric == 0, height, 0)  # zero points
            zero = _codes(zeros + group * (height * bits // 8), n, bits, n < stored)
            zero = tl.where(symmetric == 0, zero, 1 << (bits - 1))
            code = _codes(codes + n[None, :] * (inputs * bits // 8), k[:, None], bits, some)
            weight = (code - zero[None, :]).to(tl.float32) * scale[None, :]
        weight = weight.to(rows.dtype)
        if WIDE:
            rows, weight = rows.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(rows, weight, total, input_precision="ieee")
    at = out + m[:, None] * columns + tl.load(tile + 2) + tl.arange(0, COLUMNS)[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=some_m[:, None] & some_n[None, :])


INTERPRETED = not isinstance(_grouped, triton.JITFunction)
"""Triton's interpreter multiplies bfloat16 as if it were integers; there the same products are taken in float32."""


@dataclass(frozen=True)
class Prepared:
    """Packed matrices, and where they lie as the kernel reads it, on their device."""

    packed: PackedGroup
    table: Tensor
    tiles: Tensor


def prepare(packed: PackedGroup, dtype: torch.dtype | None = None) -> Prepared:
    """The same buffers with their description beside them, which is made once for a layout and device."""
    device, kept = packed.qweight.device, packed.layout.kept
    if device not in kept:
        kept[device] = packed.layout.table.to(device), torch.tensor(_tiles(packed.layout.shapes)).int().to(device)
    return Prepared(packed, *kept[device])


def _tiles(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(matrix, first row, first column of the output) of every block of rows of an expert's matrices."""
    made, column = [], 0
    for matrix, (height, _) in enumerate(shapes):
        made += [(matrix, row, column + row) for row in range(0, height, COLUMNS)]
        column += height
    return made


def apply(x: Tensor, prepared: Prepared, offsets: Tensor) -> Tensor:
    """As :mod:`mopeq.kernels` says, without gradients; it never waits for the device."""
    packed = prepared.packed
    scales, zeros = (packed.qweight if p is None else p for p in (packed.scales, packed.zeros))  # not read where None
    out: Tensor = torch.ops.mopeq.triton_grouped_linear(
        x, packed.qweight, scales, zeros, prepared.table, prepared.tiles, offsets, packed.out_features
    )
    return out


def _launch(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, table: Tensor, tiles: Tensor, offsets: Tensor, columns: int
) -> Tensor:
    (total, inputs), (experts, matrices, _) = x.shape, table.shape
    out = x.new_zeros(total, columns)
    if total:
        rows = next((n for n in ROWS if n * experts >= total), ROWS[-1])
        grid = (total // rows + min(experts, total), len(tiles))  # blocks of rows at most, blocks of columns
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            _grouped[grid](
                x.contiguous(), codes, scales, zeros, table, tiles, offsets.contiguous(), out, experts, matrices,
                inputs, columns, EXPERTS=triton.next_power_of_2(experts), ROWS=rows, COLUMNS=COLUMNS, INPUTS=INPUTS,
                WIDE=INTERPRETED, enable_fp_fusion=True,
            )  # fmt: skip
    return out


# an operator, so that a compiled graph need not look into it
_LIBRARY: Any = torch.library.Library("mopeq", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "triton_grouped_linear(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor table, Tensor tiles, "
    "Tensor offsets, int columns) -> Tensor"
)
_LIBRARY.impl("triton_grouped_linear", _launch, "CPU" if INTERPRETED else "CUDA")


@torch.library.register_fake("mopeq::triton_grouped_linear", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _shape(x: Tensor, codes: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], others[-1])


def compiled(capability: int, dtype: torch.dtype, rows: int = 16, experts: int = 64) -> Any:
    """The kernel as compiled for a GPU of compute capability ``capability`` (80, 90 ...), which needs none."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    pointers = {"x": kind, "codes": "*u8", "scales": "*fp16", "zeros": "*u8", "table": "*i64", "tiles": "*i32",
                "offsets": "*i64", "out": kind}  # fmt: skip
    numbers = dict.fromkeys(("experts", "matrices", "inputs", "columns"), "i32")
    sizes = {"EXPERTS": experts, "ROWS": rows, "COLUMNS": COLUMNS, "INPUTS": INPUTS, "WIDE": False}
    source = ASTSource(
        fn=_grouped,
        signature=pointers | numbers | dict.fromkeys(sizes, "constexpr"),
        constexprs={(list(_grouped.arg_names).index(name),): value for name, value in sizes.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
