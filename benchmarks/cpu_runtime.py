"""Whole-model decode and prefill of a random packed OLMoE-1B-7B on the CPU, beside a plain read of the same memory.

    python benchmarks/cpu_runtime.py --bits 3 2,3,4,8 --threads 1 2
    python benchmarks/cpu_runtime.py --model deepseek-vl2-tiny -o benchmarks/results/cpu_runtime_vl2.json
    python benchmarks/cpu_runtime.py --bits 3 --peers torch-bfloat16 torchao-int4 --environment ENV -o FILE

For every width a checkpoint is written (3 GB at 3 bits), loaded and measured. A round takes, one after the
other, a plain read of the active bytes, decode by mopeq's loop, with native steps where the family has them, decode by
the model's own passes, transformers' ``generate``, and prefill; all of text alone. With ``--peers`` it takes the plain
read, mopeq and one peer, the same architecture in another process (``runtime_worker.py``), of which one at a time is in
memory: 14 GB for an OLMoE-1B-7B in bfloat16. Widths and peers that are in the results file stay as they are there, so
that a long run can be made in pieces. What counts is the ratio of medians within a run, because memory speed of a
shared machine drifts. ``busy`` is the processor time that was used over the time that passed: on a quiet machine about
the number of threads while decoding; far below it the machine was taken by others and the times say little. Processor
time is given beside, which other processes disturb less. ``benchmarks/cpu_kernel.py`` measures layers alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from mopeq.runtime.step import step_of
from random_packed import CONFIGS, cut, write, write_random

NEW, PROMPT = 16, 64
IMAGES = ("vision", "projector")
"""Modules that text does not pass."""


def active_bytes(model: Any) -> int:
    """Bytes of weights that a token of text reads, routers and norms included, of the embedding one row."""
    config = model.config.get_text_config()
    share = config.num_experts_per_tok / (getattr(config, "num_experts", None) or config.n_routed_experts)
    total = sum(
        sum(b.nbytes for b in m.buffers()) * (share if isinstance(m, MixedExperts) else 1)
        for m in packed_modules(model).values()
    )
    rest = [p.nbytes for name, p in model.named_parameters() if "embed" not in name and not name.startswith(IMAGES)]
    return int(total + sum(rest))


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


def prefilled(model: Any, prompt: torch.Tensor) -> tuple[float, float]:
    """The whole prompt."""
    return timed(lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1))


class Peer:
    """The process of a peer, which takes turns."""

    def __init__(self, words: list[str], threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.told = self._line()

    def turn(self, what: str) -> tuple[float, float]:
        """Seconds that passed and seconds of processor of ``decode``, a token, or of ``prefill``."""
        assert self.process.stdin is not None
        print(what, torch.get_num_threads(), file=self.process.stdin, flush=True)
        found = self._line()
        return found["passed"], found["used"]

    def _line(self) -> dict[str, Any]:
        """What it says next; RuntimeError with its last words where it has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        words = self.process.communicate()[1].strip().splitlines()
        raise RuntimeError(words[-1] if words else f"ended with {self.process.returncode}")


