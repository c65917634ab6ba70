"""Quantized tensors: codes, packing, dequantization. This file is the reference numerics (docs/numerics.md).

A matrix W (out, in) is cut along its input axis into groups. Code q, fp16 scale s and integer zero point z give
``W = (q - z) * s``; codes and zero points are ``bits`` wide, unsigned; a symmetric matrix has z = 2**(bits-1) and
stores none. With a codebook, 4-bit code 4n+j of a row is a point (a, b) of :data:`PAIRS`: ``W[8n+j] = a * s`` and
``W[8n+4+j] = b * s``. Where inputs are rotated, this is the matrix for rotated ones (hadamard.py). Bit strings are
little-endian: code i of a row occupies bits [i*bits, (i+1)*bits) of its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from mopeq.hadamard import restored
from mopeq.native import check, library, why_not
from mopeq.precision import FULL, Precision

__all__ = [
    "PAIRS", "Codes", "QTensor", "dequantize", "integers", "on_cpu", "pack", "pack_bits", "packed_shapes", "rows_of",
    "unpack", "unpack_bits",
]  # fmt: skip


PAIRS = (
    (-9, -14), (-14, -4), (8, 0), (12, 10), (4, 6), (-4, 7), (3, 15), (-7, 0),
    (4, -6), (-4, -7), (0, 0), (-8, 15), (12, -10), (-14, 6), (16, 0), (2, -15),
)  # fmt: skip
"""The 16 points of a codebook: those of least squared error for pairs of independent normal numbers, on integers of at
most 16 (k-means, then single steps; rms 8.95). Plain rounding to them loses 0.107 of the squares, to the best uniform
grid of 4 points 0.119."""


@dataclass(frozen=True)
class Codes:
    """An unpacked quantized matrix, or a batch of them (leading axes ``...``) at one precision.

    codes: uint8 (..., out, in), with a codebook (..., out, in/2); scales: float16 (..., out, groups); zeros: uint8
    (..., out, groups), None if symmetric.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    precision: Precision

    def __getitem__(self, index: int) -> Codes:
        """One matrix of a batch."""
        return Codes(
            self.codes[index], self.scales[index], None if self.zeros is None else self.zeros[index], self.precision
        )


