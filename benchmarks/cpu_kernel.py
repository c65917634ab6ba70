"""Packed bytes a second of the CPU kernel beside a plain read of the same memory, on the experts of OLMoE-1B-7B.

    python benchmarks/cpu_kernel.py --threads 1 2 --rounds 15

One layer has 64 experts of 2048 inputs and 1024 hidden units, of which a token uses 8. Every call takes 8 experts drawn
anew; the working set is far larger than caches. Memory speed of a shared machine drifts by a third within minutes, so
everything is measured in turns, and what counts is the ratio to the read beside it: ``share`` is the median of calls,
``of best`` the best call to the best read, which a busy machine disturbs least. A layer is two calls of the operator,
the gate function between them, and the activations' split into digits. Codes are random bytes: speed does not depend on
them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mopeq.kernels import GroupLayout, PackedGroup, cpu, naive
from mopeq.precision import Precision

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
    """The experts of a layer, and the bytes that one call touches."""

    def __init__(self, precisions: tuple[Precision, ...], seed: int) -> None:
        self.groups = {name: random_group(precisions, shapes, seed) for name, shapes in SHAPES.items()}
        self.bytes = [sum(p.nbytes(out, inp) for shapes in SHAPES.values() for out, inp in shapes) for p in precisions]

    def run(self, kernel: Callable[..., Tensor], x: Tensor, offsets: Tensor) -> None:
        """Rows ``x`` (rows, hidden) through gate and up, the gate function, and down."""
        gate, up = kernel(x, self.groups["gate_up"], offsets).chunk(2, -1)
        kernel(torch.nn.functional.silu(gate) * up, self.groups["down"], offsets)


def route(tokens: int, draw: random.Random) -> tuple[Tensor, list[int]]:
    """Offsets of ``tokens`` tokens' ``TOP`` experts each, and the experts that have any."""
    counts = [0] * EXPERTS
    for _ in range(tokens):
        for e in draw.sample(range(EXPERTS), TOP):
            counts[e] += 1
    return torch.tensor([0, *counts]).cumsum(0), [e for e, n in enumerate(counts) if n]


def clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    layers: dict[str, list[Layer]], tokens: int, rounds: int, dtype: torch.dtype, digits: int | None
) -> dict[str, dict[str, float]]:
    """Median GB/s of each kind of layer and of a plain read of as many bytes, in turns; and milliseconds a layer."""
    draw = random.Random(0)
    lib = cpu.library()
    rates: dict[str, list[tuple[float, float, float]]] = {name: [] for name in layers}

    def kernel(x: Tensor, packed: PackedGroup, offsets: Tensor) -> Tensor:
        return cpu.grouped_linear(x, packed, offsets, digits)

    for turn in range(-2, rounds):
        for name, copies in layers.items():
            for layer in copies * 2:
                offsets, used = route(tokens, draw)
                x = torch.randn(int(offsets[-1]), HIDDEN).to(dtype)
                start = time.perf_counter()
                layer.run(kernel, x, offsets)
                took = time.perf_counter() - start
                size = sum(layer.bytes[e] for e in used)
                other = draw.choice(copies).groups["gate_up"].qweight
                span = min(size, other.numel()) // 64 * 64
                begin = draw.randrange(0, other.numel() - span + 1) // 64 * 64
                start = time.perf_counter()
                lib.mopeq_read(other.data_ptr() + begin, span, torch.get_num_threads())
                read = time.perf_counter() - start
                if turn >= 0:
                    rates[name].append((size / took / 1e9, span / read / 1e9, took * 1e3))
    result = {}
    for name, row in rates.items():
        got, ceiling, ms = zip(*row, strict=True)
        result[name] = {
            "GB/s": statistics.median(got),
            "read GB/s": statistics.median(ceiling),
            "share": statistics.median(g / c for g, c in zip(got, ceiling, strict=True)),
            "best share": max(got) / max(ceiling),
            "ms": statistics.median(ms),
            "best ms": min(ms),
        }
    return result


def peers(dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of a layer at batch 1 with the reference kernel (3 bits) and with dense bfloat16 matrices."""
    plain = {
        k: PackedGroup(g.layout, g.qweight, g.scales, g.zeros) for k, g in Layer((Precision(3),) * 16, 1).groups.items()
    }
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1], help="tokens in a batch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--copies", type=int, default=2, help="layers of each kind, so that caches do not hold them")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--digits", type=int, choices=(1, 2, 3), help="int8 digits of an activation; by default the type's"
    )
    parser.add_argument("--only", nargs="+", help="these kinds of layers, such as 2 bits, 2g128c, mixed")
    parser.add_argument("--peers", action="store_true", help="the reference kernel and torch bfloat16 too")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    kinds = {f"{b} bits": (Precision(b),) * EXPERTS for b in (2, 3, 4, 8)}
    draw = random.Random(1)
    kinds["2g128c"] = (Precision(2, codebook=True),) * EXPERTS
    kinds["mixed"] = tuple(Precision(draw.choice((2, 3, 4, 8))) for _ in range(EXPERTS))
    layers = {
        name: [Layer(p, seed) for seed in range(args.copies)]
        for name, p in kinds.items()
        if name in (args.only or kinds)
    }
    found: dict[str, object] = {"isa": cpu.isa(), "dtype": args.dtype}
    print(f"instruction set {cpu.isa()}, {args.dtype} activations, digits {args.digits or cpu.DIGITS[dtype]}")
    with torch.no_grad():
        for threads in args.threads:
            torch.set_num_threads(threads)
            for tokens in args.tokens:
                print(f"\n{threads} threads, {tokens} tokens      GB/s    read   share  of best   ms a layer    best")
                rows = measure(layers, tokens, args.rounds, dtype, args.digits)
                for name, row in rows.items():
                    print(
                        f"{name:24s} {row['GB/s']:7.1f} {row['read GB/s']:7.1f} {row['share']:6.0%} "
                        f"{row['best share']:8.0%} {row['ms']:12.3f} {row['best ms']:7.3f}"
                    )
                found[f"{threads} threads, {tokens} tokens"] = rows
            if args.peers:
                found[f"{threads} threads, peers"] = others = peers(dtype)
                for name, ms in others.items():
                    print(f"{name:24s} {'':24s} {ms:9.3f}")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
