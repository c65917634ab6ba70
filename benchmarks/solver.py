"""How fast the knapsack solvers are, and how far from the proven optimum.

Costs are random: a sensitivity per unit, lognormal with sigma 1.5, times 4^-bits, times noise per option. Units take
turns between two shapes (gate and up together, and down), so that bytes differ. Options: 2, 3, 4 bits in groups of 64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from common import arguments, store
from mopeq.allocate.knapsack import Floats, Ints, Solution, exact, greedy
from mopeq.precision import Precision

UNITS = {704: "64 experts in 11 layers", 6144: "128 experts in 48 layers", 30720: "512 experts in 60 layers"}
SHAPES = ((2 * 768, 2048), (2048, 768))
BITS = (2, 3, 4)


def problem(units: int, seed: int, bits: float) -> tuple[Floats, Ints, int]:
    """Loss and size (units, options), and the bytes of ``bits`` per weight."""
    generator = np.random.default_rng(seed)
    size = np.array([[Precision(b).nbytes(*SHAPES[i % 2]) for b in BITS] for i in range(units)], dtype=np.int64)
    sensitivity = generator.lognormal(0.0, 1.5, (units, 1))
    loss = sensitivity * 4.0 ** -np.array(BITS) * generator.lognormal(0.0, 0.2, (units, len(BITS)))
    weights = sum(SHAPES[i % 2][0] * SHAPES[i % 2][1] for i in range(units))
    return loss, size, int(bits * weights / 8)


def timed(solver: Callable[[Floats, Ints, int], Solution], instance: tuple[Floats, Ints, int]) -> dict[str, Any]:
    started = time.perf_counter()
    solved = solver(*instance)
    seconds = time.perf_counter() - started
    if solved.size > instance[2]:
        raise RuntimeError(f"{solved.solver} is {solved.size - instance[2]} bytes over its budget")
    return {"seconds": seconds, "gap": solved.loss / solved.bound - 1, "solver": solved.solver,
            "left_bytes": instance[2] - solved.size}  # fmt: skip


def main() -> None:
    parser = arguments(__doc__ or "", "solver")
    parser.add_argument("--seeds", type=int, default=5, help="random instances of each size and budget")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 3.0, 3.5], help="budgets, bits per weight")
    asked = parser.parse_args()
    timed(exact, problem(64, 0, 2.5))  # loads scipy
    rows = []
    for units, shape in UNITS.items():
        for name, solver in (("greedy", greedy), ("exact", exact)):
            runs = [timed(solver, problem(units, seed, bits)) for bits in asked.bits for seed in range(asked.seeds)]
            seconds = [run["seconds"] for run in runs]
            rows.append({
                "units": units, "like": shape, "solver": name, "instances": len(runs),
                "seconds_median": round(float(np.median(seconds)), 4), "seconds_max": round(max(seconds), 4),
                "gap_max": float(f"{max(run['gap'] for run in runs):.2g}"),
                "proven": sum(run["solver"] == name for run in runs),
                "left_bytes_max": max(run["left_bytes"] for run in runs),
            })  # fmt: skip
            print(rows[-1], flush=True)
    store(asked.out, {"options": [str(Precision(b)) for b in BITS], "budgets_bpw": asked.bits, "rows": rows})


if __name__ == "__main__":
    main()
