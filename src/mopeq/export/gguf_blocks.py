"""Blocks of 32 weights, as llama.cpp stores them: one fp16 scale and signed integers of 4, 5 or 8 bits.

``Q4_0``, ``Q5_0`` and ``Q8_0`` have no zero points and hold mopeq's integers exactly (fields.py): 2- and 3-bit codes
with zero points in Q4_0, 4-bit ones in Q5_0, up to 7 bits in Q8_0. (``Q4_1`` would take 4-bit codes with zero points
in half a bit less, with zero times scale rounded to fp16; the K types quantize the scales.) Source: ggml's
``ggml-common.h``; the blocks are read back by the gguf package in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopeq.export.fields import centred, regrouped
from mopeq.qtensor import QTensor, pack_bits

__all__ = ["BLOCK", "WIDTHS", "Block", "blocks"]

BLOCK = 32
WIDTHS = (4, 5, 8)
"""Bits of the integers of Q4_0, Q5_0 and Q8_0."""


@dataclass(frozen=True)
class Block:
    """A block type by the bits of its integers."""

    bits: int

    def __str__(self) -> str:
        return f"Q{self.bits}_0"

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a matrix: a scale of 2 bytes for every 32 integers."""
        return out_features * in_features // BLOCK * (2 + BLOCK * self.bits // 8)


def blocks(matrix: QTensor, bits: int) -> Tensor:
    """A packed matrix (out, in) as uint8 (out, in / 32 * bytes of a block).

    A block is the scale, for 5 bits the fifth bits of all 32, and the integers plus ``2^(bits-1)``: at 4 and 5 bits the
    low halves of number i and i + 16 share byte i; at 8 bits they are stored signed.
    """
    integers, scales = centred(matrix)
    out, inputs = matrix.shape
    scale = regrouped(scales, inputs, BLOCK).contiguous().view(torch.uint8).reshape(out, -1, 2)
    if bits == 8:
        return torch.cat([scale, integers.to(torch.int8).view(torch.uint8).reshape(out, -1, BLOCK)], -1).flatten(1)
    shifted = (integers + (1 << (bits - 1))).to(torch.uint8).reshape(out, -1, BLOCK)
    low = (shifted[..., :16] & 15) | (shifted[..., 16:] & 15) << 4
    fifth = [pack_bits(shifted >> 4, 1)] if bits == 5 else []
    return torch.cat([scale, *fifth, low], -1).flatten(1)
