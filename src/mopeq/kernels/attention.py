"""One token through a layer's attention, with the norms and sums around it, in one call of the compiled kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from mopeq.errors import InputError
from mopeq.kernels.cpu import TYPES, Group, check, digits_of, group_of, library
from mopeq.kernels.layout import PackedGroup

__all__ = ["Attention", "Shape", "Stream"]

PROJECTIONS = ("q", "k", "v", "o")


class _Job(ctypes.Structure):
    """``mopeq_attention_job`` of csrc/mopeq_cpu.h."""

    _fields_ = (
        ("x", c_void_p), ("add", c_void_p), ("h", c_void_p), ("type", c_int64), ("hidden", c_int64),
        ("heads", c_int64), ("kv_heads", c_int64), ("size", c_int64), ("rotated", c_int64), ("eps", c_float),
        ("scale", c_float), ("norm_before", c_void_p), ("norm_after", c_void_p), ("q", Group), ("k", Group),
        ("v", Group), ("o", Group), ("q_bias", c_void_p), ("k_bias", c_void_p), ("v_bias", c_void_p),
        ("o_bias", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p), ("norm_heads", c_int64), ("cos", c_void_p),
        ("sin", c_void_p), ("keys", c_void_p), ("values", c_void_p), ("room", c_int64), ("position", c_int64),
        ("digits", c_int64), ("coarse", c_int64), ("threads", c_int64),
    )  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Heads of queries, heads of keys and values, numbers of a head, the factor of scores, and the norms' epsilon."""

    heads: int
    kv_heads: int
    size: int
    scale: float
    eps: float


class Stream:
    """What all layers share for one token: the sum that runs through them, in float32, and the rotation.

    x float32 (hidden,); h (1, 1, hidden) in the model's type, what the norm before the experts gives; cos and sin
    float32 (rotated,).
    """

    def __init__(self, hidden: int, rotated: int, dtype: torch.dtype) -> None:
        self.x = torch.zeros(hidden)
        self.h = torch.zeros(1, 1, hidden, dtype=dtype)
        self.cos, self.sin = torch.zeros(rotated), torch.zeros(rotated)


class Attention:
    """A layer's attention for one sequence, ready to be called token after token.

    groups: ``q``, ``k``, ``v``, ``o``, each one matrix in panels. vectors: ``norm_before`` and ``norm_after``
    (hidden,), and where there are any ``q_bias``, ``k_bias``, ``v_bias``, ``o_bias``, and ``q_norm`` with ``k_norm``,
    of one head or of all together. keys, values: (1, kv_heads, room, size) in the model's type, written in place.
    """

    def __init__(
        self, stream: Stream, shape: Shape, groups: Mapping[str, PackedGroup], vectors: Mapping[str, Tensor],
        keys: Tensor, values: Tensor,
    ) -> None:  # fmt: skip
        hidden, dtype, (q, kv) = len(stream.x), stream.h.dtype, (shape.heads * shape.size, shape.kv_heads * shape.size)
        wide = {name: vector.detach().float().contiguous() for name, vector in vectors.items()}
        per_head = "q_norm" in wide and len(wide["q_norm"]) == shape.size
        lengths = {"norm_before": hidden, "norm_after": hidden, "q_bias": q, "k_bias": kv, "v_bias": kv,
                   "o_bias": hidden, "q_norm": shape.size if per_head else q,
                   "k_norm": shape.size if per_head else kv}  # fmt: skip
        for name, vector in wide.items():
            if tuple(vector.shape) != (lengths[name],):
                raise InputError(f"attention got {name} {list(vector.shape)}; expected [{lengths[name]}]")
        for cache in (keys, values):
            if cache.dtype != dtype or not cache.is_contiguous() or cache.shape != (1, shape.kv_heads, *keys.shape[2:]):
                raise InputError(
                    f"attention got a cache {cache.dtype} {list(cache.shape)}; expected contiguous {dtype} "
                    f"[1, {shape.kv_heads}, room, {shape.size}]"
                )
        if keys.shape[3] != shape.size or any(g.form != "panels" for g in groups.values()):
            raise InputError(
                f"attention got keys {list(keys.shape)} and matrices in {[g.form for g in groups.values()]} form; "
                f"expected heads of {shape.size} and panels"
            )
        self._kept = (stream, groups, wide, keys, values)  # what the job points to
        digits, coarse = digits_of(dtype)
        self._job = _Job(
            x=stream.x.data_ptr(), h=stream.h.data_ptr(), type=TYPES[dtype], hidden=hidden, heads=shape.heads,
            kv_heads=shape.kv_heads, size=shape.size, rotated=len(stream.cos), eps=shape.eps, scale=shape.scale,
            norm_heads=per_head, cos=stream.cos.data_ptr(), sin=stream.sin.data_ptr(), keys=keys.data_ptr(),
            values=values.data_ptr(), room=keys.shape[2], digits=digits, coarse=coarse,
            **{name: vector.data_ptr() for name, vector in wide.items()},
            **{n: group_of(g.qweight, g.scales, g.zeros, g.layout.table) for n, g in groups.items()},
        )  # fmt: skip
        self._call = library().mopeq_attention

    def __call__(self, add: Tensor | None, position: int) -> Tensor:
        """Add ``add`` (..., hidden) to the stream, then this layer's attention at ``position``; the stream's ``h``."""
        stream, job = self._kept[0], self._job
        if add is not None and (add.dtype != stream.h.dtype or not add.is_contiguous() or add.numel() != len(stream.x)):
            raise InputError(f"attention got {add.dtype} {list(add.shape)} to add; expected {stream.h.dtype}")
        job.add, job.position, job.threads = None if add is None else add.data_ptr(), position, torch.get_num_threads()
        check(self._call(ctypes.byref(job)))
        return stream.h
