"""Packed bytes a second of the CPU kernel beside a plain read of the same memory, on the experts of OLMoE-1B-7B.

    python benchmarks/cpu_kernel.py --threads 1 2 --rounds 15

One layer has 64 experts of 2048 inputs and 1024 hidden units, of which a token uses 8. Every call takes experts drawn
anew; the working set is far larger than caches. ``kernel`` is the product of gate and up; ``layer`` is all that a
decode step does in a MoE layer: router, choice, gate and up, gate function, down, combination, in one native call (with
more than one token: the experts, without the router). Calls are prepared, as decoding prepares them. Memory speed of a
shared machine drifts by a third within minutes, so everything is measured in turns beside a read of as many bytes, and
what counts is the share, the ratio of medians. Codes are random bytes: speed does not depend on them.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from common import arguments, store, table
from mopeq.kernels import GroupLayout, PackedGroup, cpu, naive
from mopeq.kernels.attention import Stream
from mopeq.kernels.routing import Moe, Router
from mopeq.precision import Precision
from mopeq.seam import Gate

EXPERTS, TOP, HIDDEN, INNER = 64, 8, 2048, 1024
SHAPES = {"gate_up": ((INNER, HIDDEN),) * 2, "down": ((HIDDEN, INNER),)}


def random_group(precisions: tuple[Precision, ...], shapes: tuple[tuple[int, int], ...], seed: int) -> PackedGroup:
    """Random codes, zero points and small scales, said to be in panels."""
    layout = GroupLayout(precisions, shapes)
    draw = torch.Generator().manual_seed(seed)

    def fill(part: str) -> Tensor:
        return torch.randint(0, 256, (layout.size(part),), dtype=torch.uint8, generator=draw)

    scales = torch.full((layout.size("scales"),), 0.01, dtype=torch.float16)
    return PackedGroup(layout, fill("qweight"), scales, fill("zeros") if layout.size("zeros") else None, "panels")


class Layer:
    """The experts of a layer with a router, and the bytes of each expert."""

    def __init__(self, precisions: tuple[Precision, ...], seed: int, stream: Stream) -> None:
        self.groups = {name: random_group(precisions, shapes, seed) for name, shapes in SHAPES.items()}
        self.bytes = {
            name: [sum(p.nbytes(*shape) for shape in shapes) for p in precisions] for name, shapes in SHAPES.items()
        }
        weight = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()
        self.stream, self.router = stream, weight
        self.moe = Moe(stream, Router(weight, TOP, False, False), self.groups["gate_up"], self.groups["down"], Gate())

    def used(self, x: Tensor) -> Tensor:
        """Experts (tokens, TOP) of the largest scores."""
        return (x.float() @ self.router.float().T).topk(TOP).indices

    def kernel(self, x: Tensor) -> tuple[Callable[[], object], int]:
        """A prepared product of gate and up for the tokens' experts, and the bytes that it reads."""
        index, group = self.used(x), self.groups["gate_up"]
        counts = torch.bincount(index.reshape(-1), minlength=EXPERTS)
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        rows = x.repeat_interleave(TOP, 0).contiguous()
        out = torch.empty(len(rows), 2 * INNER, dtype=x.dtype)
        job = cpu._Job(
            x=rows.data_ptr(), rows=len(rows), inputs=HIDDEN, x_type=cpu.TYPES[x.dtype], offsets=offsets.data_ptr(),
            group=cpu.group_of(group.qweight, group.scales, group.zeros, group.layout.table), out=out.data_ptr(),
            out_features=2 * INNER, threads=torch.get_num_threads(), **cpu_digits(x.dtype),
        )  # fmt: skip
        kept, call, at = (rows, offsets, out, group), cpu.library().mopeq_grouped_linear, ctypes.byref(job)
        read = sum(self.bytes["gate_up"][e] for e in counts.nonzero().flatten().tolist())
        return lambda: (cpu.check(call(at)), kept), read

    def layer(self, x: Tensor) -> tuple[Callable[[], object], int]:
        """The whole layer for the tokens, and the bytes that it reads."""
        index = self.used(x)
        read = sum(self.bytes[name][e] for name in SHAPES for e in index.unique().tolist())
        if len(x) == 1 and x.dtype == self.stream.h.dtype:
            self.stream.h.copy_(x)
            return self.moe, read + self.router.nbytes
        weights, groups = torch.rand(len(x), TOP), (self.groups["gate_up"], self.groups["down"])
        return lambda: cpu.experts(x, index, weights, *groups, Gate()), read


def cpu_digits(dtype: torch.dtype) -> dict[str, int]:
    return dict(zip(("digits", "coarse"), cpu.digits_of(dtype), strict=True))


def clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    layers: dict[str, list[Layer]], tokens: int, rounds: int, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Medians of each kind of layer: GB/s of kernel, layer and a plain read of as many bytes, in turns."""
    draw = random.Random(0)
    rates: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for turn in range(-2, rounds):
        for name, copies in layers.items():
            for layer, (what, make) in itertools.product(copies, (("kernel", Layer.kernel), ("layer", Layer.layer))):
                call, size = make(layer, torch.randn(tokens, HIDDEN).to(dtype))
                took = clock(call)
                other = draw.choice(copies).groups["gate_up"].qweight
                span = min(size, other.numel()) // 64 * 64
                begin = other.data_ptr() + draw.randrange(0, other.numel() - span + 1) // 64 * 64
                read = clock(lambda at=begin, n=span: cpu.library().mopeq_read(at, n, torch.get_num_threads()))
                if turn >= 0:
                    rates.setdefault((name, what), []).append((size / took / 1e9, span / read / 1e9, took * 1e3))
    result: dict[str, dict[str, float]] = {}
    for (name, what), row in rates.items():
        got, ceiling, ms = (statistics.median(column) for column in zip(*row, strict=True))
        result.setdefault(name, {}).update(
            {f"{what} GB/s": got, f"{what} read GB/s": ceiling, f"{what} share": got / ceiling, f"{what} ms": ms}
        )
    return result


def peers(dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of a layer at batch 1 with the reference kernel (3 bits) and with dense bfloat16 matrices."""
    made = {name: random_group((Precision(3),) * 16, shapes, 1) for name, shapes in SHAPES.items()}
    plain = {k: PackedGroup(g.layout, g.qweight, g.scales, g.zeros) for k, g in made.items()}
    offsets = torch.arange(17).clamp(max=8)
    x = torch.randn(8, HIDDEN).to(dtype)
    dense = [(torch.randn(2 * INNER, HIDDEN).bfloat16(), torch.randn(HIDDEN, INNER).bfloat16()) for _ in range(24)]
    small = x.bfloat16()

    def bf16() -> None:
        for row, e in enumerate(random.sample(range(24), 8)):
            gate, up = torch.nn.functional.linear(small[row : row + 1], dense[e][0]).chunk(2, -1)
            torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, dense[e][1])

    def reference() -> None:
        gate, up = naive.grouped_linear(x, plain["gate_up"], offsets).chunk(2, -1)
        naive.grouped_linear(torch.nn.functional.silu(gate) * up, plain["down"], offsets)

    bf16()
    return {
        "naive, 3 bits": clock(reference) * 1e3,
        "torch bf16": statistics.median(clock(bf16) for _ in range(7)) * 1e3,
    }


def main() -> None:
    parser = arguments(__doc__ or "", "cpu_kernel")
    parser.set_defaults(threads=[1, 2])
    next(a for a in parser._actions if a.dest == "threads").nargs = "+"
    parser.add_argument("--tokens", type=int, nargs="+", default=[1], help="tokens in a batch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--copies", type=int, default=2, help="layers of each kind, so that caches do not hold them")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only", nargs="+", help="these kinds of layers, such as 2 2g128c")
    parser.add_argument("--peers", action="store_true", help="the reference kernel and torch bfloat16 too")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    kinds = {f"{b}": (Precision(b),) * EXPERTS for b in (2, 3, 4, 8)}
    draw = random.Random(1)
    for levels in ((2, 3, 4), (2, 3, 4, 8)):
        kinds[f"{', '.join(map(str, levels))} mixed"] = tuple(Precision(draw.choice(levels)) for _ in range(EXPERTS))
    kinds["2g128c"] = (Precision(2, codebook=True),) * EXPERTS
    kinds |= {f"{b}h": (Precision(b, hadamard=True),) * EXPERTS for b in (2, 3)}
    stream = Stream(HIDDEN, 64, dtype)
    layers = {name: [Layer(p, seed, stream) for seed in range(args.copies)]
              for name, p in kinds.items() if name in (args.only or kinds)}  # fmt: skip
    found: dict[str, Any] = {"isa": cpu.isa(), "dtype": args.dtype, "digits": cpu_digits(dtype), "rows": {}}
    with torch.no_grad():
        for threads in args.threads:
            torch.set_num_threads(threads)
            for tokens in args.tokens:
                found["rows"][f"{threads} threads, {tokens} tokens"] = measure(layers, tokens, args.rounds, dtype)
            if args.peers:
                found[f"{threads} threads, peers, ms a layer"] = peers(dtype)
    found["load average"] = os.getloadavg()[0]
    store(args.out, found)
    print(shares(found))


def shares(found: Mapping[str, Any]) -> str:
    """The table of docs/results.md."""
    rows = [
        [at, bits, *(f"{row[f'{what} share']:.0%} of {row[f'{what} read GB/s']:.1f}" for what in ("kernel", "layer")),
         f"{row['layer ms']:.3f}"]
        for at, kinds in found["rows"].items() for bits, row in kinds.items()
    ]  # fmt: skip
    return table(["", "bits", "kernel, share of a read in GB/s", "whole layer", "layer, ms"], rows)


if __name__ == "__main__":
    main()
