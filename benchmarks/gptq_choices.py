"""What GPTQ is given and how it goes through columns, one choice changed at a time.

Moments weigh a token by its routing weight squared, c^2, which is what its error counts in the layer's output. Beside
that: c, as MoEQuant's code has it (affinity-guided quantization, arXiv 2505.03804: inputs times the root of c), and
1, as most quantizers of others; columns as they come in the place of the order of falling diagonal; and experts with
few tokens left alone, where mopeq fills them up from the layer's pooled moments. Experts are quantized at one
precision and put back as ``signround.py`` does it, which also has the columns of the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common import kept_runs, run_of, settings_of, store, study_arguments
from mopeq.analyze import moments
from mopeq.measure import Calibration, Prepared, observed, open_model
from mopeq.precision import GROUPS, Precision, parse_precision
from mopeq.qtensor import dequantize
from mopeq.quantizers import fallback_moments, gptq
from mopeq.source import read_group
from mopeq.spec import MoELayer
from signround import judged

CHOICES: dict[str, dict[str, Any]] = {
    "gptq": {},
    "tokens weighed by c": {"power": 0.5},
    "tokens weighed by 1": {"power": 0.0},
    "columns as they come": {"act_order": False},
    "few tokens left alone": {"filled": False},
}


def main() -> None:
    parser = study_arguments(__doc__ or "", "gptq_choices")
    parser.add_argument("--precisions", nargs="+", default=["2g128", "3g128"], help="of all experts")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    opened = open_model(asked.model)
    settings = settings_of(asked)
    results = {**settings, "runs": kept_runs(asked.out, settings)}
    for seed in asked.seeds:
        run = run_of(results, seed)
        calibration = Calibration(asked.data, asked.samples, asked.length, 8, seed)
        prepared = observed(opened, calibration, gradients=False, dtype=torch.float32)
        methods = {
            f"{name} {p}": partial(rounded, precision=parse_precision(p), **how)
            for p in asked.precisions
            for name, how in CHOICES.items()
        }
        for _ in judged(asked, prepared, methods, run["rows"]):
            store(asked.out, results)


def rounded(
    prepared: Prepared, layer: MoELayer, module: nn.Module, *, precision: Precision, power: float = 1.0,
    filled: bool = True, act_order: bool = True,
) -> Iterator[tuple[int, str, Tensor]]:  # fmt: skip
    """Experts, groups and weights of a layer by GPTQ, on moments in which inputs count c to the ``power``."""
    weights = {group: read_group(prepared.source, layer, group) for group in GROUPS}
    seen = prepared.routed[layer.index]
    found = moments(replace(seen, weights=seen.weights**power), module, weights["gate_up"])
    for group in GROUPS:
        summed: Tensor = getattr(found, group)
        inputs, _ = fallback_moments(summed, found.tokens, summed.shape[-1] // 4 if filled else 0)
        made = dequantize(gptq(weights[group], precision, inputs, act_order=act_order))
        yield from ((expert, group, weight) for expert, weight in enumerate(made))


if __name__ == "__main__":
    main()
