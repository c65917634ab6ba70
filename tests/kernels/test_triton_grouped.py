"""The Triton kernel: against ``naive`` in Triton's interpreter on the CPU, and compiled for GPUs, which needs none.

The interpreter has to be asked for before Triton is imported, so the tests marked ``interpreted`` run in a process of
their own, which ``test_in_the_interpreter`` starts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_naive import error, flat, random_matrix

from mopeq.kernels import PackedGroup, naive, using
from mopeq.load import load
from mopeq.precision import FULL, Precision
from packing import pack_model
from tiny import save_tiny

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton has no build for this system")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs it")

MIXED = (
    Precision(2, 32), Precision(3, 32, True), Precision(4, 64), Precision(5, 128, True), Precision(6, 64, True),
    Precision(8, 32), Precision(3, -1), Precision(2, 128, True), FULL, Precision(5, 32), Precision(6, -1),
    Precision(8, 64, True), Precision(4, 128, True),
)  # fmt: skip
# the interpreter cuts off where it rounds to bfloat16, GPUs round to nearest
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2}


def test_in_the_interpreter() -> None:
    names = [name for name, test in globals().items() if interpreted.mark in getattr(test, "pytestmark", [])]
    asked = ["-o", "addopts=", "-p", "no:cacheprovider", "-k", " or ".join(names)]
    command = [sys.executable, "-m", "pytest", __file__, *asked]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout


def layer(shapes: tuple[tuple[int, int], ...]) -> PackedGroup:
    return flat([[random_matrix(s, p, 5 * e + i) for i, s in enumerate(shapes)] for e, p in enumerate(MIXED)])


def product(x: torch.Tensor, packed: PackedGroup, offsets: torch.Tensor) -> torch.Tensor:
    from mopeq.kernels import triton_grouped

    return triton_grouped.apply(x, triton_grouped.prepare(packed), offsets)


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_width_in_one_launch(dtype: torch.dtype) -> None:
    """Gate and up of unlike heights; none, one and more than a block of tokens; rows of no expert at both ends."""
    packed = layer(((72, 128), (24, 128)))
    counts = [1, 2, 0, 1, 3, 1, 0, 2, 1, 18, 1, 0, 2]
    offsets = torch.tensor([2, *counts]).cumsum(0)
    x = torch.randn(int(offsets[-1]) + 3, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, want = product(x, packed, offsets), naive.grouped_linear(x, packed, offsets)
    assert (got.shape, got.dtype) == (want.shape, dtype)
    assert error(got, want) < TOLERANCE[dtype]
    assert not got[:2].any()
    assert not got[offsets[-1] :].any()


@interpreted
@pytest.mark.parametrize("precision", [*(p for p in MIXED if p.group_size in (32, -1)), FULL], ids=str)
def test_inputs_that_fill_no_block(precision: Precision) -> None:
    inputs = 40 if precision.group_size == -1 else 96
    packed = flat([[random_matrix((8, inputs), precision, seed)] for seed in range(2)])
    x, offsets = torch.randn(5, inputs, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 0, 5])
    assert error(product(x, packed, offsets), naive.grouped_linear(x, packed, offsets)) < 1e-6


@interpreted
def test_more_rows_than_a_small_block() -> None:
    packed = flat([[random_matrix((16, 32), Precision(3, 32), seed)] for seed in range(2)])
    for total in (0, 1, 40, 150):
        x, offsets = torch.randn(total, 32), torch.tensor([0, total // 3, total])
        got, want = product(x, packed, offsets), naive.grouped_linear(x, packed, offsets)
        assert got.shape == want.shape
        assert total == 0 or error(got, want) < 1e-6


@interpreted
def test_a_packed_model_runs_through_it(tmp_path: Path) -> None:
    """Experts and linears of a model that transformers loads, asked for by ``MOPEQ_KERNEL``."""
    pack_model(save_tiny("olmoe", tmp_path / "original"), tmp_path / "packed")
    ids = torch.tensor([[3, 1, 4, 1]])
    with torch.no_grad():
        with using("naive"):
            want = load(tmp_path / "packed", torch.float32)(ids).logits
        with using("triton"):
            got = load(tmp_path / "packed", torch.float32)(ids).logits
    assert error(got, want) < 1e-5
    assert not torch.equal(got, want)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("capability", "dtype"), [(80, torch.float32), (80, torch.float16), (90, torch.bfloat16)])
def test_it_compiles_for_gpus(
    capability: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mopeq.kernels import triton_grouped

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = triton_grouped.compiled(capability, dtype)
    assert len(made.asm["cubin"]) > 1000
    assert ".local" not in made.asm["ptx"]  # no spills
    assert ("mma.sync" in made.asm["ptx"]) == (dtype != torch.float32)  # tensor cores, and plain products in float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    packed = layer(((72, 128), (24, 128)))
    offsets = torch.arange(len(MIXED) + 1) * 3
    x = torch.randn(int(offsets[-1]), 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    parts = [None if part is None else part.cuda() for part in (packed.qweight, packed.scales, packed.zeros)]
    there = PackedGroup(packed.layout, parts[0], parts[1], parts[2])
    assert error(product(x.cuda(), there, offsets.cuda()).cpu(), naive.grouped_linear(x, packed, offsets)) < 5e-3
