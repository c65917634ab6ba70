"""What sharing work between options saves: moments, factors and codes of a few experts at OLMoE-1B-7B's shapes.

``apart`` quantizes from moments at every option for the costs, makes the moments again, and quantizes at one option
for the checkpoint. ``shared`` makes the moments once, factorizes once and quantizes once at every option. Both give
the same codes, which is checked. Processor seconds of this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import arguments, store
from mopeq.precision import Precision
from mopeq.qtensor import Codes
from mopeq.quantizers import gptq, once

OPTIONS = [Precision(bits, 128) for bits in (2, 3, 4, 5, 6)]
SHAPES = {"gate_up": (2048, 2048), "down": (2048, 1024)}


def summed(inputs: Tensor) -> Tensor:
    """Moments (experts, in, in) of inputs (experts, tokens, in)."""
    return torch.stack([x.T @ x for x in inputs])


def apart(weight: Tensor, inputs: Tensor) -> list[Codes]:
    """Costs and packing each on their own."""
    moments = summed(inputs)
    codes = [gptq(weight, precision, moments) for precision in OPTIONS]
    gptq(weight, OPTIONS[1], summed(inputs))
    return codes


def shared(weight: Tensor, inputs: Tensor) -> list[Codes]:
    """Everything once."""
    factors = once(gptq, summed(inputs))
    return [gptq(weight, precision, factors) for precision in OPTIONS]


def timed(work: Callable[[Tensor, Tensor], list[Codes]], weight: Tensor, inputs: Tensor) -> tuple[list[Codes], float]:
    """What was made, and the processor seconds that it took."""
    started = time.process_time()
    made = work(weight, inputs)
    return made, time.process_time() - started


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "", "economy")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each expert")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    draw = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name, (out, inp) in SHAPES.items():
        weight = torch.randn(asked.experts, out, inp, generator=draw)
        inputs = torch.randn(asked.experts, asked.tokens, inp, generator=draw)
        (first, before), (second, after) = (timed(work, weight, inputs) for work in (apart, shared))
        same = all(
            torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)
            for a, b in zip(first, second, strict=True)
        )
        if not same:
            raise RuntimeError(f"{name}: shared factors give other codes")
        rows.append({"group": name, "shape": [out, inp], "apart": round(before, 2), "shared": round(after, 2),
                     "times": round(before / after, 2)})  # fmt: skip
        print(rows[-1], flush=True)
    store(
        asked.out, {"experts": asked.experts, "tokens": asked.tokens, "options": list(map(str, OPTIONS)), "rows": rows}
    )


if __name__ == "__main__":
    main()
