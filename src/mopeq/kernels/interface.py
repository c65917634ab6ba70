"""What a kernel is: three functions over a layer's packed experts, each expert at its own precision.

``naive`` is the reference and runs everywhere, ``cpu`` is compiled, ``triton`` runs all widths of a layer in one
launch, ``humming`` makes a call for each precision. Which one is taken: :mod:`mopeq.kernels.select`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mopeq.kernels import cpu, humming_buckets, naive
from mopeq.kernels.layout import GroupLayout, PackedGroup

__all__ = ["KERNELS", "Kernel"]


@dataclass(frozen=True)
class Kernel:
    """One way to multiply rows by a layer's experts, or by a linear, which is a layer of one expert.

    why_not(layout, device, dtype): why it does not take such experts there for activations of ``dtype``; empty where it
    does. prepare(packed, dtype): the experts as it wants them. apply(x, prepared, offsets): what
    ``naive.grouped_linear`` computes. copies: what it prepares holds the weights anew, so that the packed ones can go.
    """

    name: str
    why_not: Callable[[GroupLayout, torch.device, torch.dtype], str]
    prepare: Callable[[PackedGroup, torch.dtype], Any]
    apply: Callable[[Tensor, Any, Tensor], Tensor]
    copies: bool = False


def _cpu_why_not(layout: GroupLayout, device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cpu":
        return f"the compiled kernel runs on the CPU, not on {device.type}"
    if not layout.has_panels:
        return f"rows of {layout.shapes[0][1]} inputs, or their groups, are no multiples of 32"
    return cpu.why_not() or ("" if dtype in cpu.TYPES else f"the compiled kernel does not take {dtype}")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _triton_why_not(layout: GroupLayout, device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the Triton kernel runs on CUDA devices, not on {device.type}"
    if not _has_triton():
        return "the package triton is not installed"
    if layout.has_codebooks:
        return "the Triton kernel has no codebooks, and some experts have one"
    if layout.is_rotated:
        return "the Triton kernel does not rotate inputs, and some experts want it"
    return "" if dtype in cpu.TYPES else f"the Triton kernel does not take {dtype}"


def _triton_prepare(packed: PackedGroup, dtype: torch.dtype) -> Any:
    from mopeq.kernels import triton_grouped

    return triton_grouped.prepare(packed, dtype)


def _triton_apply(x: Tensor, prepared: Any, offsets: Tensor) -> Tensor:
    from mopeq.kernels import triton_grouped

    return triton_grouped.apply(x, prepared, offsets)


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("cpu", _cpu_why_not, lambda packed, _: cpu.convert(packed, "panels"), cpu.grouped_linear),
        Kernel("naive", lambda *_: "", lambda packed, _: packed, naive.grouped_linear),
        Kernel("triton", _triton_why_not, _triton_prepare, _triton_apply),
        Kernel("humming", humming_buckets.why_not, humming_buckets.prepare, humming_buckets.apply, copies=True),
    )
}
"""By name, as in ``MOPEQ_KERNEL``."""
