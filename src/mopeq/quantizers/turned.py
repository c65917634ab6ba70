"""Quantizers for rotated inputs: the same ones, on W R^T with the moments R M R^T (mopeq/hadamard.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from torch import Tensor

from mopeq.hadamard import rotated
from mopeq.precision import Precision
from mopeq.qtensor import Codes

__all__ = ["for_rotated", "turned"]

P = ParamSpec("P")
Coded = Callable[Concatenate[Tensor, Precision, P], Codes]


def for_rotated(quantizer: Coded[P]) -> Coded[P]:
    """The quantizer, which turns weights and moments first where the precision has rotated inputs.

    What was made of moments before must be of turned ones (:func:`mopeq.quantizers.once`).
    """

    @wraps(quantizer)
    def coded(weight: Tensor, precision: Precision, *others: P.args, **named: P.kwargs) -> Codes:
        if not precision.hadamard:
            return quantizer(weight, precision, *others, **named)
        call: Any = quantizer  # the only tensor among the others is the moments
        made: Codes = call(
            rotated(weight), replace(precision, hadamard=False),
            *(turned(value) if isinstance(value, Tensor) else value for value in others),
            **{name: turned(value) if isinstance(value, Tensor) else value for name, value in named.items()},
        )  # fmt: skip
        return replace(made, precision=precision)

    return coded


def turned(moments: Tensor) -> Tensor:
    """R M R^T of moments (experts, in, in)."""
    return rotated(rotated(moments.float()).mT)
