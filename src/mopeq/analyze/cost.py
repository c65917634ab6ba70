"""What quantizing one unit costs at each precision, measured with the quantizer that will be used.

A unit is one projection group of one expert. With the unit at a precision and everything else as it was, the output of
the MoE layer changes by dz (tokens, H), the routing weight included. Per calibration token,

    output_error = sum_t w_t sum_d dz_td^2 / tokens
    fisher_error = sum_t w_t sum_d g_td^2 dz_td^2 / tokens

where w is what a token counts (1 unless text and image tokens are weighted) and g = dL/d(layer output) with labels
drawn from the model: the diagonal of the Gauss-Newton form of the KL divergence (the weighting of GEMQ, arXiv
2605.23078, with the true instead of the empirical Fisher). It ranks units; as a prediction of the divergence in nats
it is low, because it leaves out correlations between channels and tokens, and tokens that a changed input sends to
other experts further up. Usage is in the sum over tokens already and does not multiply it again. Units whose expert
saw no tokens cost 0.

Where there are images, each cost is also given for the image tokens alone (``fisher_error.vision``) and for the others
(``fisher_error.text``), without w: the two add up to the cost without w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mopeq.analyze.moments import CHUNK, Moments, enough_tokens, expert_inputs
from mopeq.analyze.observe import Routed, expert_rows
from mopeq.errors import DataError
from mopeq.precision import GROUPS, Precision, ProjectionGroup
from mopeq.qtensor import Codes, dequantize
from mopeq.quantizers import Quantizer, fallback_moments, once
from mopeq.seam import activate
from mopeq.stats import cost_metric

__all__ = ["COSTS", "Keep", "layer_costs", "quantized"]

COSTS = ("output_error", "fisher_error")
MEMORY = 1 << 30
"""Bytes of dequantized weights held at a time."""


T = TypeVar("T")
Keep = Callable[[ProjectionGroup, Sequence[int], Codes], T]
"""Takes the codes (experts, rows, in) of some experts, whose numbers in their layer it is told."""


def quantized(weight: Tensor, precision: Precision, quantizer: Quantizer, moments: Tensor | None) -> Tensor:
    """What is left of float32 weights (experts, out, in) at a precision; 16 bits rounds to bfloat16."""
    return _quantized(weight, precision, quantizer, moments, lambda codes: None)


def _quantized(
    weight: Tensor, precision: Precision, quantizer: Quantizer, inputs: Any, keep: Callable[[Codes], None]
) -> Tensor:
    if precision.bits == 16:
        return weight.to(torch.bfloat16).float()
    codes = quantizer(weight, precision, inputs)
    keep(codes)
    return dequantize(codes)


def layer_costs(
    routed: Routed,
    module: nn.Module,
    weights: Mapping[ProjectionGroup, Tensor],
    moments: Moments | None,
    options: Sequence[Precision],
    quantizer: Quantizer,
    *,
    costs: Sequence[str] = COSTS,
    minimum_tokens: int | None = None,
    memory: int = MEMORY,
    chunk: int = CHUNK,
    experts: Sequence[int] | None = None,
    keep: Keep[None] | None = None,
) -> dict[str, list[float]]:
    """Costs of every unit of one layer at every option, in one pass over its tokens.

    Args:
        routed: what the layer saw; with gradients for ``fisher_error``.
        module: its experts module, asked for the gate function.
        weights: ``gate_up`` float32 (experts, 2I, H), gate rows first, and ``down`` (experts, H, I), on the device to
            compute on.
        moments: of this layer, for quantizers that take them; None gives them none.
        options: precisions to try.
        quantizer: the one that will be used.
        costs: which of ``output_error`` and ``fisher_error``.
        minimum_tokens: experts with fewer are quantized with moments filled up from the layer's mean; None for the
            default.
        memory: bytes of dequantized weights to hold; experts are worked on in groups that fit.
        chunk: tokens worked on at a time.
        experts: the layer's experts that ``weights`` and ``moments`` are of; None for all.
        keep: called with the codes of every unit at every option below 16 bits; without it, experts that saw no token
            are not quantized, because their costs are known.

    Returns:
        ``{cost_metric name: [one value per expert]}``, means per calibration token.
    """
    if "fisher_error" in costs and routed.gradient is None:
        raise DataError("fisher_error needs gradients; this layer was observed without; use observe(gradients=True)")
    gate_up, down = weights["gate_up"], weights["down"]
    device = gate_up.device
    which = range(len(gate_up)) if experts is None else experts
    full: dict[ProjectionGroup, Tensor | None] = dict.fromkeys(GROUPS)
    if moments is not None:
        for group in GROUPS:
            summed: Tensor = getattr(moments, group)
            full[group] = fallback_moments(summed, moments.tokens, enough_tokens(summed.shape[-1], minimum_tokens))[0]
    kinds = routed.kinds()
    counts = torch.ones(len(routed.hidden)) if routed.token_weight is None else routed.token_weight
    share = torch.stack([counts, *kinds.values()]).double()  # (kinds, tokens)
    costs = [cost for cost in COSTS if cost in costs]
    shape = len(GROUPS), len(options), len(costs), len(share), len(which)
    sums = torch.zeros(shape, dtype=torch.float64, device=device)
    rows = expert_rows(routed, which)
    used = [i for i in range(len(which)) if keep is not None or len(rows[i][0])]
    each = 4 * (gate_up[0].numel() + down[0].numel()) * len(options)
    with torch.no_grad():
        for part in _parts(used, max(1, memory // each)):
            changed: dict[ProjectionGroup, list[Tensor]] = {}
            for group in GROUPS:
                weight, filled = weights[group][part], full[group]
                given = None if filled is None else filled[part]
                inputs = {kind: once(quantizer, given, kind) for kind in {p.hadamard for p in options}}
                numbers = [which[i] for i in part]

                def kept(codes: Codes, group: ProjectionGroup = group, numbers: Sequence[int] = numbers) -> None:
                    if keep is not None:
                        keep(group, numbers, codes)

                changed[group] = [_quantized(weight, p, quantizer, inputs[p.hadamard], kept) for p in options]
            for i, at in enumerate(part):
                one = {group: [weight[i] for weight in changed[group]] for group in GROUPS}
                for r, x, c in expert_inputs(routed, *rows[at], device, chunk):
                    g2 = None if routed.gradient is None else routed.gradient[r].to(device).float().square()
                    each_by = [g2 if cost == "fisher_error" else None for cost in costs]
                    add = _adder(sums[..., at], share[:, r].to(device), c, each_by)
                    _expert(module, which[at], x, gate_up[at], down[at], one, add)
    sums /= max(1, len(routed.hidden))
    return {
        cost_metric(cost + kind, group, precision): sums[i, j, k, m].tolist()
        for i, group in enumerate(GROUPS)
        for j, precision in enumerate(options)
        for k, cost in enumerate(costs)
        for m, kind in enumerate(("", *kinds))
    }


Add = Callable[[int, int, Tensor], None]


def _expert(
    module: nn.Module,
    expert: int,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    changed: Mapping[ProjectionGroup, Sequence[Tensor]],
    add: Add,
) -> None:
    """Changes of an expert's output (n, H), before its routing weight, for inputs x (n, H) and each unit and option."""
    h = activate(module, x @ gate_up.T, expert)
    for j, weight in enumerate(changed["gate_up"]):
        add(0, j, (activate(module, x @ weight.T, expert) - h) @ down.T)
    for j, weight in enumerate(changed["down"]):
        add(1, j, h @ (weight - down).T)


def _adder(sums: Tensor, share: Tensor, c: Tensor, by: Sequence[Tensor | None]) -> Add:
    """Adds the costs of an output change to ``sums`` (groups, options, costs, kinds).

    share: (kinds, n), what each token counts for each kind; c (n, 1); by: of each cost, what squared changes are
    weighted by, (n, H), or None.
    """

    def add(group: int, option: int, change: Tensor) -> None:
        square = (change * c).square_()
        for k, weight in enumerate(by):
            weighted = square if weight is None else square * weight
            sums[group, option, k] += share @ weighted.sum(-1, dtype=torch.float64)

    return add


def _parts(items: Sequence[int], size: int) -> list[list[int]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
