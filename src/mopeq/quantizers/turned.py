"""Quantizers for rotated inputs: the same ones, on W R^T with the moments R M R^T (mopeq/hadamard.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar, cast

from torch import Tensor

from mopeq.hadamard import rotated
from mopeq.precision import Precision
from mopeq.qtensor import Codes

__all__ = ["for_rotated", "turned"]

Coder = TypeVar("Coder", bound=Callable[..., Codes])


def for_rotated(quantizer: Coder) -> Coder:
    """The quantizer, which turns weights and moments first where the precision has rotated inputs.

    What was made of moments before must be of turned ones (:func:`mopeq.quantizers.once`).
    """

    @wraps(quantizer)
    def coded(weight: Tensor, precision: Precision, *others: Any, **named: Any) -> Codes:
        if not precision.hadamard:
            return quantizer(weight, precision, *others, **named)
        made = quantizer(  # the only tensor among the others is the moments
            rotated(weight), replace(precision, hadamard=False),
            *(turned(value) if isinstance(value, Tensor) else value for value in others),
            **{name: turned(value) if isinstance(value, Tensor) else value for name, value in named.items()},
        )  # fmt: skip
        return replace(made, precision=precision)

    return cast(Coder, coded)


def turned(moments: Tensor) -> Tensor:
    """R M R^T of moments (experts, in, in)."""
    return rotated(rotated(moments.float()).mT)
