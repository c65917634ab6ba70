"""What rotated inputs (``2g128h``) are worth beside the same bits without, at about 2, 2.5 and 3 bits, by GPTQ.

As ``codebooks.py``: all routed experts are quantized with the moments of the real pipeline, put back as float32
weights, and compared with the original on held-out text; all else stays as it was. ``2g128 + 3g128`` has gate and up at
the first and down at the second, 2.5 bits. Intervals are of the difference to the row without rotation, relative to it.
What rotating costs at run time: ``cpu_kernel.py --only 2 2h 3 3h -o FILE``.

Rows that the results file has already, of the same settings, are kept: a run that was broken off goes on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codebooks import Fake, judged
from common import kept_runs, run_of, settings_of, store, study_arguments
from mopeq.measure import Calibration, observed, open_model
from mopeq.precision import Precision, parse_precision
from mopeq.qtensor import dequantize
from mopeq.quantizers import gptq

PAIRS = (("2g128", "2g128"), ("2g128", "3g128"), ("3g128", "3g128"), ("2g128c", "2g128c"))
"""Precisions of gate and up, and of down."""


def main() -> None:
    asked = study_arguments(__doc__ or "", "rotated").parse_args()
    torch.set_num_threads(asked.threads)
    opened = open_model(asked.model)
    settings = settings_of(asked)
    shapes = {g: opened.spec.layers[0].shapes(g) for g in ("gate_up", "down")}
    if 2 * shapes["gate_up"][0][0] > shapes["gate_up"][0][1] or shapes["down"][0][0] <= shapes["down"][0][1]:
        raise SystemExit("gate with up, and down, are told apart by their shapes here, and this model's look alike")
    results = {**settings, "runs": kept_runs(asked.out, settings)}
    for seed in asked.seeds:
        run = run_of(results, seed)
        calibration = Calibration(asked.data, asked.samples, asked.length, 8, seed)
        prepared = observed(opened, calibration, gradients=False, dtype=torch.float32)
        for pair in PAIRS:  # rows are compared with the first of those that judged() is given
            methods = dict(_method(*(p + turned for p in pair)) for turned in ("", "h"))
            rows = [row for row in run["rows"] if row["name"] in methods]
            others = [row for row in run["rows"] if row["name"] not in methods]
            for _ in judged(asked, prepared, methods, rows):
                run["rows"] = others + rows
                store(asked.out, results)


def _method(up: str, down: str) -> tuple[str, tuple[float, Fake]]:
    """A name, bits a weight, and weights quantized: down is the wider way out."""
    precisions = parse_precision(up), parse_precision(down)

    def fake(weight: Tensor, moments: Tensor) -> Tensor:
        _, out, inp = weight.shape
        return dequantize(gptq(weight, precisions[out > inp], moments))

    bits = (2 * _bits(precisions[0]) + _bits(precisions[1])) / 3
    return (up if up == down else f"{up} + {down}"), (bits, fake)


def _bits(precision: Precision) -> float:
    return 8 * precision.nbytes(1024, 1024) / 1024**2


if __name__ == "__main__":
    main()
