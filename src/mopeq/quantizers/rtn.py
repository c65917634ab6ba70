"""Round to nearest: on min-max grids, and on searched ones."""

from __future__ import annotations

from torch import Tensor

from mopeq.precision import Precision
from mopeq.qtensor import Codes
from mopeq.quantizers import pairs
from mopeq.quantizers.grid import FACTORS, REFITS, rounded
from mopeq.quantizers.turned import for_rotated

__all__ = ["rtn", "rtn_mse"]


@for_rotated
def rtn(weight: Tensor, precision: Precision, moments: Tensor | None = None) -> Codes:
    """Nearest codes on min-max grids. weight: float32 (experts, out, in); ``moments`` is not used."""
    return rounded(weight, precision)


@for_rotated
def rtn_mse(weight: Tensor, precision: Precision, moments: Tensor | None = None) -> Codes:
    """Nearest codes on grids of least squared error.

    weight: float32 (experts, out, in). With ``moments`` (experts, in, in) the error of input i counts by their
    diagonal, to which a hundredth of its mean is added so that inputs never seen still count.
    """
    heavy = None if moments is None else importance(moments)
    return (
        pairs.nearest(weight, precision, heavy)
        if precision.codebook
        else rounded(weight, precision, heavy, factors=FACTORS, refits=REFITS)
    )


def importance(moments: Tensor) -> Tensor:
    """Damped diagonal (experts, in) of moments (experts, in, in), scaled to a mean of about 1; 1 where it is zero."""
    diagonal = moments.diagonal(dim1=-2, dim2=-1).float()
    mean = diagonal.mean(-1, keepdim=True)
    return (diagonal / mean).add_(0.01).where(mean > 0, diagonal.new_ones(()))
