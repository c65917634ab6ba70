"""What is outside the experts in the same bytes: whether fewer bits there buy more where the experts are.

The knapsack deals out what the precisions of attention and head leave of a budget. For every calibration seed and size,
the bytes of its map with 8 bits outside the experts, the default, are the budget for other precisions there; each map
is packed, loaded and judged on held-out text, beside that of the default at the same size, window by window.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import kept_runs, run_of, settings_of, store, study_arguments
from fidelity import short, windows_of
from mopeq.allocate import allocate, predicted
from mopeq.errors import BudgetError
from mopeq.evaluate import Divergence
from mopeq.evaluate.divergence import judging
from mopeq.load import load
from mopeq.measure import Calibration, Prepared, measure_prepared, observed, open_model, split_texts
from mopeq.outside import shared_out
from mopeq.pack import pack_model
from mopeq.precision import DEFAULT_REST, Precision, PrecisionMap, parse_precision
from mopeq.trial import spare_windows

COST = "fisher_error"
OPTIONS = [Precision(bits, 128) for bits in (2, 3, 4, 5, 6)]
BASE = Precision(4, 128)
USUAL = ("8g128s", "8g128s")
OUTSIDE = (("6", "6"), ("5", "5"), ("4", "4"), ("8g128s", "4"), ("4", "8g128s"), ("6", "4"), ("4", "6"))
"""Precisions of attention, and of the head."""
CHOSEN = ("auto", "auto")
"""Those that ``--rest auto`` chooses, on a tenth of the calibration data that maps are tried on."""


def main() -> None:
    parser = study_arguments(__doc__ or "", "rest")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.25, 2.5, 3.0], help="of experts beside the default")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    opened = open_model(asked.model)
    settings = settings_of(asked)
    results = {**settings, "runs": kept_runs(asked.out, settings)}
    wanted = {(bits, *pair) for bits in asked.bits for pair in (USUAL, *OUTSIDE, CHOSEN)}
    for seed in asked.seeds:
        run = run_of(results, seed)
        if not wanted <= {(row["bits"], row["attention"], row["head"]) for row in run["rows"]}:
            _run(asked, opened, run, partial(store, asked.out, results))


def _run(asked: argparse.Namespace, opened: Prepared, run: dict[str, Any], save: Callable[[], None]) -> None:
    """The rows of one seed that are not there yet."""
    calibration = Calibration(asked.data, asked.samples, asked.length, 8, run["seed"], cost_share=1.0)
    prepared = observed(opened, calibration, dtype=torch.float32)
    stats = measure_prepared(prepared, (COST,), options=OPTIONS, seed=run["seed"])
    spare = spare_windows(split_texts(calibration, opened.source.path)[1], prepared.tokenizer, asked.length)
    done: dict[tuple[float, str, str], dict[str, Any]] = {
        (r["bits"], r["attention"], r["head"]): r for r in run["rows"]
    }
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        judges = [
            stack.enter_context(judging(prepared.model, windows, cache=temporary, batch_size=8))
            for windows in (windows_of(asked, prepared), spare)
        ]

        def judged(made: PrecisionMap, judge: Any) -> Divergence:
            with tempfile.TemporaryDirectory(dir=temporary) as folder:
                pack_model(prepared, made, Path(folder) / "packed")
                found: Divergence = judge(load(Path(folder) / "packed", dtype=torch.float32), "text").divergence
            return found

        for bits in asked.bits:
            usual = allocate(stats, budget=f"{bits}bpw", cost=COST, options=OPTIONS, rest=DEFAULT_REST)
            size = f"{stats.model.total_bytes(usual)}B"
            again = partial(allocate, stats, budget=size, cost=COST, options=OPTIONS)
            for attention, head in (USUAL, CHOSEN, *OUTSIDE):
                if (bits, attention, head) in done:
                    continue
                try:
                    if (attention, head) == CHOSEN:
                        made = shared_out(
                            usual, stats.model, set(DEFAULT_REST), partial(predicted, stats, COST),
                            lambda rest, again=again: again(rest=rest), lambda m: judged(m, judges[1]),  # type: ignore[misc]
                        ).precisions  # fmt: skip
                    else:
                        given = {"attention": parse_precision(attention, BASE), "lm_head": parse_precision(head, BASE)}
                        made = again(rest={**DEFAULT_REST, **given})
                except BudgetError:
                    continue
                found = judged(made, judges[0])
                row = {
                    "bits": bits, "attention": attention, "head": head, "bytes": stats.model.total_bytes(made),
                    "expert_bits": short(stats.model.expert_bits(made)), "kl": short(found.kl.value),
                    "window_kl": [short(v / n) for v, n in zip(found.window_kl, found.window_tokens, strict=True)],
                }  # fmt: skip
                row |= {"chosen": [str(made.rest[g]) for g in ("attention", "lm_head")]}
                done[bits, attention, head] = row
                run["rows"] = list(done.values())
                save()
                print(time.strftime("%H:%M:%S"), run["seed"], bits, *row["chosen"], row["kl"], flush=True)


if __name__ == "__main__":
    main()
