"""A packed ``nn.Linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mopeq.kernels import GroupLayout, PackedGroup, linear
from mopeq.precision import Precision
from mopeq.qtensor import packed_shapes
from mopeq.runtime.packed import PackedModule

__all__ = ["QLinear"]


class QLinear(PackedModule):
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
        self.layout = GroupLayout((precision,), ((out_features, in_features),))
        stored = packed_shapes((out_features, in_features), precision)
        for part in ("qweight", "scales", "zeros"):
            shape, dtype = stored.get(part, ((0, 0), torch.uint8))
            self.register_buffer(part, torch.empty(shape, dtype=dtype, device=device) if part in stored else None)
        self.bias = bias
        self._is_hf_initialized = True

    def packed(self) -> PackedGroup:
        """The packed matrix (out, in), as the only one of a group."""
        scales, zeros = self._buffers["scales"], self._buffers["zeros"]
        return PackedGroup(
            self.layout,
            self.qweight.view(-1),
            None if scales is None else scales.view(-1),
            None if zeros is None else zeros.view(-1),
            self.mopeq_form,
        )

    def packed_groups(self) -> list[PackedGroup]:
        """The only one."""
        return [self.packed()]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y = linear(x, self.packed())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def __getattr__(self, name: str) -> Any:
        """As every module's; asked for ``weight``, :class:`AttributeError` says why there is none."""
        if name == "weight":
            raise AttributeError(
                "QLinear is packed and has no weight; expected a tool that calls it, as the model does; what edits "
                "weights (resizing the vocabulary, merging adapters) needs the original model"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """As ``nn.Linear``, and the precision."""
        return f"in_features={self.in_features}, out_features={self.out_features}, precision={self.precision}"
