"""Few bits: whether leaving experts out and a codebook lower the KL at equal bytes, and what aligning routers adds.

For every calibration seed the model is observed and measured once, and every unit packed (GPTQ) at 2, 3 and 4 bits in
groups of 128, and at 2 bits with a codebook. Study ``few bits``: a knapsack for each set of options and budget, in a
copy of the original whose other weights stay as they were, judged on held-out text, window by window beside the options
2, 3 and 4 at the same budget, or, where these do not fit, beside uniform 2 bits, which are more. Study ``align``: what
``mopeq align`` does to one of these maps, with and without tuning of norms, on the same text.

The same command goes on with the seeds that it had not finished.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import START, store, study_arguments
from fidelity import short
from mopeq.align import Alignment, aligned, stored_keys
from mopeq.allocate import allocate, uniform_map
from mopeq.allocate.budget import least_bytes
from mopeq.candidates import Stock
from mopeq.data.text import read_texts, text_windows, window_batches
from mopeq.evaluate import Divergence, paired_difference
from mopeq.evaluate.divergence import judging
from mopeq.journal import Journal
from mopeq.load import load_source
from mopeq.measure import Calibration, Prepared, calibrated, measure_streamed, measured_step, open_model
from mopeq.precision import FULL, LEFT_OUT, Precision, PrecisionMap
from mopeq.stats import Stats
from mopeq.trial import Trial

COST = "fisher_error"
TWO, CODEBOOK, MORE = Precision(2, 128), Precision(2, 128, codebook=True), (Precision(3, 128), Precision(4, 128))
USUAL = "2, 3, 4"
OFFERED: dict[str, Sequence[Precision]] = {
    USUAL: (TWO, *MORE),
    "2c, 3, 4": (CODEBOOK, *MORE),
    "0, 2, 3, 4": (LEFT_OUT, TWO, *MORE),
    "0, 2c, 3, 4": (LEFT_OUT, CODEBOOK, *MORE),
}
BUDGETS = (2.0, 2.25, 2.5)
AT = 2.25
KEPT = {"attention": FULL, "lm_head": FULL}
"""All else is as it was, so that only what happens to the experts is compared."""


def main() -> None:
    asked = _parser().parse_args()
    torch.set_num_threads(asked.threads)
    opened = open_model(asked.model)
    results = _resumed(asked)
    rows, seconds = results["rows"], results["processor_seconds"]
    for seed in (s for s in asked.seeds if f"align, seed {s}" not in seconds):
        calibration = Calibration(asked.data, asked.samples, asked.length, 8, seed, cost_share=1.0)
        ready = calibrated(opened, calibration)
        each = asked.windows // len(asked.text)
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
            stats, trial = measured(ready, original, journal, seed)

            def judged(model: nn.Module, judge: Any = judge) -> Divergence:
                return judge(model, "held-out text").divergence

            def row(
                study: str, name: str, made: PrecisionMap, found: Divergence, than: Divergence | None, seed: int = seed,
                **facts: Any,
            ) -> None:  # fmt: skip
                rows.append(_row(study, name, seed, opened, made, found, than, facts))
                print(time.strftime("%H:%M:%S"), rows[-1], flush=True)

            maps = _few_bits(stats, opened, trial, judged, row, asked.budgets)
            seconds[f"few bits, seed {seed}"] = round(time.process_time() - before, 1)
            store(asked.out, results)
            before = time.process_time()
            test = window_batches(windows, 8)
            for name in asked.align:
                for tune in (0.0, *asked.rates):
                    how = Alignment(tune=tune)
                    model = _own(trial.take(maps[name]), original, opened, how)
                    found = aligned(original, model, opened.spec, ready.batches, test, judged, how, seed)
                    what = f"routers, then norms at {tune:g}" if tune else "routers"
                    gain = found.difference
                    rows.append({
                        "study": "align", "name": f"{what}: {name} at {AT}", "seed": seed,
                        "expert_bytes": opened.inventory.expert_bytes(maps[name]), "kl": short(found.kl_after),
                        "than": short(found.kl_before), "difference": short(gain.value), "low": short(gain.low or 0.0),
                        "high": short(gain.high or 0.0), "same_experts": [found.before, found.after],
                    })  # fmt: skip
                    print(time.strftime("%H:%M:%S"), rows[-1], flush=True)
            seconds[f"align, seed {seed}"] = round(time.process_time() - before, 1)
        store(asked.out, results)


def measured(ready: Prepared, original: nn.Module, journal: Journal, seed: int) -> tuple[Stats, Trial]:
    """Costs of every option, and the original with experts packed at any of them."""
    stats, _ = measure_streamed(
        ready, ("output_peak", COST), options=(LEFT_OUT, TWO, CODEBOOK, *MORE), quantizer="gptq", seed=seed,
        dtype=torch.float32, journal=journal,
    )  # fmt: skip
    units = {layer.index: Stock(journal, measured_step(layer), ready.source, layer).unit for layer in ready.spec.layers}
    return stats, Trial(original, ready, units)


def _resumed(asked: argparse.Namespace) -> dict[str, Any]:
    """What the same command stored of seeds that it finished, or nothing yet."""
    found: dict[str, Any] = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    calibration = {"samples": asked.samples, "length": asked.length}
    results: dict[str, Any] = {"model": asked.label or Path(asked.model).name, "windows": asked.windows,
                               "length": asked.length, "calibration": calibration, "rows": [],
                               "processor_seconds": {}}  # fmt: skip
    if found.get("command") != START["command"]:
        return results
    done = found["results"]["processor_seconds"]
    finished = {seed for seed in asked.seeds if f"align, seed {seed}" in done}
    results["processor_seconds"] = {name: spent for name, spent in done.items() if int(name.split()[-1]) in finished}
    results["rows"] = [row for row in found["results"]["rows"] if row["seed"] in finished]
    return results


def _parser() -> argparse.ArgumentParser:
    parser = study_arguments(__doc__ or "", "few_bits")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS), help="bits per expert weight")
    parser.add_argument("--align", nargs="*", choices=OFFERED, default=[USUAL], help="maps to align")
    parser.add_argument("--rates", type=float, nargs="*", default=[3e-4], help="of tuning norms and routers")
    return parser


def _few_bits(
    stats: Stats, opened: Prepared, trial: Trial, judged: Callable[[nn.Module], Divergence], row: Callable[..., None],
    budgets: Sequence[float],
) -> dict[str, PrecisionMap]:  # fmt: skip
    """Judge every set of options at every budget that it fits; the maps at ``AT``."""
    two, maps = uniform_map(opened.inventory, [TWO], rest=KEPT), {}
    uniform = judged(trial.take(two))
    row("few bits", "uniform 2", two, uniform, None)
    for budget in budgets:
        than = uniform
        for name, options in OFFERED.items():
            if LEFT_OUT not in options and 8 * least_bytes(opened.inventory, options) > budget * _weights(opened):
                continue
            made = allocate(stats, budget=f"{budget}bpw", cost=COST, options=options, rest=KEPT)
            found = judged(trial.take(made))
            left_out = sum(p == LEFT_OUT for rows in made.experts["down"].values() for p in rows)
            row("few bits", f"{name} at {budget}", made, found, None if name == USUAL else than, left_out=left_out)
            if name == USUAL:
                than = found
            if budget == AT:
                maps[name] = made
    return maps


def _weights(opened: Prepared) -> int:
    return opened.inventory.expert_parameters


def _own(model: nn.Module, original: nn.Module, opened: Prepared, how: Alignment) -> nn.Module:
    """The model with routers and norms of its own, as the original has them: a trial shares them with it."""
    for name in stored_keys(original, opened.spec, how):
        path, _, leaf = name.rpartition(".")
        weight = original.get_parameter(name)
        setattr(model.get_submodule(path), leaf, nn.Parameter(weight.detach().clone(), weight.requires_grad))
    return model


def _row(
    study: str, name: str, seed: int, opened: Prepared, made: PrecisionMap, found: Divergence, than: Divergence | None,
    facts: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    line = {"study": study, "name": name, "seed": seed, "expert_bytes": opened.inventory.expert_bytes(made),
            "kl": short(found.kl.value)}  # fmt: skip
    if than is not None:
        gain = paired_difference(found, than)
        line |= {"than": short(than.kl.value), "difference": short(gain.value)}
        line |= {"low": short(gain.low or 0.0), "high": short(gain.high or 0.0)}
    return line | facts


if __name__ == "__main__":
    main()
