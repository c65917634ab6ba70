"""Where the time of quantizing an expert of OLMoE-1B-7B goes, and how far that is from what its arithmetic must take.

Processor seconds on one thread, so that other processes do not count. The floor is the fewest operations that the
method needs (symmetric sums and triangular factors counted once) at the rate of a float32 matrix product measured here;
what searches grids, rounds and packs is elementwise and has no part in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from common import arguments, store
from mopeq.analyze import Routed, moments
from mopeq.precision import Precision
from mopeq.qtensor import pack, rows_of
from mopeq.quantizers.gptq import FACTORS, _round, factored
from mopeq.quantizers.grid import minmax, searched

H, I = 2048, 1024  # noqa: E741
EXPERTS = 2


class Experts(nn.Module):
    """What ``mopeq.seam.activate`` asks of an experts module."""

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds and result, of the faster of two runs."""
    best = float("inf")
    for _ in range(2):
        begun = time.process_time()
        made = work()
        best = min(best, time.process_time() - begun)
    return best, made


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "", "floor")
    parser.add_argument("--tokens", type=int, default=512, help="that an expert sees")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    draw = torch.Generator().manual_seed(0)
    n, precision = asked.tokens, Precision(4, 128)
    a, b = torch.randn(H, H, generator=draw), torch.randn(H, H, generator=draw)
    rate = 2 * H**3 / timed(lambda: a @ b)[0]
    weights = {"gate_up": torch.randn(EXPERTS, 2 * I, H, generator=draw) / 45,
               "down": torch.randn(EXPERTS, H, I, generator=draw) / 32}  # fmt: skip
    index = torch.arange(EXPERTS).repeat_interleave(n)[:, None]
    seen = Routed(torch.randn(EXPERTS * n, H, generator=draw).bfloat16(), index, torch.ones(EXPERTS * n, 1), False)
    spent: dict[str, float] = {}
    spent["moments"], found = timed(lambda: moments(seen, Experts(), weights["gate_up"]))
    for group, weight in weights.items():
        summed = getattr(found, group)
        seconds, f = timed(lambda summed=summed: factored(summed))
        spent["factors"] = spent.get("factors", 0) + seconds

        def grid(weight: Any = weight, f: Any = f) -> Any:
            minmax(weight, precision)
            return searched(weight, precision, f.importance, factors=FACTORS, refits=0)

        seconds, chosen = timed(grid)
        spent["grids"] = spent.get("grids", 0) + seconds
        seconds, codes = timed(lambda weight=weight, chosen=chosen, f=f: _round(weight, chosen, f))
        spent["rounding"] = spent.get("rounding", 0) + seconds
        whole, parts = chosen.codes(codes), 2 if group == "gate_up" else 1
        seconds, _ = timed(
            lambda whole=whole, parts=parts: [pack(c) for i in range(EXPERTS) for c in rows_of(whole[i], parts)]
        )
        spent["packing"] = spent.get("packing", 0) + seconds
    spent = {name: seconds / EXPERTS for name, seconds in spent.items()}
    least = {
        "moments": 2 * n * 2 * I * H + n * H**2 + n * I**2,
        "factors": (H**3 + I**3) / 3,
        "rounding": 2 * I * H**2 + H * I**2,
    }
    rows = {
        name: {"seconds": round(spent[name], 3), "operations": least.get(name, 0), "floor": least.get(name, 0) / rate}
        for name in spent
    }
    store(asked.out, {"tokens": n, "rate": rate, "rows": rows})
    for name, row in rows.items():
        print(name, row)
    print("all", sum(spent.values()), "floor", sum(least.values()) / rate, "rate", rate / 1e9)


if __name__ == "__main__":
    main()
