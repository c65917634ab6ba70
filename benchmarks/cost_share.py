"""Costs measured on a part of the calibration text: do they rank units alike, and do their maps lose anything?

For every calibration seed the model is observed and measured on all of the text, and every unit packed (GPTQ) at 2 to 6
bits in groups of 128; then costs are measured again on parts, with the same moments and so the same codes, and once
more on all of the text with other labels drawn from the model, which shows how much of a difference is chance. A
knapsack for each of them and each budget is judged on held-out text beside the map of all of the text at the same
budget, window by window: both take the budget, whatever the map. ``output_error`` is measured on all and on a quarter,
and its maps are judged beside those of its own costs on all of the text.

The same command goes on with the seeds that it had not finished.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from common import START, store, study_arguments
from fidelity import short
from mopeq.allocate import allocate
from mopeq.analyze import experts_module, layer_metrics, measured_batches, observed_in_part
from mopeq.candidates import Stock
from mopeq.data.text import read_texts, text_windows
from mopeq.evaluate import Divergence, paired_difference
from mopeq.evaluate.divergence import judging
from mopeq.journal import Journal
from mopeq.load import load_source
from mopeq.measure import Calibration, Prepared, calibrated, measure_streamed, measured_step, open_model
from mopeq.precision import FULL, GROUPS, Precision, PrecisionMap
from mopeq.stats import Stats, cost_metric
from mopeq.trial import Trial

OPTIONS = [Precision(bits, 128) for bits in (2, 3, 4, 5, 6)]
COST, CHEAP = "fisher_error", "output_error"
SHARES = {COST: (0.25, 0.125), CHEAP: (0.25,)}
BUDGETS = (2.25, 2.5, 3.0)
BATCH = 4
"""Sequences of a batch, as ``mopeq quantize`` has them."""
OTHER = 1000
"""Added to the seed of other labels."""
KEPT = {"attention": FULL, "lm_head": FULL}
"""All else is as it was, so that only what happens to the experts is compared."""


def main() -> None:
    asked = study_arguments(__doc__ or "", "cost_share").parse_args()
    torch.set_num_threads(asked.threads)
    opened = open_model(asked.model)
    results = _resumed(asked)
    each = asked.windows // len(asked.text)
    for seed in (s for s in asked.seeds if s not in results["seeds"]):
        calibration = Calibration(asked.data, asked.samples, asked.length, BATCH, seed, cost_share=1.0)
        ready = calibrated(opened, calibration)
        windows = [
            w for path in asked.text for w in text_windows(read_texts(path), ready.tokenizer, asked.length, limit=each)
        ]
        original = load_source(opened.source, torch.float32)
        with (
            tempfile.TemporaryDirectory() as folder,
            Journal(Path(folder), {}) as journal,
            judging(original, windows, cache=folder, batch_size=8) as judge,
        ):
            before = time.process_time()
            whole, _ = measure_streamed(
                ready, (COST, CHEAP), options=OPTIONS, quantizer="gptq", seed=seed, dtype=torch.float32, journal=journal
            )
            print(time.strftime("%H:%M:%S"), seed, round(time.process_time() - before, 1), flush=True)
            rows = []
            units = {
                layer.index: Stock(journal, measured_step(layer), opened.source, layer).unit
                for layer in opened.spec.layers
            }
            trial = Trial(original, opened, units)
            known: dict[PrecisionMap, Divergence] = {}
            for row, cost, stats in _measured(ready, original, whole, seed):
                row |= _ranks(stats, whole, cost)
                for budget in BUDGETS:
                    maps = [allocate(s, budget=f"{budget}bpw", cost=cost, options=OPTIONS, rest=KEPT)
                            for s in (stats, whole)]  # fmt: skip
                    for made in maps:
                        if _key(made) not in known:
                            known[_key(made)] = judge(trial.take(made), "held-out text").divergence
                    row[str(budget)] = _beside(*maps, *(known[_key(made)] for made in maps))
                rows.append(row)
                print(time.strftime("%H:%M:%S"), row["cost"], row["share"], row["labels"], row["spearman"],
                      [(row[str(b)]["kl"], row[str(b)]["difference"]) for b in BUDGETS], flush=True)  # fmt: skip
        results["rows"] += rows
        results["seeds"].append(seed)
        store(asked.out, results)


def _measured(ready: Prepared, original: Any, whole: Stats, seed: int) -> Any:
    """What each row is of, its cost, and the statistics with it."""
    for cost, shares in SHARES.items():
        for share in shares:
            measured = measured_batches(ready.batches, share, least=0)
            yield _again(ready, original, whole, cost, share, measured, seed, seed)
    yield _again(ready, original, whole, COST, 1.0, None, seed, seed + OTHER)


def _again(
    ready: Prepared, original: Any, whole: Stats, cost: str, share: float, measured: Any, seed: int, labels: int
) -> tuple[dict[str, Any], str, Stats]:
    """Costs measured once more, by the whole model at once."""
    before = time.process_time()
    routed = observed_in_part(original, ready.spec, ready.batches, measured, gradients=cost == COST, seed=labels)
    found: dict[str, dict[int, Sequence[float]]] = {}
    for layer in ready.spec.layers:
        made, _ = layer_metrics(
            ready.source, layer, routed[layer.index], experts_module(original, layer), (cost,), options=OPTIONS
        )
        for name, values in made.items():
            found.setdefault(name, {})[layer.index] = values
    seconds = round(time.process_time() - before, 1)
    row = {"cost": cost, "share": share, "seed": seed, "labels": labels, "seconds": seconds}
    return row, cost, whole.with_metrics(found)


def _ranks(stats: Stats, whole: Stats, cost: str) -> dict[str, float]:
    """How alike costs are: Spearman's correlation over all units at each option, the least and the mean."""
    found = []
    for option in OPTIONS:
        ours, theirs = (
            [v for group in GROUPS for values in s.metrics[cost_metric(cost, group, option)].values() for v in values]
            for s in (stats, whole)
        )
        found.append(float(spearmanr(ours, theirs).statistic))
    return {"spearman": short(sum(found) / len(found)) or 0.0, "spearman_least": short(min(found)) or 0.0}


def _beside(made: PrecisionMap, than: PrecisionMap, found: Divergence, other: Divergence) -> dict[str, Any]:
    """A map beside that of all of the text."""
    gain = paired_difference(found, other)
    pairs = [
        (a, b)
        for group in GROUPS
        for layer, row in made.experts[group].items()
        for a, b in zip(row, than.experts[group][layer], strict=True)
    ]
    return {
        "kl": short(found.kl.value), "than": short(other.kl.value), "difference": short(gain.value),
        "low": short(gain.low), "high": short(gain.high),
        "other_precision": short(sum(a != b for a, b in pairs) / len(pairs)),
        "window_difference": [short((a - b) / n) for a, b, n in
                              zip(found.window_kl, other.window_kl, found.window_tokens, strict=True)],
    }  # fmt: skip


def _key(made: PrecisionMap) -> Any:
    return tuple((group, layer, row) for group in GROUPS for layer, row in made.experts[group].items())


def _resumed(asked: argparse.Namespace) -> dict[str, Any]:
    """What the same command stored of seeds that it finished, or nothing yet."""
    found: Mapping[str, Any] = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    if found.get("command") == START["command"]:
        kept: dict[str, Any] = found["results"]
        return kept
    return {
        "model": asked.label or Path(asked.model).name, "windows": asked.windows, "length": asked.length,
        "calibration": {"samples": asked.samples, "length": asked.length}, "seeds": [], "rows": [],
    }  # fmt: skip


if __name__ == "__main__":
    main()
