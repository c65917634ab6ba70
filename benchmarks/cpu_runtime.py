"""Whole-model decode and prefill of a random packed OLMoE-1B-7B on the CPU, beside a plain read of the same memory.

    python benchmarks/cpu_runtime.py --bits 3 2,3,4,8 --threads 1 2

For every width a checkpoint is written (3 GB at 3 bits), loaded, measured and deleted. A round takes, one after the
other, a plain read of the active bytes, decode by mopeq's loop with native steps, decode by the model's own passes,
transformers' ``generate``, and prefill; what counts is the ratio of medians within a run, because memory speed of a
shared machine drifts. ``busy`` is the processor time that was used over the time that passed: on a quiet machine about
the number of threads while decoding; far below it the machine was taken by others and the times say little. Processor
time is given beside, which other processes disturb less. ``benchmarks/cpu_kernel.py`` measures layers alone.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import mopeq
from common import arguments, store, table
from mopeq.evaluate.speed import process_bytes, resident_bytes
from mopeq.kernels import cpu
from mopeq.runtime import decode as decoding
from mopeq.runtime import packed_modules
from mopeq.runtime.experts import MixedExperts
from random_packed import OLMOE_1B_7B, write_random

NEW, PROMPT = 16, 64


def active_bytes(model: Any) -> int:
    """Bytes of weights that a token reads, routers and norms included, of the embedding one row."""
    packed = packed_modules(model)
    share = OLMOE_1B_7B["num_experts_per_tok"] / OLMOE_1B_7B["num_experts"]
    total = sum(
        sum(b.nbytes for b in m.buffers()) * (share if isinstance(m, MixedExperts) else 1) for m in packed.values()
    )
    rest = sum(p.nbytes for name, p in model.named_parameters() if "embed" not in name)
    return int(total + rest)


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds that passed, and seconds of processor."""
    began, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began, time.process_time() - used


def decoded(model: Any, prompt: torch.Tensor, *, native: bool) -> tuple[float, float]:
    """A token of decode, the prompt left out."""
    step_of = decoding.step_of if native else lambda *args: None
    with mock.patch.object(decoding, "step_of", step_of), mock.patch.dict(model.__dict__):
        if not native:
            model.__dict__.pop("forward", None)  # which takes steps too
        tokens = decoding.decode(model, prompt, NEW + 1, frozenset(), decoding.Sampling())
        next(tokens)
        passed, used = timed(lambda: list(tokens))
    return passed / NEW, used / NEW


def generated(model: Any, prompt: torch.Tensor) -> tuple[float, float]:
    """A token of transformers' generate: the difference of two lengths, so that the prompt cancels."""

    def run(count: int) -> tuple[float, float]:
        limits = {"max_new_tokens": count, "min_new_tokens": count}
        return timed(lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **limits))

    long, short = run(NEW + 1), run(1)
    return (long[0] - short[0]) / NEW, (long[1] - short[1]) / NEW


def read(model: Any, size: int) -> tuple[float, float]:
    """A plain read of as many bytes as a token's, from the experts' buffers of all layers: one of many, as of decode.

    A single one would mostly measure how threads and processor wake up after the benchmark has waited for others.
    """
    experts = [m for m in model.modules() if isinstance(m, MixedExperts)]
    buffers = [m.packed(name).qweight for m in experts for name in ("gate_up", "down")]
    each = size // len(buffers) // 64 * 64
    assert each + 64 <= min(b.numel() for b in buffers)  # else it would read less than it says

    def go() -> None:
        for b in buffers:
            cpu.library().mopeq_read((b.data_ptr() + 63) // 64 * 64, each, torch.get_num_threads())

    go()
    passed, used = timed(lambda: [go() for _ in range(NEW)])
    return passed / NEW, used / NEW


def measure(model: Any, rounds: int) -> dict[str, Any]:
    """Medians over rounds, of milliseconds and of processor milliseconds."""
    prompt = torch.randint(1000, 50000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    size = active_bytes(model)
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "read": lambda: read(model, size),
        "decode": lambda: decoded(model, prompt, native=True),
        "decode, model's passes": lambda: decoded(model, prompt, native=False),
        "transformers' generate": lambda: generated(model, prompt),
        "prefill": lambda: timed(lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1)),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with torch.no_grad():
        for number in range(rounds + 1):
            for name, way in ways.items():
                result = way()
                if number:  # the first round warms up
                    found[name].append(result)
    rows = {
        name: {
            "ms": 1e3 * statistics.median(r[0] for r in runs),
            "processor ms": 1e3 * statistics.median(r[1] for r in runs),
            "busy": sum(r[1] for r in runs) / sum(r[0] for r in runs),
        }
        for name, runs in found.items()
    }
    return {"active bytes": size, "prompt": PROMPT, "load average": os.getloadavg()[0], "rows": rows}


def main() -> None:
    parser = arguments(__doc__ or "", "cpu_runtime")
    parser.set_defaults(threads=[1, 2])
    next(a for a in parser._actions if a.dest == "threads").nargs = "+"
    parser.add_argument("--bits", nargs="+", default=["2", "3", "4", "8", "2,3,4,8"], help="widths of experts")
    parser.add_argument("--rest", type=int, default=4, help="width of attention and head")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints (default: the system's)")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for bits in args.bits:
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            written = write_random(Path(folder) / "packed", tuple(int(b) for b in bits.split(",")), args.rest)
            before = process_bytes() or 0
            torch.set_num_threads(max(args.threads))
            load = timed(lambda at=folder: results.__setitem__("model", mopeq.load(Path(at) / "packed")))
        model = results.pop("model")
        row = results[bits] = {
            "bytes": written, "load s": load[0], "load processor s": load[1], "model bytes": resident_bytes(model),
            "process grew by": (process_bytes() or 0) - before,
        }  # fmt: skip
        for threads in args.threads:
            torch.set_num_threads(threads)
            row[f"{threads} threads"] = made = measure(model, args.rounds)
            first = made["rows"]["read"]
            cells = [[n, f"{r['ms']:.1f}", f"{r['processor ms']:.1f}", f"{first['ms'] / r['ms']:.0%}",
                      f"{first['processor ms'] / r['processor ms']:.0%}", f"{r['busy']:.2f}"]
                     for n, r in made["rows"].items()]  # fmt: skip
            print(f"\n{bits} bits, {threads} threads, load average {made['load average']:.1f}, ", end="")
            print(f"{made['active bytes'] / 1e6:.0f} MB a token")
            print(table(["", "ms", "processor ms", "of the read", "of its processor time", "busy"], cells), flush=True)
            store(args.out, results)
        del model


if __name__ == "__main__":
    main()
