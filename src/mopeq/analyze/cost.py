"""What quantizing one unit costs at each precision, measured with the quantizer that will be used.

A unit is one projection group of one expert. With the unit at a precision and everything else as it was, the output of
the MoE layer changes by dz (tokens, H), the routing weight included. Per calibration token,

    output_error = sum_t sum_d dz_td^2 / tokens
    fisher_error = sum_t sum_d g_td^2 dz_td^2 / tokens

where g = dL/d(layer output) with labels drawn from the model: the diagonal of the Gauss-Newton form of the KL
divergence (the weighting of GEMQ, arXiv 2605.23078, with the true instead of the empirical Fisher). It ranks units; as
a prediction of the divergence in nats it is low, because it leaves out correlations between channels and tokens, and
tokens that a changed input sends to other experts further up. Usage is in the sum over tokens already and does not
multiply it again. Units whose expert saw no tokens cost 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mopeq.analyze.moments import CHUNK, Moments, expert_inputs
from mopeq.analyze.observe import Routed, expert_rows
from mopeq.errors import DataError
from mopeq.precision import GROUPS, Precision, ProjectionGroup
from mopeq.qtensor import dequantize
from mopeq.quantizers import Quantizer, fallback_moments
from mopeq.seam import activate
from mopeq.stats import cost_metric

__all__ = ["COSTS", "enough_tokens", "layer_costs", "quantized"]

COSTS = ("output_error", "fisher_error")
MEMORY = 1 << 30
"""Bytes of dequantized weights held at a time."""


def enough_tokens(group: ProjectionGroup, moments: Moments, minimum: int | None) -> int:
    """Tokens below which an expert's moments are filled up; unless given, a quarter of the matrix's inputs."""
    return minimum if minimum is not None else getattr(moments, group).shape[-1] // 4


def quantized(weight: Tensor, precision: Precision, quantizer: Quantizer, moments: Tensor | None) -> Tensor:
    """What is left of float32 weights (experts, out, in) at a precision; 16 bits rounds to bfloat16."""
    if precision.bits == 16:
        return weight.to(torch.bfloat16).float()
    return dequantize(quantizer(weight, precision, moments))


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

    Returns:
        ``{cost_metric name: [one value per expert]}``, means per calibration token.
    """
    if "fisher_error" in costs and routed.gradient is None:
        raise DataError("fisher_error needs gradients; this layer was observed without; use observe(gradients=True)")
    gate_up, down = weights["gate_up"], weights["down"]
    experts, device = len(gate_up), gate_up.device
    full: dict[ProjectionGroup, Tensor | None] = dict.fromkeys(GROUPS)
    if moments is not None:
        for group in GROUPS:
            enough = enough_tokens(group, moments, minimum_tokens)
            full[group] = fallback_moments(getattr(moments, group), moments.tokens, enough)[0]
    sums = torch.zeros(len(GROUPS), len(options), len(COSTS), experts, dtype=torch.float64, device=device)
    rows = expert_rows(routed, experts)
    used = [e for e in range(experts) if len(rows[e][0])]
    each = 4 * (gate_up[0].numel() + down[0].numel()) * len(options)
    with torch.no_grad():
        for part in _parts(used, max(1, memory // each)):
            changed: dict[ProjectionGroup, list[Tensor]] = {}
            for group in GROUPS:
                weight, summed = weights[group][part], full[group]
                inputs = None if summed is None else summed[part]
                changed[group] = [quantized(weight, p, quantizer, inputs) for p in options]
            for i, e in enumerate(part):
                one = {group: [weight[i] for weight in changed[group]] for group in GROUPS}
                for r, x, c in expert_inputs(routed, *rows[e], device, chunk):
                    g2 = None if routed.gradient is None else routed.gradient[r].to(device).float().square()
                    add = _adder(sums[..., e], c, g2)
                    _expert(module, e, x, gate_up[e], down[e], one, add)
    sums /= max(1, len(routed.hidden))
    return {
        cost_metric(cost, group, precision): sums[i, j, k].tolist()
        for i, group in enumerate(GROUPS)
        for j, precision in enumerate(options)
        for k, cost in enumerate(COSTS)
        if cost in costs
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


def _adder(sums: Tensor, c: Tensor, g2: Tensor | None) -> Add:
    """Adds the costs of an output change to ``sums`` (groups, options, costs); c (n, 1), g2 (n, H)."""

    def add(group: int, option: int, change: Tensor) -> None:
        square = (change * c).square_()
        sums[group, option, 0] += square.sum(dtype=torch.float64)
        if g2 is not None:
            sums[group, option, 1] += (square * g2).sum(dtype=torch.float64)

    return add


def _parts(items: Sequence[int], size: int) -> list[list[int]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
