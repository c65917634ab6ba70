"""Which kernel runs: the compiled one where it can, ``naive`` everywhere else."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mopeq.errors import InputError
from mopeq.kernels import cpu, naive
from mopeq.kernels.layout import PackedGroup
from mopeq.seam import Gate

__all__ = ["Selected", "experts", "grouped_linear", "linear", "selected", "using"]

NAMES = ("auto", "cpu", "naive")
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

    ``auto`` (the default) takes the compiled kernel where it was built, ``cpu`` insists on it, ``naive`` does without.
    Loading a model calls this. Raises :class:`InputError` where ``cpu`` cannot be had, or the variable is another word.
    """
    global _compiled_selected
    found = _find()
    _compiled_selected = found.name == "cpu"
    return found


def _find() -> Selected:
    asked = _asked or os.environ.get("MOPEQ_KERNEL") or "auto"
    if asked not in NAMES:
        raise InputError(f"MOPEQ_KERNEL is {asked}; expected {', '.join(NAMES)}")
    if asked == "naive":
        return Selected("naive", reason="asked for")
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


def grouped_linear(x: Tensor, packed: PackedGroup, offsets: Tensor) -> Tensor:
    """Each expert's rows of ``x`` times its matrices, by the best kernel for them; see :mod:`mopeq.kernels`."""
    kernel = cpu.grouped_linear if _takes(x, packed) else naive.grouped_linear
    return kernel(x, packed, offsets)


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
    products = [naive.linear(x, matrix) for matrix in packed.matrices(0)]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)
