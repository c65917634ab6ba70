"""Experts by precision: the same products as ``naive``, and what is handed to humming, by humming's own checks."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from test_naive import error, flat, random_matrix
from torch import Tensor

from mopeq import native
from mopeq.errors import InputError
from mopeq.kernels import PackedGroup, choose, grouped_linear, humming_buckets, naive, using
from mopeq.kernels.buckets import Stack, buckets, by_bucket, stack
from mopeq.precision import FULL, Precision
from mopeq.qtensor import Codes, dequantize, unpack_bits

CUDA = torch.device("cuda")
MIXED = (
    Precision(4, 32), Precision(2, 64, True), Precision(3, 32), Precision(8, -1), Precision(4, 32),
    Precision(2, 64, True), Precision(6, 32, True), Precision(5, 128),
)  # fmt: skip


def layer(precisions: tuple[Precision, ...] = MIXED) -> PackedGroup:
    """Gate and up of 32 rows, 128 inputs."""
    return flat([[random_matrix((32, 128), p, 3 * e + i) for i in range(2)] for e, p in enumerate(precisions)])


def routed(counts: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows sorted by expert, two before the first and three behind the last that belong to none; and offsets."""
    offsets = torch.tensor([2, *counts]).cumsum(0)
    x = torch.randn(int(offsets[-1]) + 3, 128, generator=torch.Generator().manual_seed(1))
    return x.to(dtype), offsets


def dense(part: Stack) -> Tensor:
    """(experts, N, K)."""
    zeros = None if part.zeros is None else unpack_bits(part.zeros, part.precision.bits).transpose(1, 2)
    return dequantize(Codes(unpack_bits(part.qweight, part.precision.bits), part.scales, zeros, part.precision))


def multiplies(weights: Tensor) -> Callable[[Tensor, Tensor, Tensor], None]:
    """What a kernel of one precision does with its experts' rows."""

    def run(rows: Tensor, begins: Tensor, out: Tensor) -> None:
        for weight, begin, end in zip(weights, begins[:-1], begins[1:], strict=True):
            out[begin:end] = rows[begin:end] @ weight.to(rows.dtype).T

    return run


@pytest.mark.parametrize("counts", [[3, 1, 0, 4, 2, 2, 0, 5], [0, 0, 0, 7, 0, 0, 0, 0], [0] * 8], ids=str)
def test_buckets_give_the_products_of_naive(counts: list[int]) -> None:
    packed, (x, offsets) = layer(), routed(counts)
    found = buckets(packed.layout)
    assert [bucket.experts for bucket in found] == [(1, 5), (2,), (0, 4), (7,), (6,), (3,)]
    got = by_bucket(x, offsets, found, 64, [multiplies(dense(stack(packed, bucket))) for bucket in found])
    torch.testing.assert_close(got, naive.grouped_linear(x, packed, offsets))
    assert not got[:2].any()
    assert not got[-3:].any()


def words(stored: Tensor, bits: int) -> Tensor:
    """Codes (..., n) in 32-bit words (..., n*bits/32), as humming's pack_weight.cuh writes them: by numpy's bits."""
    raw = np.unpackbits(stored.contiguous().numpy().view(np.uint8), axis=-1, bitorder="little")
    return torch.from_numpy(raw.reshape(*raw.shape[:-1], -1, bits).astype(np.int64) @ (1 << np.arange(bits)))


