"""KL of packed models by the int8 digits of activations: what a digit is worth at each width of weights.

    python benchmarks/activations.py

Every routed expert is at one width (GPTQ); KL is from the original in float32. ``default`` is what mopeq does with
16-bit activations (docs/kernels.md). The interval is of the paired difference from all digits the kernel has.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import mopeq
from common import arguments, store
from mopeq.data.text import Window, read_texts, text_windows
from mopeq.evaluate import paired_difference
from mopeq.evaluate.divergence import judging
from mopeq.kernels import cpu
from mopeq.load import load_original, load_tokenizer
from mopeq.measure import Calibration
from mopeq.precision import Precision

WAYS: dict[str, tuple[torch.dtype, int | None]] = {
    "bfloat16, 3 digits": (torch.bfloat16, 3),
    "bfloat16, 2 digits": (torch.bfloat16, 2),
    "bfloat16, 1 digit": (torch.bfloat16, 1),
    "bfloat16, default": (torch.bfloat16, None),
    "float32, 3 digits": (torch.float32, 3),
}


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "", "activations")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True, help="calibration")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="held-out text")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--windows", type=int, default=48)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    tokenizer = load_tokenizer(asked.model)
    windows: list[Window] = []
    for path in asked.text:
        windows += text_windows(read_texts(path), tokenizer, 256, limit=asked.windows // len(asked.text))
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        original = load_original(asked.model, dtype=torch.float32)
        judge = stack.enter_context(judging(original, windows, cache=folder, batch_size=6))
        found = judge(load_original(asked.model, dtype=torch.bfloat16), "original")
        results["original in bfloat16"] = {"kl": found.divergence.kl.value}
        for bits in asked.bits:
            calibration = Calibration(data=asked.data, samples=64, length=256)
            at = folder / f"uniform-{bits}"
            mopeq.quantize(asked.model, at, uniform=Precision(bits, 128), calibration=calibration, evaluated=False)
            divergences = {}
            for name, (dtype, digits) in WAYS.items():
                one = dict.fromkeys(cpu.TYPES, (digits, 0))
                with mock.patch.object(cpu, "digits_of", (lambda t, d=None, o=one: o[t]) if digits else cpu.digits_of):
                    divergences[name] = judge(mopeq.load(at, dtype=dtype), f"{bits} bits, {name}").divergence
            first = divergences["bfloat16, 3 digits"]
            results[str(bits)] = {
                name: {"kl": d.kl.value, "more": _interval(d, first)} for name, d in divergences.items()
            }
            store(asked.out, results)


def _interval(found: Any, first: Any) -> list[float]:
    difference = paired_difference(found, first)
    return [difference.low, difference.high]


if __name__ == "__main__":
    main()
