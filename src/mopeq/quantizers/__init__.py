"""Quantizers: (weights, precision, input moments) to codes, batched over the experts of a layer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mopeq.precision import Precision
from mopeq.qtensor import Codes
from mopeq.quantizers.gptq import gptq
from mopeq.quantizers.moments import fallback_moments, moment_error
from mopeq.quantizers.rtn import rtn, rtn_mse

__all__ = ["QUANTIZERS", "Quantizer", "fallback_moments", "gptq", "moment_error", "rtn", "rtn_mse"]


class Quantizer(Protocol):
    """weight: float32 (experts, out, in); moments: float32 (experts, in, in) sums of x x^T, or None."""

    def __call__(self, weight: Tensor, precision: Precision, moments: Tensor | None = None) -> Codes:
        """Codes of the whole batch."""
        ...


QUANTIZERS: dict[str, Quantizer] = {"rtn": rtn, "rtn-mse": rtn_mse, "gptq": gptq}
"""By the name that ``--method`` takes."""