@dataclass(frozen=True)
class QTensor:
    """A packed matrix (out, in): what a checkpoint stores.

    qweight: uint8 (out, in*bits/8); scales: float16 (out, groups); zeros: uint8 (groups, out*bits/8), the zero points
    of one group of all rows packed together, None if symmetric. At 16 bits qweight holds bfloat16 bytes and the others
    are empty and None.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    precision: Precision

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(t.numel() * t.element_size() for t in (self.qweight, self.scales, self.zeros) if t is not None)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (..., n) to bytes (..., n*bits/8), little-endian; n*bits must be a multiple of 8.

    On the CPU the compiled library does this, where it is; the rest of this function defines correct.
    """
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    n = codes.shape[-1]
    if n % 8:
        raise ValueError(f"{n} codes in a row; expected a multiple of 8")
    if codes.device.type == "cpu" and 1 < bits < 8 and not why_not():
        plain, made = (
            codes.to(torch.uint8).contiguous(),
            torch.empty(*codes.shape[:-1], n // 8 * bits, dtype=torch.uint8),
        )
        count, threads = plain.numel(), torch.get_num_threads()
        check(library().mopeq_pack_bits(plain.data_ptr(), made.data_ptr(), count, bits, threads) if count else 0)
        return made
    eight = codes.to(torch.uint8).reshape(*codes.shape[:-1], n // 8, 8).movedim(-1, 0)
    packed = torch.empty(*eight.shape[1:], bits, dtype=torch.uint8, device=codes.device)
    for j in range(bits):
        inside = [i for i in range(8) if 8 * j - bits < i * bits < 8 * j + 8]
        parts = ((eight[i], i * bits - 8 * j) for i in inside)  # a shift to the left drops the bits of the next byte
        packed[..., j] = reduce(torch.bitwise_or, (c << shift if shift >= 0 else c >> -shift for c, shift in parts))
    return packed.flatten(-2)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Bytes (..., n*bits/8) to uint8 codes (..., n): inverse of :func:`pack_bits`."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        spread: Tensor = (packed.unsqueeze(-1) >> shifts) & mask
        return spread.flatten(-2)
    eight = packed.reshape(*packed.shape[:-1], packed.shape[-1] // bits, bits).to(torch.int32)
    columns = []
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        value = eight[..., byte] >> shift
        if shift + bits > 8:
            value = value | (eight[..., byte + 1] << (8 - shift))
        columns.append((value & mask).to(torch.uint8))
    return torch.stack(columns, -1).flatten(-2)


def rows_of(codes: Codes, parts: int) -> list[Codes]:
    """The matrices of equal shape that one was stacked from along its output axis."""
    zeros = [None] * parts if codes.zeros is None else list(codes.zeros.chunk(parts))
    both = zip(codes.codes.chunk(parts), codes.scales.chunk(parts), zeros, strict=True)
    return [Codes(c, s, z, codes.precision) for c, s, z in both]


def on_cpu(codes: Codes) -> Codes:
    """The same codes on the CPU."""
    zeros = None if codes.zeros is None else codes.zeros.cpu()
    return Codes(codes.codes.cpu(), codes.scales.cpu(), zeros, codes.precision)


def pack(codes: Codes) -> QTensor:
    """Pack one matrix."""
    bits = codes.precision.code_bits
    out, inp = codes.codes.shape[0], codes.codes.shape[1] * codes.precision.weights_per_code
    zeros = None if codes.zeros is None else pack_bits(codes.zeros.T, bits)
    return QTensor(
        pack_bits(codes.codes, bits), codes.scales.to(torch.float16).contiguous(), zeros, (out, inp), codes.precision
    )


def pack_full(weight: Tensor) -> QTensor:
    """Store a matrix at 16 bits (bfloat16)."""
    out, inp = weight.shape
    raw = weight.to(torch.bfloat16).contiguous().view(torch.uint8)
    return QTensor(raw, torch.empty(out, 0, dtype=torch.float16), None, (out, inp), FULL)


def unpack(q: QTensor) -> Codes:
    """Inverse of :func:`pack`; not for 16 bits, which has no codes."""
    bits = q.precision.code_bits
    zeros = None if q.zeros is None else unpack_bits(q.zeros, bits).T
    return Codes(unpack_bits(q.qweight, bits), q.scales, zeros, q.precision)


def dequantize(q: QTensor | Codes, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix (..., out, in) that the codes stand for, computed in float32 and rounded once to ``dtype``.

    Of a rotated one the matrix for inputs as they are.
    """
    if isinstance(q, QTensor):
        if q.precision.bits == 16:
            return q.qweight.view(torch.bfloat16).to(dtype)
        q = unpack(q)
    grouped = integers(q).reshape(*q.scales.shape, -1).float()
    weight: Tensor = (grouped * q.scales.float().unsqueeze(-1)).flatten(-2)
    return (restored(weight) if q.precision.hadamard else weight).to(dtype)


def integers(q: Codes) -> Tensor:
    """int16 (..., out, in): the integers that times their group's scale are the weights."""
    if q.precision.codebook:
        points = torch.tensor(PAIRS, dtype=torch.int16, device=q.codes.device)[q.codes.long()]
        return points.reshape(*q.codes.shape[:-1], -1, 4, 2).transpose(-1, -2).flatten(-3)
    whole = q.codes.to(torch.int16)
    if q.zeros is None:
        return whole - (1 << (q.precision.bits - 1))
    return (whole.reshape(*q.scales.shape, -1) - q.zeros.to(torch.int16).unsqueeze(-1)).flatten(-2)


def packed_shapes(shape: tuple[int, int], precision: Precision) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """``{suffix: ((rows, columns), dtype)}`` of the tensors that store a matrix (docs/format.md); no empty ones."""
    out, inp = shape
    if precision.bits == 0:
        return {}
    if precision.bits == 16:
        return {"qweight": ((out, 2 * inp), torch.uint8)}
    groups = precision.group_count(inp)
    made = {"qweight": ((out, inp * precision.bits // 8), torch.uint8), "scales": ((out, groups), torch.float16)}
    if not precision.symmetric:
        made["zeros"] = ((groups, out * precision.bits // 8), torch.uint8)
    return made
