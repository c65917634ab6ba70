"""Matrices that other quantizers packed, and the weights they stand for: compressed-tensors, GPTQ, AutoRound, AWQ.

All four store unsigned codes q, scales and zero points z of groups of inputs, and the weight is ``(q - z) * scale``
(docs/numerics.md says the same of mopeq's). They differ in names, in the direction in which 32-bit words are filled,
and in whether a stored zero point is less by one:

=================  ===========  ==================  ============================  ==========
packing            codes        words along         zero points                   scales
=================  ===========  ==================  ============================  ==========
pack-quantized     (out, in)    in                  (out, groups), along out      as zeros
gptq, auto_round   (in, out)    in                  (groups, out), along out      as zeros
awq (gemm)         (in, out)    out, 0 2 4 6 1 3 5 7  (groups, out), along out    as zeros
=================  ===========  ==================  ============================  ==========

Sources: ``pack_to_int32`` of compressed-tensors, ``QuantLinear`` of AutoGPTQ and auto-round, ``WQLinear_GEMM`` of
AutoAWQ; the tests compare with compressed-tensors' own code and with packings written down from these definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopeq.errors import ModelError
from mopeq.qtensor import unpack_bits

__all__ = ["METHODS", "Packed", "dequantized", "find_packed", "method_of"]

METHODS = ("compressed-tensors", "gptq", "auto-round", "awq")
"""Values of ``quant_method`` that are read."""
WIDTHS = (2, 3, 4, 5, 6, 8)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns is in nibble i of an AWQ word."""
PLUS_ONE = ("gptq", "auto_round:gptq", "auto_round:auto_gptq")
"""Packings whose stored zero points are less by one."""

Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Packed:
    """One matrix (out, in): its packing (``pack-quantized``, ``gptq`` or ``awq``), width, and where its parts lie.

    parts: ``{"codes": tensor name, "scales": ..., "zeros": ..., "order": ...}``, the last two where there are any.
    plus: what to add to a stored zero point.
    """

    packing: str
    bits: int
    shape: tuple[int, int]
    parts: Mapping[str, str]
    plus: int = 0


def method_of(settings: object) -> str | None:
    """The ``quant_method`` of a checkpoint if it is one of ``METHODS``."""
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    method = "auto-round" if method == "intel/auto-round" else method
    return method if method in METHODS else None


def find_packed(settings: Mapping[str, Any], shapes: Shapes, read: Read) -> dict[str, Packed]:
    """``{name of the weight: packed matrix}`` of a checkpoint whose ``quantization_config`` is ``settings``.

    read: gives a stored tensor; only shapes of a few bytes are read. Raises :class:`ModelError` for variants of the
    four formats that hold no plain integers, and for tensors whose shapes do not belong together.
    """
    method = method_of(settings)
    if method == "compressed-tensors":
        _refuse_unless(settings, "format", ("pack-quantized",))
        return {
            f"{base}.weight": _rows(base, shapes, read)
            for base in _bases(shapes, "weight_packed", "compressed-tensors")
        }
    if method == "auto-round":
        _refuse_unless(settings, "data_type", ("int", None))
        packing = str(settings.get("packing_format", "auto_round:auto_gptq"))
    else:
        packing = "awq" if method == "awq" else str(settings.get("checkpoint_format") or "gptq")
    if packing in ("awq", "auto_round:awq", "auto_round:auto_awq"):
        _refuse_unless(settings, "version", ("gemm", "GEMM", None))
        return {f"{base}.weight": _awq(base, shapes) for base in _bases(shapes, "qweight", packing)}
    if packing not in (*PLUS_ONE, "gptq_v2", "auto_round"):
        raise ModelError(
            f"config.json has the packing {packing!r}; mopeq reads {', '.join((*PLUS_ONE, 'gptq_v2', 'auto_round'))} "
            f"and awq; give the bfloat16 checkpoint of this model"
        )
    plus = int(packing in PLUS_ONE)
    return {f"{base}.weight": _columns(base, shapes, plus) for base in _bases(shapes, "qweight", packing)}


def dequantized(packed: Packed, read: Read) -> Tensor:
    """The weights (out, in), computed in float32 and rounded once to the type of the scales."""
    codes, scales = read(packed.parts["codes"]), read(packed.parts["scales"])
    out, inputs = packed.shape
    stored = read(packed.parts["zeros"]) if "zeros" in packed.parts else None
    if packed.packing == "awq":
        numbers, zeros = _nibbles(codes).T, None if stored is None else _nibbles(stored).T
    elif packed.packing == "gptq":
        numbers = _numbers(codes.T, packed.bits, inputs)
        zeros = None if stored is None else _numbers(stored, packed.bits, out).T
    else:
        numbers = _numbers(codes, packed.bits, inputs)
        zeros = None if stored is None else _numbers(stored.T, packed.bits, out).T
    scale = (scales if packed.packing == "pack-quantized" else scales.T).float()
    zero = torch.full_like(scale, 1 << (packed.bits - 1)) if zeros is None else zeros.float() + packed.plus
    if "order" in packed.parts:
        group = read(packed.parts["order"]).long()
    else:
        group = torch.arange(inputs) // (inputs // scale.shape[1])
    return ((numbers.float() - zero[:, group]) * scale[:, group]).to(scales.dtype)