@pytest.mark.skipif(find_spec("humming") is None, reason="humming-kernels has no build for this system")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_humming_gets_what_it_asks_for(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own schema checks shapes and types, its signature the calls; the GPU's part is a dense product here."""
    import humming.forward
    import humming.transform

    def transform(
        tensors: dict[str, Tensor], shape_n: int, shape_k: int, **named: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        schema, experts = named["weight_schema"], named["num_experts"]
        inspect.signature(original_transform).bind(tensors, shape_n, shape_k, **named)
        schema.validate_tensors(tensors, shape_n, shape_k, named["torch_dtype"], experts)
        bits = schema.b_dtype.num_bits
        zero: Any = 1 << (bits - 1)
        size = schema.weight_scale_group_size or shape_k
        if schema.has_zero_point:
            zero = words(tensors["zero_point"].transpose(1, 2), bits).transpose(1, 2).repeat_interleave(size, -1)
        scales = tensors["weight_scale"].float().repeat_interleave(size, -1)
        return "config", {"weight": (words(tensors["weight"], bits) - zero) * scales, "weight_scale": scales}

    def forward(config: Any, **named: Any) -> None:
        inspect.signature(original_forward).bind(config, **named)
        assert json.loads(named["compute_config"]) == {"gemm_type": "grouped_contiguous"}
        assert named["locks"].dtype == torch.int32
        assert named["valid_shape_m"] > 0
        multiplies(named["weight"])(named["inputs"], named["expert_layout"], named["outputs"])

    original_transform = humming.transform.prepare_and_transform_humming_tensors
    original_forward = humming.forward.humming_forward
    monkeypatch.setattr(humming.transform, "prepare_and_transform_humming_tensors", transform)
    monkeypatch.setattr(humming.forward, "humming_forward", forward)
    packed, (x, offsets) = layer(), routed([3, 1, 0, 4, 2, 2, 0, 5], dtype)
    got = humming_buckets.apply(x, humming_buckets.prepare(packed, dtype), offsets)
    # scales are rounded to the activations' type, then weights
    assert error(got, naive.grouped_linear(x, packed, offsets)) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_a_kernel_that_cannot_run_is_refused() -> None:
    packed, (x, offsets) = layer(), routed([1] * 8)
    with using("humming"), pytest.raises(InputError, match="humming runs on NVIDIA GPUs, not on cpu"):
        grouped_linear(x, packed, offsets)
    with using("triton"), pytest.raises(InputError, match="Triton kernel runs on CUDA devices, not on cpu"):
        grouped_linear(x, packed, offsets)


@pytest.mark.parametrize(
    ("precisions", "dtype", "words"),
    [
        ((Precision(3, 32), FULL), torch.float16, "no 16-bit weights"),
        (MIXED, torch.float32, "takes float16 and bfloat16"),
        (MIXED, torch.float16, None),
    ],
)
def test_what_humming_takes(
    precisions: tuple[Precision, ...], dtype: torch.dtype, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = layer(precisions)
    with using("humming"):
        monkeypatch.setattr(humming_buckets, "find_spec", lambda name: None)
        with pytest.raises(InputError, match="humming-kernels is not installed"):
            choose(packed.layout, CUDA, dtype)
        monkeypatch.setattr(humming_buckets, "find_spec", lambda name: name)
        if words is None:
            assert choose(packed.layout, CUDA, dtype).name == "humming"
        else:
            with pytest.raises(InputError, match=words):
                choose(packed.layout, CUDA, dtype)


def test_what_runs_on_a_cuda_device(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from mopeq.kernels import interface, select

    layout = layer().layout
    monkeypatch.setattr(interface, "_has_triton", lambda: True)
    assert choose(layout, CUDA, torch.bfloat16).name == "triton"
    with using("naive"):
        assert choose(layout, CUDA, torch.bfloat16).name == "naive"
    monkeypatch.setattr(interface, "_has_triton", lambda: False)
    select._say_once.cache_clear()
    assert choose(layout, CUDA, torch.bfloat16).name == "naive"
    assert "the package triton is not installed" in caplog.text


def test_what_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, odd = layer().layout, flat([[random_matrix((8, 40), Precision(3, -1))]]).layout
    here = torch.device("cpu")
    with using("auto") as found:
        assert choose(layout, here, torch.float32).name == found.name
    assert choose(odd, here, torch.float32).name == "naive"  # 40 inputs have no panels
    with using("naive"):
        assert choose(layout, here, torch.float32).name == "naive"
    monkeypatch.setattr(native, "_open", lambda: (None, "it was not built"))
    monkeypatch.setenv("MOPEQ_KERNEL", "cpu")
    with pytest.raises(InputError, match="it was not built"):
        choose(layout, here, torch.float32)
