"""How the scores of experts rank beside the loss of quantizing them, and how unevenly tokens fall on experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from common import arguments, store
from mopeq.measure import Calibration, measure_prepared, observed, open_model
from mopeq.precision import GROUPS, Precision
from mopeq.stats import Stats, cost_metric

SCORES = ("frequency", "gate_mass", "inverse_norm", "fisher")
COSTS = ("fisher_error", "output_error")
WORST = Precision(2)


def main() -> None:
    parser = arguments(__doc__ or "", "scores")
    parser.add_argument("--model", required=True, help="folder or hub id of the original")
    parser.add_argument("--label", default="", help="how results call the model")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    calibration = Calibration(asked.data, asked.samples, asked.length, 8, asked.seed, cost_share=1.0)
    prepared = observed(open_model(asked.model), calibration, dtype=torch.float32)
    stats = measure_prepared(prepared, (*SCORES, *COSTS), options=[WORST], seed=asked.seed)
    columns = {name: stats.metric(name) for name in SCORES} | {cost: _loss(stats, cost) for cost in COSTS}
    rows = [{"score": name, **{other: _ranks(columns[name], columns[other]) for other in columns if other != name}}
            for name in columns]  # fmt: skip
    store(asked.out, {"model": asked.label or asked.model, "loss_at": str(WORST), "rows": rows, "load": _load(stats)})


def _loss(stats: Stats, cost: str) -> dict[int, list[float]]:
    """Cost of each expert at the lowest precision, both groups."""
    up, down = (stats.metrics[cost_metric(cost, group, WORST)] for group in GROUPS)
    return {layer: [a + b for a, b in zip(up[layer], down[layer], strict=True)] for layer in up}


def _ranks(a: Mapping[int, Sequence[float]], b: Mapping[int, Sequence[float]]) -> dict[str, float]:
    """Spearman's rank correlation over all experts, and its mean over layers."""
    every = spearmanr(np.concatenate([a[k] for k in a]), np.concatenate([b[k] for k in a])).statistic
    layers = [spearmanr(a[k], b[k]).statistic for k in a]
    return {"model": round(float(every), 3), "layers": round(float(np.mean(layers)), 3)}


def _load(stats: Stats) -> dict[str, Any]:
    """Of each layer: shares of the busiest expert and of the busiest quarter, experts without tokens."""
    made: dict[str, Any] = {}
    for layer, row in stats.metric("frequency").items():
        share = np.sort(np.array(row))[::-1] / sum(row)
        quarter = share[: len(share) // 4].sum()
        made[str(layer)] = {"busiest": round(float(share[0]), 3), "quarter": round(float(quarter), 3),
                            "unused": int((share == 0).sum())}  # fmt: skip
    return made


if __name__ == "__main__":
    main()
