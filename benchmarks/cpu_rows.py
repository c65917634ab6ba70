"""How fast the CPU kernel multiplies 1 to 512 rows by one packed matrix, beside torch's bfloat16 product.

From one row, which waits for memory, to a prompt's, which wait for arithmetic: a width's rate must not fall on the way.
Matrices of 2048 x 2048, more of them than caches hold, bfloat16 activations; every round takes each product once, and
the best round counts, in processor time, which a busy machine disturbs least.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from common import arguments, store, table
from cpu_kernel import random_group
from mopeq.kernels import cpu
from mopeq.precision import Precision

SIDE, COPIES = 2048, 16
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
WIDTHS = (2, 3, 4, 8)


def main() -> None:
    parser = arguments(__doc__ or "", "cpu_rows")
    parser.add_argument("--rounds", type=int, default=30)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    packed = {bits: [random_group((Precision(bits),), ((SIDE, SIDE),), n) for n in range(COPIES)] for bits in WIDTHS}
    plain = [torch.randn(SIDE, SIDE).bfloat16() for _ in range(COPIES)]
    found: dict[str, Any] = {"isa": cpu.isa(), "rows": {}}
    for rows in ROWS:
        x = torch.randn(rows, SIDE).bfloat16()
        calls: dict[str, Callable[[int], Tensor]] = {
            f"{bits} bits": lambda n, x=x, own=own: cpu.grouped_linear(x, own[n]) for bits, own in packed.items()
        } | {"torch bfloat16": lambda n, x=x: functional.linear(x, plain[n])}
        found["rows"][rows] = measured(calls, asked.rounds, 2 * rows * SIDE * SIDE)
    names = list(found["rows"][1])
    print(table(["rows", *names], [[str(r), *(f"{row[n]:.0f}" for n in names)] for r, row in found["rows"].items()]))
    store(asked.out, found)


def measured(calls: dict[str, Callable[[int], Tensor]], rounds: int, operations: int) -> dict[str, float]:
    """Billions of operations a second of processor time, the best of ``rounds`` taken in turns."""
    best = dict.fromkeys(calls, float("inf"))
    for number in range(rounds):
        for name, call in calls.items():
            started = time.process_time()
            call(number % COPIES)
            best[name] = min(best[name], time.process_time() - started)
    return {name: operations / seconds / 1e9 for name, seconds in best.items()}


if __name__ == "__main__":
    main()
