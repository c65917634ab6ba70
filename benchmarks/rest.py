"""What is outside the experts in the same bytes: whether fewer bits there buy more where the experts are.

The knapsack deals out what the precisions of attention and head leave of a budget. For every calibration seed and size,
the bytes of its map with 8 bits outside the experts, the default, are the budget for other precisions there; each map
is packed, loaded and judged on held-out text, beside that of the default at the same size, window by window.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from codebooks import kept_runs
from common import START, store, study_arguments
from fidelity import short, windows_of
from mopeq.allocate import allocate
from mopeq.errors import BudgetError
from mopeq.evaluate import paired_difference
from mopeq.evaluate.divergence import judging
from mopeq.load import load
from mopeq.measure import Calibration, measure_prepared, observed, open_model
from mopeq.pack import pack_model
from mopeq.precision import DEFAULT_REST, Precision, parse_precision

COST = "fisher_error"
OPTIONS = [Precision(bits, 128) for bits in (2, 3, 4, 5, 6)]
BASE = Precision(4, 128)
USUAL = ("8g128s", "8g128s")
OUTSIDE = (
    USUAL,
    ("16", "16"),
    ("6", "6"),
    ("5", "5"),
    ("4", "4"),
    ("8g128s", "4"),
    ("4", "8g128s"),
    ("6", "4"),
    ("4", "6"),
)
"""Precisions of attention, and of the head."""


def main() -> None:
    parser = study_arguments(__doc__ or "", "rest")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.25, 2.5, 3.0], help="of experts beside the default")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    opened = open_model(asked.model)
    settings: dict[str, Any] = {
        "model": asked.label or Path(asked.model).name, "windows": asked.windows, "length": asked.length,
        "samples": asked.samples,
    }  # fmt: skip
    results = {**settings, "runs": kept_runs(asked.out, settings)}
    for seed in (s for s in asked.seeds if s not in {run["seed"] for run in results["runs"]}):
        prepared = observed(
            opened, Calibration(asked.data, asked.samples, asked.length, 8, seed, cost_share=1.0), dtype=torch.float32
        )
        stats = measure_prepared(prepared, (COST,), options=OPTIONS, seed=seed)
        rows: list[dict[str, Any]] = []
        with (
            tempfile.TemporaryDirectory() as temporary,
            judging(prepared.model, windows_of(asked, prepared), cache=temporary, batch_size=8) as judge,
        ):
            for bits in asked.bits:
                usual = allocate(stats, budget=f"{bits}bpw", cost=COST, options=OPTIONS, rest=DEFAULT_REST)
                size, than = stats.model.total_bytes(usual), None
                for attention, head in OUTSIDE:
                    rest = {
                        **DEFAULT_REST,
                        "attention": parse_precision(attention, BASE),
                        "lm_head": parse_precision(head, BASE),
                    }
                    try:
                        made = allocate(stats, budget=f"{size}B", cost=COST, options=OPTIONS, rest=rest)
                    except BudgetError:
                        continue
                    with tempfile.TemporaryDirectory(dir=temporary) as folder:
                        done = pack_model(prepared, made, Path(folder) / "packed")
                        packed = load(Path(folder) / "packed", dtype=torch.float32)
                        found = judge(packed, "held-out text").divergence
                    than = than or found
                    gain = paired_difference(found, than)
                    rows.append({
                        "bits": bits, "attention": attention, "head": head, "bytes": done.bytes,
                        "expert_bits": short(stats.model.expert_bits(made)), "kl": short(found.kl.value),
                        "than": short(than.kl.value), "difference": short(gain.value), "low": short(gain.low or 0.0),
                        "high": short(gain.high or 0.0),
                        "window_kl": [short(v / n) for v, n in zip(found.window_kl, found.window_tokens, strict=True)],
                    })  # fmt: skip
                    print(time.strftime("%H:%M:%S"), seed, bits, attention, head, rows[-1]["kl"], flush=True)
        results["runs"].append({"seed": seed, "commit": START["commit"], "rows": rows})
        store(asked.out, results)


if __name__ == "__main__":
    main()
