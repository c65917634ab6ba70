"""Grids, codes and bit strings of a matrix of 2048 x 2048: the compiled library beside the same on torch.

Processor time on one thread, so that other processes do not count; the least of three runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from common import arguments, store
from mopeq import qtensor
from mopeq.native import ISAS, library
from mopeq.precision import Precision
from mopeq.quantizers import compiled, rtn, rtn_mse
from mopeq.quantizers.gptq import FACTORS
from mopeq.quantizers.grid import searched

SIZE = 2048


def main() -> None:
    """Command line."""
    asked = arguments(__doc__ or "", "rounding").parse_args()
    torch.set_num_threads(asked.threads)
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(1, SIZE, SIZE, generator=draw) / 50).bfloat16().float()
    importance, codes = torch.rand(1, SIZE, generator=draw), torch.randint(0, 16, (SIZE, SIZE), dtype=torch.uint8)
    works: dict[str, Callable[[], Any]] = {
        "rtn, 4g128": lambda: rtn(weight, Precision(4, 128)),
        "rtn-mse, 8g128s": lambda: rtn_mse(weight, Precision(8, 128, True)),
        "rtn-mse, 4g128": lambda: rtn_mse(weight, Precision(4, 128)),
        "grids of gptq, 4g128": lambda: searched(weight, Precision(4, 128), importance, factors=FACTORS, refits=0),
        "bit strings, 4 bits": lambda: qtensor.pack_bits(codes, 4),
    }
    lib, rows = library(), {}
    best = lib.mopeq_best_isa()
    for name, work in works.items():
        with patch.object(compiled, "takes", lambda *_: False), patch.object(qtensor, "why_not", lambda: "not wanted"):
            rows[name] = {"torch": spent(work)}
        for isa in range(best + 1):
            lib.mopeq_use_isa(isa)
            rows[name][ISAS[isa]] = spent(work)
        print(name, rows[name])
    store(asked.out, rows)


def spent(work: Callable[[], Any]) -> float:
    """Nanoseconds a weight."""
    times = []
    for _ in range(3):
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return round(min(times) / SIZE**2 * 1e9, 2)


if __name__ == "__main__":
    main()
