"""Which kernel runs: the compiled one on the CPU, Triton's on CUDA devices, ``naive`` where neither can."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mopeq.errors import InputError
from mopeq.kernels import cpu, naive
from mopeq.kernels.interface import KERNELS, Kernel
from mopeq.kernels.layout import GroupLayout, PackedGroup
from mopeq.seam import Gate

__all__ = ["Ready", "Selected", "choose", "experts", "grouped_linear", "linear", "ready", "selected", "using"]

NAMES = ("auto", *KERNELS)
BEST = {"cpu": "cpu", "cuda": "triton"}
"""What ``auto`` takes on a device where it can."""
_asked: str | None = None
_compiled_selected: bool | None = None  # what selected() last found; products read this alone


@dataclass(frozen=True)
class Selected:
    """The kernel for activations on the CPU: ``cpu`` with its instruction set, or ``naive`` and why not ``cpu``."""

    name: str
    isa: str | None = None
    reason: str = ""


def selected() -> Selected:
    """What is used for CPU tensors from now on, by ``MOPEQ_KERNEL`` and what is installed.

    ``auto`` (the default) takes the compiled kernel where it was built, ``cpu`` insists on it, the others do without.
    Loading a model calls this. Raises :class:`InputError` where ``cpu`` cannot be had, or the variable is another word.
    """
    global _compiled_selected
    found = _find()
    _compiled_selected = found.name == "cpu"
    return found


def _word() -> str:
    asked = _asked or os.environ.get("MOPEQ_KERNEL") or "auto"
    if asked not in NAMES:
        raise InputError(f"MOPEQ_KERNEL is {asked}; expected {', '.join(NAMES)}")
    return asked


def _find() -> Selected:
    asked = _word()
    if asked not in ("auto", "cpu"):
        return Selected("naive", reason="asked for" if asked == "naive" else f"{asked} is asked for")
    reason = cpu.why_not()
    if not reason:
        return Selected("cpu", cpu.isa())
    if asked == "cpu":
        cpu.library()
    _say_once(reason)
    return Selected("naive", reason=reason)


@cache
def _say_once(reason: str) -> None:
    logging.getLogger("mopeq").warning("packed weights run on torch alone, which is slow: %s", reason)


@contextmanager
def using(name: str) -> Iterator[Selected]:
    """Within the block, ``selected()`` as if ``MOPEQ_KERNEL`` were ``name``."""
    global _asked
    before, _asked = _asked, name
    try:
        yield selected()
    finally:
        _asked = before
        selected()


def _takes(x: Tensor, *packed: PackedGroup, others: Iterable[Tensor | None] = ()) -> bool:
    """Whether the compiled kernel takes a product: in panels, of its types, and no gradient is wanted.

    ``others`` are what else goes into it and could want a gradient.
    """
    return (
        all(group.form == "panels" for group in packed)
        and x.device.type == "cpu"
        and x.dtype in cpu.TYPES
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)))
        and (selected().name == "cpu" if _compiled_selected is None else _compiled_selected)
    )


def choose(layout: GroupLayout, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel for experts on ``device`` and activations of ``dtype``: what ``MOPEQ_KERNEL`` names, or the best one.

    Raises :class:`InputError` where ``triton`` or ``humming`` is asked for and cannot run. ``cpu`` is for the CPU alone
    and asks for nothing elsewhere.
    """
    asked = _word()
    if asked in ("triton", "humming"):
        reason = KERNELS[asked].why_not(layout, device, dtype)
        if reason:
            raise InputError(f"MOPEQ_KERNEL is {asked}: {reason}; expected auto, or experts that it takes")
        return KERNELS[asked]
    best = KERNELS["naive" if asked == "naive" else BEST.get(device.type, "naive")]
    reason = best.why_not(layout, device, dtype)
    if reason and device.type != "cpu":  # selected() has said why not there
        _say_once(reason)
    return KERNELS["naive"] if reason else best


@dataclass(frozen=True)
class Ready:
    """A layer's experts, or a linear as its only expert, laid out for the kernel that runs them."""

    kernel: Kernel
    prepared: Any

    def __call__(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Rows ``x`` (rows, in), sorted by expert as ``offsets`` (experts + 1,) says, to (rows, out)."""
        return self.kernel.apply(x, self.prepared, offsets)

    def linear(self, x: Tensor) -> Tensor:
        """``x (..., in)`` times the only expert's matrices, one after the other: (..., out)."""
        if isinstance(self.prepared, PackedGroup):
            return linear(x, self.prepared)
        return _only(x, self)


def ready(packed: PackedGroup, dtype: torch.dtype) -> Ready:
    """Packed matrices, in plain form, for the kernel that :func:`choose` takes on their device."""
    kernel = choose(packed.layout, packed.qweight.device, dtype)
    return Ready(kernel, kernel.prepare(packed, dtype))


def _only(x: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    made = run(rows, torch.arange(2, device=x.device) * len(rows))
    return made.view(*x.shape[:-1], made.shape[-1])


def _on_device(x: Tensor, packed: PackedGroup) -> Kernel | None:
    """The kernel that takes a product off the CPU, or on it where one of these is asked for; None for ``naive``."""
    asked = _word() in ("triton", "humming")
    if (x.device.type == "cpu" and not asked) or (x.requires_grad and torch.is_grad_enabled()):
        return None
    kernel = choose(packed.layout, x.device, x.dtype)
    if kernel.copies:
        raise InputError(
            f"MOPEQ_KERNEL is {kernel.name}, which lays weights out anew and runs under vLLM alone; expected auto or "
            "triton here"
        )
    return None if kernel.name == "naive" else kernel


def grouped_linear(x: Tensor, packed: PackedGroup, offsets: Tensor) -> Tensor:
    """Each expert's rows of ``x`` times its matrices, by the best kernel for them; see :mod:`mopeq.kernels`."""
    if _takes(x, packed):
        return cpu.grouped_linear(x, packed, offsets)
    kernel = _on_device(x, packed)
    if kernel is not None:
        return kernel.apply(x, kernel.prepare(packed, x.dtype), offsets)
    return naive.grouped_linear(x, packed, offsets)


def experts(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: PackedGroup, down: PackedGroup, gate: Gate,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor | None:  # fmt: skip
    """A layer's experts in one call, :func:`mopeq.kernels.cpu.experts`; None where the compiled kernel cannot."""
    if _takes(x, gate_up, down, others=(weights, *biases)):
        return cpu.experts(x, index, weights, gate_up, down, gate, biases)
    return None


def linear(x: Tensor, packed: PackedGroup) -> Tensor:
    """``x (..., in)`` times the matrices of a group's only expert, one after the other: ``(..., out)`` in its type."""
    if _takes(x, packed):
        return cpu.grouped_linear(x.reshape(-1, x.shape[-1]), packed).view(*x.shape[:-1], packed.out_features)
    if _on_device(x, packed) is not None:
        return _only(x, lambda rows, offsets: grouped_linear(rows, packed, offsets))
    products = [naive.linear(x, matrix) for matrix in packed.matrices(0)]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)