@contextmanager
def peer_of(name: str, environment: Path, config: dict[str, Any], threads: int) -> Iterator[Peer]:
    """A peer with a model of these sizes."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "original", config, torch.bfloat16, seed=None)
        worker = Path(__file__).with_name("runtime_worker.py")
        words = [str(environment.absolute() / "bin" / "python"), str(worker), name, str(Path(folder) / "original")]
        peer = Peer(words, threads)
    try:
        yield peer
    finally:
        peer.process.kill()
        peer.process.wait()


def prompt_of() -> torch.Tensor:
    """The same tokens for everybody."""
    return torch.randint(1000, 50000, (1, PROMPT), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def measure(model: Any, rounds: int, peer: Peer | None = None) -> dict[str, Any]:
    """Medians over rounds, of milliseconds and of processor milliseconds."""
    prompt, size = prompt_of(), active_bytes(model)
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "read": lambda: read(model, size),
        "decode": lambda: decoded(model, prompt, native=True),
        "decode, model's passes": lambda: decoded(model, prompt, native=False),
        "transformers' generate": lambda: generated(model, prompt),
        "prefill": lambda: prefilled(model, prompt),
    }
    if step_of(model, decoding._cache(model, 1)) is None:
        ways.pop("decode, model's passes")  # which decoding by mopeq's loop is too
    if peer:
        ways = {name: ways[name] for name in ("read", "decode", "prefill")}
        ways |= {"peer's decode": lambda: peer.turn("decode"), "peer's prefill": lambda: peer.turn("prefill")}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
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


def shown(what: str, made: dict[str, Any]) -> None:
    """Print what was measured."""
    first = made["rows"]["read"]
    cells = [[n, f"{r['ms']:.1f}", f"{r['processor ms']:.1f}", f"{first['ms'] / r['ms']:.0%}",
              f"{first['processor ms'] / r['processor ms']:.0%}", f"{r['busy']:.2f}"]
             for n, r in made["rows"].items()]  # fmt: skip
    print(f"\n{what}, load average {made['load average']:.1f}, {made['active bytes'] / 1e6:.0f} MB a token")
    print(table(["", "ms", "processor ms", "of the read", "of its processor time", "busy"], cells), flush=True)


def beside(model: Any, name: str, args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """One peer and mopeq in turns; a peer that fails is stored with its last words."""
    row: dict[str, Any] = {}
    try:
        with peer_of(name, args.environment, config, max(args.threads)) as peer:
            row |= peer.told
            for threads in args.threads:
                torch.set_num_threads(threads)
                row[f"{threads} threads"] = made = measure(model, args.rounds, peer)
                shown(f"{name}, {threads} threads, {row['active bytes'] / 1e6:.0f} MB a token; beside it mopeq", made)
    except RuntimeError as error:
        row["failed"] = str(error)
        print(f"{name}: {error}")
    return row


def main() -> None:
    parser = arguments(__doc__ or "", "cpu_runtime")
    parser.set_defaults(threads=[1, 2])
    next(a for a in parser._actions if a.dest == "threads").nargs = "+"
    parser.add_argument("--model", default="olmoe-1b-7b", choices=CONFIGS, help="whose sizes")
    parser.add_argument("--layers", type=int, help="the first layers only")
    parser.add_argument("--bits", nargs="+", default=["2", "3", "4", "8", "2,3,4,8"], help="widths of experts")
    parser.add_argument("--rest", type=int, default=4, help="width of linears outside experts, and of the head")
    parser.add_argument("--peers", nargs="+", default=[], help="names of runtime_worker.py")
    parser.add_argument("--environment", type=Path, help="a virtual environment with mopeq and the peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--scratch", type=Path, help="folder of checkpoints, which stay (default: the system's, and deleted)"
    )
    args = parser.parse_args()
    if args.peers and not args.environment:
        parser.error("--peers: say with --environment where they are installed")
    config = CONFIGS[args.model] if args.layers is None else cut(CONFIGS[args.model], args.layers)
    head = {"model": args.model, "layers": args.layers, "rest": args.rest}
    stored: dict[str, Any] = json.loads(args.out.read_text())["results"] if args.out.exists() else {}
    results: dict[str, Any] = stored if all(stored.get(k) == v for k, v in head.items()) else {**head, "runs": {}}
    for bits in args.bits:
        row = results["runs"].setdefault(bits, {})
        peers = [name for name in args.peers if name not in row.get("peers", {})]
        own = [n for n in args.threads if f"{n} threads" not in row] if not args.peers else []
        if not peers and not own:
            continue
        with tempfile.TemporaryDirectory() as folder:
            packed = (args.scratch or Path(folder)) / f"{args.model}-{args.layers or 'all'}-{bits}-{args.rest}"
            if not packed.exists():
                write_random(packed, tuple(int(b) for b in bits.split(",")), args.rest, config=config)
            row["bytes"] = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
            before = process_bytes() or 0
            torch.set_num_threads(max(args.threads))
            held: dict[str, Any] = {}
            load = timed(lambda at=packed, to=held: to.update(model=mopeq.load(at)))
        model = held.pop("model")
        row |= {"load s": load[0], "load processor s": load[1], "model bytes": resident_bytes(model),
                "process grew by": (process_bytes() or 0) - before}  # fmt: skip
        for threads in own:
            torch.set_num_threads(threads)
            row[f"{threads} threads"] = made = measure(model, args.rounds)
            shown(f"{bits} bits, {threads} threads", made)
            store(args.out, results)
        for name in peers:
            row.setdefault("peers", {})[name] = beside(model, name, args, config)
            store(args.out, results)
        del model


if __name__ == "__main__":
    main()
