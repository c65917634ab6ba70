"""One token through a router and the experts it chooses, in one call of the compiled kernel."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from mopeq.errors import InputError
from mopeq.kernels.attention import Stream
from mopeq.kernels.cpu import TYPES, ExpertsJob, check, digits_of, group_of, library
from mopeq.kernels.layout import PackedGroup
from mopeq.seam import Gate

__all__ = ["Moe", "Router"]


class _Job(ctypes.Structure):
    """``mopeq_moe_job`` of csrc/mopeq_cpu.h."""

    _fields_ = (
        ("experts", ExpertsJob), ("router", c_void_p), ("router_type", c_int64), ("normalized", c_int64),
        ("rounded", c_int64),
    )  # fmt: skip


@dataclass(frozen=True)
class Router:
    """Softmax over ``weight`` (experts, hidden) times x, and its ``k`` largest as weights.

    ``normalized`` divides the weights by their sum, ``rounded`` rounds them to the type of x.
    """

    weight: Tensor
    k: int
    normalized: bool
    rounded: bool


class Moe:
    """A layer's router and experts for one token, ready to be called token after token.

    gate_up, down: the experts' matrices in panels. What it reads is the stream's ``h``.
    """

    def __init__(self, stream: Stream, router: Router, gate_up: PackedGroup, down: PackedGroup, gate: Gate) -> None:
        hidden, dtype = len(stream.x), stream.h.dtype
        if gate_up.form != "panels" or down.form != "panels":
            raise InputError(f"experts got matrices in {gate_up.form} and {down.form} form; expected panels")
        if tuple(router.weight.shape) != (down.experts, hidden):
            raise InputError(f"a router got weights {list(router.weight.shape)}; expected [{down.experts}, {hidden}]")
        weight = router.weight.detach().contiguous()
        if weight.dtype != torch.bfloat16:
            weight = weight.float()
        self._out = torch.empty_like(stream.h)
        self._kept = (stream, weight, gate_up, down)  # what the job points to
        groups = {
            name: group_of(g.qweight, g.scales, g.zeros, g.layout.table)
            for name, g in (("gate_up", gate_up), ("down", down))
        }
        digits, coarse = digits_of(dtype)
        self._job = _Job(
            experts=ExpertsJob(
                x=stream.h.data_ptr(), tokens=1, hidden=hidden, x_type=TYPES[dtype], k=router.k, alpha=gate.alpha,
                limit=gate.limit, shift=gate.shift, out=self._out.data_ptr(), digits=digits, coarse=coarse, **groups,
            ),
            router=weight.data_ptr(), router_type=TYPES[weight.dtype], normalized=router.normalized,
            rounded=router.rounded,
        )  # fmt: skip
        self._call = library().mopeq_moe

    def __call__(self) -> Tensor:
        """Output (1, 1, hidden) for the stream's ``h``; the next call writes into the same place."""
        self._job.experts.threads = torch.get_num_threads()
        check(self._call(ctypes.byref(self._job)))
        return self._out