def _numbers(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 words (rows, n) to the first ``count`` unsigned numbers of each row's bit string."""
    return unpack_bits(words.contiguous().view(torch.uint8)[:, : count * bits // 8], bits)


def _nibbles(words: Tensor) -> Tensor:
    """AWQ's int32 words (rows, n) to numbers (rows, 8 n)."""
    found = _numbers(words, 4, 8 * words.shape[1]).reshape(len(words), -1, 8)
    return found[..., torch.tensor(AWQ_ORDER).argsort()].flatten(1)


def _bases(shapes: Shapes, suffix: str, packing: str) -> list[str]:
    found = [key.removesuffix(f".{suffix}") for key in shapes if key.endswith(f".{suffix}")]
    if not found:
        raise ModelError(
            f"config.json says {packing}, and no tensor is named *.{suffix}; check that both belong together"
        )
    return found


def _rows(base: str, shapes: Shapes, read: Read) -> Packed:
    """A matrix of compressed-tensors, whose own shape is a tensor."""
    parts = _parts(base, shapes, codes="weight_packed", scales="weight_scale", zeros="weight_zero_point",
                   order="weight_g_idx")  # fmt: skip
    if f"{base}.weight_shape" not in shapes or shapes[f"{base}.weight_shape"] != (2,):
        raise ModelError(f"tensor {base}.weight_shape is missing; download the checkpoint again")
    out, inputs = (int(n) for n in read(f"{base}.weight_shape"))
    words = shapes[parts["codes"]][1] if len(shapes[parts["codes"]]) == 2 else 0
    bits = next((b for b in WIDTHS if -(-inputs * b // 32) == words), 0)
    made = Packed("pack-quantized", bits, (out, inputs), parts)
    groups = shapes[parts["scales"]][-1] if shapes[parts["scales"]] else 0
    expected = {"codes": (out, words), "scales": (out, groups), "zeros": (-(-out * bits // 32), groups)}
    return _checked(base, made, groups, expected, shapes)


def _columns(base: str, shapes: Shapes, plus: int) -> Packed:
    """A matrix of GPTQ or AutoRound; its width is that of its zero points."""
    parts = _parts(base, shapes, codes="qweight", scales="scales", zeros="qzeros", order="g_idx")
    groups, out = shapes[parts["scales"]] if len(shapes[parts["scales"]]) == 2 else (0, 0)
    words = shapes.get(parts.get("zeros", ""), (0, 0))[-1]
    bits = next((b for b in WIDTHS if out * b == words * 32), 0)
    rows = shapes[parts["codes"]][0] if shapes[parts["codes"]] else 0
    made = Packed("gptq", bits, (out, rows * 32 // bits if bits else 0), parts, plus)
    expected = {"codes": (rows, out), "scales": (groups, out), "zeros": (groups, words)}
    return _checked(base, made, groups, expected, shapes)


def _awq(base: str, shapes: Shapes) -> Packed:
    """A matrix of AutoAWQ, always of 4 bits."""
    parts = _parts(base, shapes, codes="qweight", scales="scales", zeros="qzeros")
    groups, out = shapes[parts["scales"]] if len(shapes[parts["scales"]]) == 2 else (0, 0)
    inputs = shapes[parts["codes"]][0] if shapes[parts["codes"]] else 0
    expected = {"codes": (inputs, out // 8), "scales": (groups, out), "zeros": (groups, out // 8)}
    return _checked(base, Packed("awq", 4, (out, inputs), parts), groups, expected, shapes)


def _parts(base: str, shapes: Shapes, **suffixes: str) -> dict[str, str]:
    found = {part: f"{base}.{suffix}" for part, suffix in suffixes.items() if f"{base}.{suffix}" in shapes}
    for part in ("codes", "scales"):
        if part not in found:
            raise ModelError(f"tensor {base}.{suffixes[part]} is missing; download the checkpoint again")
    return found


def _checked(base: str, made: Packed, groups: int, expected: Mapping[str, tuple[int, ...]], shapes: Shapes) -> Packed:
    """The matrix, if its parts have the shapes that belong together."""
    _, inputs = made.shape
    found = {part: shapes[key] for part, key in made.parts.items()}
    wanted = {**expected, "order": (inputs,)}
    fits = made.bits and groups and inputs % groups == 0 and inputs % 8 == 0 and made.shape[0] % 8 == 0
    if not fits or any(found[part] != wanted[part] for part in found):
        told = ", ".join(f"{made.parts[part].rpartition('.')[2]} {list(shape)}" for part, shape in found.items())
        raise ModelError(
            f"the tensors of {base} do not make a matrix of {', '.join(map(str, WIDTHS))} bits: {told}; "
            f"download the checkpoint again, or give the bfloat16 one"
        )
    return made


def _refuse_unless(settings: Mapping[str, Any], name: str, known: tuple[str | None, ...]) -> None:
    if settings.get(name) not in known:
        raise ModelError(
            f"the checkpoint is quantized by {method_of(settings)} with {name} {settings.get(name)!r}; mopeq reads "
            f"{', '.join(str(k) for k in known if k)}; give the bfloat16 checkpoint of this model"
        )
