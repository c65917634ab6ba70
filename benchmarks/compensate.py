"""What ``quantize --compensate`` is worth: the same map packed with and without it, in the same bytes.

For every calibration seed costs are measured once, and a knapsack makes maps of several sizes, without and with leaving
experts out and codebooks; beside them are uniform maps. Each is packed by ``quantize`` twice, loaded and judged on
held-out text, window by window. Processor seconds are those of packing with the map, calibration data included.

The same command goes on with the rows that the results file lacks.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import kept_runs, run_of, settings_of, store, study_arguments
from fidelity import short, windows_of
from mopeq.allocate import allocate
from mopeq.evaluate import Divergence, paired_difference
from mopeq.evaluate.divergence import judging
from mopeq.load import load, load_source
from mopeq.measure import Calibration, calibrated, measure_streamed, open_model, split_texts
from mopeq.precision import LEFT_OUT, Precision, PrecisionMap
from mopeq.quantize import quantize

COST = "fisher_error"
USUAL = tuple(Precision(bits, 128) for bits in (2, 3, 4, 5, 6))
FEW = (LEFT_OUT, Precision(2, 128, codebook=True), *USUAL[1:])
UNIFORM = USUAL[:3]
MAPS = {"2, 3, 4, 5, 6": (USUAL, (2.25, 2.5, 3.0)), "0, 2c, 3, 4, 5, 6": (FEW, (2.0, 2.25, 2.5))}


def main() -> None:
    asked = study_arguments(__doc__ or "", "compensate").parse_args()
    torch.set_num_threads(asked.threads)
    opened = open_model(asked.model)
    settings = settings_of(asked)
    results = {**settings, "runs": kept_runs(asked.out, settings)}
    original = load_source(opened.source, torch.float32)
    for seed in asked.seeds:
        run = run_of(results, seed)
        calibration = Calibration(asked.data, asked.samples, asked.length, 8, seed)
        training, _ = split_texts(calibration, opened.source.path)
        ready, known = calibrated(opened, calibration, texts=training), {row["name"] for row in run["rows"]}
        wanted: dict[str, PrecisionMap] = {str(p): PrecisionMap.uniform(opened.inventory.experts, p) for p in UNIFORM}
        options = (LEFT_OUT, Precision(2, 128, codebook=True), *USUAL)
        stats, _ = measure_streamed(ready, ("output_peak", COST), options=options, quantizer="gptq", seed=seed)
        for name, (offered, budgets) in MAPS.items():
            for bits in budgets:
                wanted[f"{name} at {bits}"] = allocate(stats, budget=f"{bits}bpw", cost=COST, options=offered)
        with (
            tempfile.TemporaryDirectory() as folder,
            judging(original, windows_of(asked, ready), cache=folder, batch_size=8) as judge,
        ):
            for name, precisions in wanted.items():
                if name in known:
                    continue
                found: list[Divergence] = []
                row: dict[str, Any] = {"name": name, "processor_seconds": []}
                for compensate in (False, True):
                    begun, out = time.process_time(), Path(folder) / f"{name} {compensate}"
                    packed = quantize(
                        asked.model, out, precisions=precisions, calibration=calibration, compensate=compensate,
                        dtype=torch.float32, evaluated=False,
                    )  # fmt: skip
                    row["processor_seconds"].append(round(time.process_time() - begun, 1))
                    judged = judge(load(out, dtype=torch.float32), name).divergence
                    assert judged is not None
                    found.append(judged)
                plain, gain = found[0].kl.value, paired_difference(found[1], found[0])
                row |= {
                    "bytes": packed.bytes, "kl": [short(one.kl.value) for one in found],
                    "change": [short(v / plain) for v in (gain.value, gain.low or 0.0, gain.high or 0.0)],
                }  # fmt: skip
                run["rows"].append(row)
                store(asked.out, results)
                print(time.strftime("%H:%M:%S"), seed, row, flush=True)


if __name__ == "__main__":
    main()
