"""Panels: the same bytes of packed matrices in the order in which the CPU kernel reads them (docs/kernels.md).

Here in torch, to define them; the library's ``repack`` is the same, faster. A matrix (rows, inputs), rows a multiple of
8, inputs of 32, is cut into panels of 16 rows, the last one of 8 if need be. A panel is a run of blocks of 32 inputs; a
block of b bits is b *lines* of 4 bytes a row, byte 4r+j of a line belonging to row r and to inputs 4k+j, where chunk k
(0 to 7) counts fours of inputs. With c0 to c7 the codes of the chunks, the lines are

    2 bits  c0|c1<<2|c2<<4|c3<<6, c4|...       4 bits  c0|c1<<4, c2|c3<<4, c4|c5<<4, c6|c7<<4
    3 bits  c0|c1<<3|x0<<6, c2|c3<<3|x1<<6, c4|c5<<3|x2<<6 with x0|x1<<2|x2<<4 = c6|c7<<3
    5 bits  those of 4 bits of the low bits, and the high bits h0|h1<<1|...|h7<<7
    6 bits  those of 4 bits, and those of 2 bits of the two high ones       8 bits  c0, c1, ..., c7

A matrix with a codebook is turned as one of 4-bit codes and half the inputs: its block of 32 inputs is two lines, and
the two inputs 8k+j and 8k+4+j of a code lie in one lane of two chunks.

Scales: panel, group, row. Zero points: panel, group, then the bit string of 8 rows, as on disk. Sizes do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopeq.qtensor import QTensor, pack_bits, unpack_bits

__all__ = ["BLOCK", "PANEL", "from_panels", "to_panels"]

PANEL, BLOCK = 16, 32


def to_panels(q: QTensor) -> QTensor:
    """A plain matrix in panels; parts keep their shapes, of which only the size still means anything."""
    return _turn(q, True)


def from_panels(q: QTensor) -> QTensor:
    """Inverse of :func:`to_panels`."""
    return _turn(q, False)


def _turn(q: QTensor, forward: bool) -> QTensor:
    rows, bits = q.shape[0], q.precision.code_bits
    if bits == 16:
        return q
    inp = q.shape[1] // q.precision.weights_per_code
    if rows % 8 or inp % BLOCK:
        raise ValueError(f"a matrix {rows} x {inp} has no panels; expected multiples of 8 and {BLOCK}")
    groups = q.scales.shape[1]
    codes, scales = torch.empty_like(q.qweight).view(-1), torch.empty_like(q.scales).view(-1)
    zeros = None if q.zeros is None else torch.empty_like(q.zeros).view(-1)
    for first in range(0, rows, PANEL):
        last = min(first + PANEL, rows)
        part = slice(first * inp * bits // 8, last * inp * bits // 8)
        some = slice(first * groups, last * groups)
        eights = slice(first * groups * bits // 8, last * groups * bits // 8)
        if forward:
            plain = unpack_bits(q.qweight[first:last], bits).view(last - first, inp // BLOCK, 8, 4)
            codes[part] = _join(plain.permute(1, 2, 0, 3), bits).flatten()
            scales[some] = q.scales[first:last].T.flatten()
            if zeros is not None and q.zeros is not None:
                zeros[eights] = q.zeros[:, first * bits // 8 : last * bits // 8].flatten()
        else:
            lines = q.qweight.view(-1)[part].view(inp // BLOCK, bits, last - first, 4)
            back = _part(lines, bits).permute(2, 0, 1, 3).reshape(last - first, inp)
            codes[part] = pack_bits(back, bits).flatten()
            scales[some] = q.scales.view(-1)[some].view(groups, -1).T.flatten()
            if zeros is not None and q.zeros is not None:
                columns = slice(first * bits // 8, last * bits // 8)
                zeros.view(groups, -1)[:, columns] = q.zeros.view(-1)[eights].view(groups, -1)
    return QTensor(
        codes.view_as(q.qweight), scales.view_as(q.scales), None if zeros is None else zeros.view(q.zeros.shape),  # type: ignore[union-attr]
        q.shape, q.precision,
    )  # fmt: skip


def _join(c: Tensor, bits: int) -> Tensor:
    """Codes uint8 (blocks, 8 chunks, rows, 4) to lines (blocks, bits, rows, 4)."""
    if bits == 8:
        return c
    if bits == 2:
        return c[:, 0::4] | c[:, 1::4] << 2 | c[:, 2::4] << 4 | c[:, 3::4] << 6
    if bits == 3:
        rest = c[:, 6:7] | c[:, 7:8] << 3
        rest = torch.cat([rest & 3, rest >> 2 & 3, rest >> 4], 1)
        return c[:, 0:6:2] | c[:, 1:6:2] << 3 | rest << 6
    low = (c[:, 0::2] & 15) | (c[:, 1::2] & 15) << 4
    if bits == 4:
        return low
    if bits == 6:
        return torch.cat([low, _join(c >> 4, 2)], 1)
    high = sum(((c[:, k : k + 1] >> 4) << k for k in range(1, 8)), start=c[:, 0:1] >> 4)
    return torch.cat([low, high], 1)


def _part(lines: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`_join`."""
    if bits == 8:
        return lines
    if bits == 2:
        return torch.stack([lines >> s & 3 for s in (0, 2, 4, 6)], 2).flatten(1, 2)
    if bits == 3:
        rest = lines[:, 0:1] >> 6 | lines[:, 1:2] >> 6 << 2 | lines[:, 2:3] >> 6 << 4
        return torch.cat([torch.stack([lines & 7, lines >> 3 & 7], 2).flatten(1, 2), rest & 7, rest >> 3], 1)
    low = torch.stack([lines[:, :4] & 15, lines[:, :4] >> 4], 2).flatten(1, 2)
    if bits == 4:
        return low
    if bits == 6:
        return low | _part(lines[:, 4:], 2) << 4
    return low | torch.cat([(lines[:, 4:] >> k & 1) << 4 for k in range(8)], 1)
