"""Quantizers: (weights, precision, input moments) to codes, batched over the experts of a layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

from mopeq.errors import InputError
from mopeq.precision import Precision
from mopeq.qtensor import Codes
from mopeq.quantizers.gptq import Factored, factored, gptq
from mopeq.quantizers.hqq import hqq
from mopeq.quantizers.moments import fallback_moments, moment_error
from mopeq.quantizers.rtn import rtn, rtn_mse
from mopeq.quantizers.signround import signround
from mopeq.quantizers.turned import turned

__all__ = [
    "CODEBOOKS", "DATA_FREE", "QUANTIZERS", "WHOLE", "Quantizer", "check_codebooks", "fallback_moments", "gptq", "hqq",
    "moment_error", "once", "rtn", "rtn_mse", "signround",
]  # fmt: skip


class Quantizer(Protocol):
    """weight: float32 (experts, out, in); moments: float32 (experts, in, in) sums of x x^T, or None.

    Instead of the moments it takes what :func:`once` made of them for it.
    """

    def __call__(self, weight: Tensor, precision: Precision, moments: Any = None) -> Codes:
        """Codes of the whole batch."""
        ...


def once(quantizer: Quantizer, moments: Tensor | None, hadamard: bool = False) -> Tensor | Factored | None:
    """What a quantizer computes from moments alone, to be given instead of them at several precisions: at those with
    rotated inputs, or at the others.
    """
    if quantizer is not gptq or moments is None:
        return moments
    return factored(turned(moments) if hadamard else moments)


QUANTIZERS: dict[str, Quantizer] = {
    "rtn": rtn,
    "rtn-mse": rtn_mse,
    "hqq": hqq,
    "gptq": gptq,
    "signround": signround,
}
"""By the name that ``--method`` takes."""
CODEBOOKS = ("gptq", "rtn-mse")
"""Those that can make a codebook's codes, such as 2g128c."""
DATA_FREE = ("rtn", "rtn-mse", "hqq")
"""Those that run without calibration inputs."""
WHOLE = ("signround",)
"""Those that pack the matrices of an expert together (:mod:`mopeq.learned`); costs are of single matrices."""


def check_codebooks(method: str, precisions: Iterable[Precision]) -> None:
    """Raise :class:`InputError` for a codebook among the precisions that the method cannot make."""
    book = next((p for p in precisions if p.codebook), None)
    if book is not None and method not in CODEBOOKS:
        raise InputError(
            f"{book} has a codebook, which {method} cannot make; choose the method {' or '.join(CODEBOOKS)}"
        )
