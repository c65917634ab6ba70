"""What leaving an expert out costs: the option of 0 bits, of whole experts.

A token that chose it keeps its other experts, whose weights are scaled to the sum that all had. With Z the output of a
layer's experts at a token, c what one adds to it, w its weight and S the sum of the token's weights, the output
changes by dz = (Z - c) S / (S - w) - Z; a token that chose no other gets nothing. Costs are those of cost.py. The whole
cost stands at ``gate_up``, none at ``down``: an expert is left out with both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.analyze.moments import CHUNK, expert_inputs
from mopeq.analyze.observe import Routed, expert_rows
from mopeq.analyze.slab import Slab
from mopeq.errors import MapError
from mopeq.precision import GROUPS, LEFT_OUT
from mopeq.seam import activate, down_bias
from mopeq.stats import cost_metric

__all__ = ["left_out_costs", "outputs"]


def outputs(slab: Slab, *, seen: Routed, module: nn.Module) -> Tensor:
    """Sum of what some experts add to the layer's output, float32 (tokens, H), on the CPU."""
    if seen.weighs_input:
        raise MapError("0 bits is no option where routing weights scale the experts' input; leave 0 out of the levels")
    total = torch.zeros(seen.hidden.shape, dtype=torch.float32)
    for _, rows, _, added in _added(slab, seen, module):
        total[rows] += added.cpu()
    return total


def left_out_costs(
    slab: Slab, whole: Tensor, *, seen: Routed, module: nn.Module, costs: Sequence[str]
) -> dict[str, list[float]]:
    """Costs of leaving out each expert of a slab, means per calibration token, by the names of :func:`cost_metric`.

    whole: float32 (tokens, H), :func:`outputs` of all the layer's experts together.
    """
    kinds = seen.kinds()
    counts = torch.ones(len(seen.hidden)) if seen.token_weight is None else seen.token_weight
    share = torch.stack([counts, *kinds.values()]).double()  # (kinds, tokens)
    weights = torch.where(seen.index >= 0, seen.weights, 0.0).sum(-1)
    sums = {cost: torch.zeros(len(share), len(slab.experts), dtype=torch.float64) for cost in costs}
    for i, rows, c, added in _added(slab, seen, module):
        z, all_of_them = whole[rows], weights[rows, None]
        rest = all_of_them - c.cpu()
        scale = torch.where(rest > 0, all_of_them / rest.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        change = (z - added.cpu()) * scale - z
        for cost, total in sums.items():
            weighted = change
            if cost == "fisher_error":
                assert seen.gradient is not None  # layer_costs has refused the others
                weighted = change * seen.gradient[rows].float()
            total[:, i] += share[:, rows] @ weighted.square().sum(-1, dtype=torch.float64)
    tokens = max(1, len(seen.hidden))
    at_up, at_down = GROUPS
    found: dict[str, list[float]] = {}
    for cost, total in sums.items():
        for row, kind in zip(total / tokens, ("", *kinds), strict=True):
            found[cost_metric(cost + kind, at_up, LEFT_OUT)] = row.tolist()
            found[cost_metric(cost + kind, at_down, LEFT_OUT)] = [0.0] * len(row)
    return found


def _added(slab: Slab, seen: Routed, module: nn.Module) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Of the i-th expert, in chunks: rows (n,), routing weights (n, 1), and what it adds to the output (n, H)."""
    down = slab.weights["down"]
    with torch.no_grad():
        for i, (expert, rows) in enumerate(zip(slab.experts, expert_rows(seen, slab.experts), strict=True)):
            for r, x, c in expert_inputs(seen, *rows, down.device, CHUNK):
                put = activate(module, x @ slab.weights["gate_up"][i].T, expert) @ down[i].T
                bias: Any = down_bias(module, expert)
                yield i, r, c, (put if bias is None else put + bias.to(put)) * c
