"""Humming's grouped product (humming-kernels 0.1.19) on NVIDIA GPUs: a call for each precision of a layer.

Its codes and zero points are bit strings like those of docs/format.md, so they are handed over as they are, in words of
32 bits; its own ``prepare_and_transform_humming_tensors`` puts them into the order that its kernels want, which is a
copy. Scales become the activations' type. Written against the package's source; no GPU has run it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mopeq.kernels.buckets import Bucket, Stack, buckets, by_bucket, stack
from mopeq.kernels.layout import GroupLayout, PackedGroup
from mopeq.precision import Precision

__all__ = ["Prepared", "apply", "handed_over", "prepare", "why_not"]

LOCKS = 2048
"""Words that blocks of one product wait on; as many as the package's own layer has."""


def why_not(layout: GroupLayout, device: torch.device, dtype: torch.dtype) -> str:
    """Why it does not take these experts there; empty where it does."""
    if device.type != "cuda":
        return f"humming runs on NVIDIA GPUs, not on {device.type}"
    if find_spec("humming") is None:
        return "the package humming-kernels is not installed"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"humming takes float16 and bfloat16, not {dtype}"
    if any(p.bits == 16 for p in layout.precisions):
        return "humming has no 16-bit weights, and some experts are at 16 bits"
    if layout.left_out is not None:
        return "humming wants every expert to be there, and some are left out"
    if layout.has_codebooks:
        return "humming has no codebooks of two weights, and some experts have one"
    if layout.is_rotated:
        return "humming does not rotate inputs, and some experts want it"
    rows, inputs = sum(out for out, _ in layout.shapes), layout.shapes[0][1]
    if rows % 64 or inputs % 32:
        return f"humming wants rows in multiples of 64 and inputs in multiples of 32, not {rows} x {inputs}"
    return ""


def handed_over(part: Stack, dtype: torch.dtype) -> dict[str, Tensor]:
    """A bucket under humming's names: ``weight`` int32 (experts, N, K*bits/32), ``weight_scale`` (experts, N, G),

    ``zero_point`` int32 (experts, N*bits/32, G) where there are zero points.
    """
    tensors = {"weight": part.qweight.view(torch.int32), "weight_scale": part.scales.to(dtype)}
    if part.zeros is not None:
        tensors["zero_point"] = part.zeros.view(torch.int32).transpose(1, 2).contiguous()
    return tensors


@dataclass(frozen=True)
class Prepared:
    """A layer's buckets, each with humming's configuration and tensors. columns: rows of an expert's matrices."""

    found: tuple[Bucket, ...]
    configs: tuple[Any, ...]
    tensors: tuple[dict[str, Tensor], ...]
    locks: Tensor
    columns: int


def prepare(packed: PackedGroup, dtype: torch.dtype) -> Prepared:
    """Copies of the weights in humming's order, for activations of ``dtype``."""
    from humming.transform import prepare_and_transform_humming_tensors

    found, device, columns = buckets(packed.layout), packed.qweight.device, packed.out_features
    made = [
        prepare_and_transform_humming_tensors(
            handed_over(stack(packed, bucket), dtype), shape_n=columns, shape_k=packed.layout.shapes[0][1],
            weight_schema=_schema(bucket.precision, dtype), num_experts=len(bucket.experts), torch_dtype=dtype,
            device=device,
        )
        for bucket in found
    ]  # fmt: skip
    locks = torch.zeros(LOCKS, dtype=torch.int32, device=device)
    return Prepared(found, tuple(c for c, _ in made), tuple(t for _, t in made), locks, columns)


def _schema(precision: Precision, dtype: torch.dtype) -> Any:
    from humming.dtypes import DataType
    from humming.schema import HummingWeightSchema

    return HummingWeightSchema(
        b_dtype=DataType.from_str(f"uint{precision.bits}"), bs_dtype=DataType.from_torch_dtype(dtype),
        weight_scale_group_size=max(precision.group_size, 0), has_zero_point=not precision.symmetric,
    )  # fmt: skip


def apply(x: Tensor, prepared: Prepared, offsets: Tensor) -> Tensor:
    """As :mod:`mopeq.kernels` says, without gradients."""
    from humming.forward import humming_forward

    if not len(x):
        return x.new_zeros(0, prepared.columns)
    everyone = sum(len(bucket.experts) for bucket in prepared.found)

    def product(bucket: Bucket, config: Any, tensors: dict[str, Tensor]) -> Any:
        expected = -(-len(x) * len(bucket.experts) // everyone)  # rows, by which humming chooses its blocks

        def run(rows: Tensor, begins: Tensor, out: Tensor) -> None:
            humming_forward(
                config, inputs=rows, outputs=out, expert_layout=begins, locks=prepared.locks, valid_shape_m=expected,
                compute_config=json.dumps({"gemm_type": "grouped_contiguous"}), **tensors,
            )  # fmt: skip

        return run

    calls = [product(*each) for each in zip(prepared.found, prepared.configs, prepared.tensors, strict=True)]
    return by_bucket(x.contiguous(), offsets, prepared.found, prepared.columns, calls)
