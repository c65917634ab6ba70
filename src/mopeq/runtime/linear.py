"""A packed ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mopeq.kernels.naive import linear
from mopeq.precision import Precision
from mopeq.qtensor import QTensor, packed_shapes
from mopeq.runtime.experts import keep_packed

__all__ = ["QLinear"]


class QLinear(nn.Module):
    """In the place of an ``nn.Linear``: same call and bias, packed buffers ``qweight``, ``scales`` and ``zeros``."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, precision: Precision, bias: nn.Parameter | None = None,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.precision = in_features, out_features, precision
        stored = packed_shapes((out_features, in_features), precision)
        for part in ("qweight", "scales", "zeros"):
            shape, dtype = stored.get(part, ((0, 0), torch.uint8))
            self.register_buffer(part, torch.empty(shape, dtype=dtype, device=device) if part in stored else None)
        self.bias = bias
        self._is_hf_initialized = True

    def packed(self) -> QTensor:
        """The packed matrix (out, in)."""
        return QTensor(self.qweight, self.scales, self.zeros, (self.out_features, self.in_features), self.precision)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y = linear(x, self.packed())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLinear:
        keep_packed(self, lambda: super(QLinear, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """As ``nn.Linear``, and the precision."""
        return f"in_features={self.in_features}, out_features={self.out_features}, precision={self.precision}"
