"""Roundings of whole experts, learned: SignRound with the loss of what an expert adds to its layer's output.

Gate, up and down of one expert are learned together, through the gate function, on the tokens that the router sends to
it. With w what a token counts and c its routing weight the loss is

    sum over tokens of w c^2 |E~(x) - E(x)|^2

which is that of the MoE layer but for products of two experts' errors. AutoRound (arXiv 2309.05516) takes the output of
the decoder layer, over inputs that the layers before it have changed already; one expert at a time fits in a slab, and
does not depend on the others. :func:`mopeq.quantizers.signround` is the form for single matrices, which costs use.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mopeq.analyze import Routed, expert_rows
from mopeq.analyze.moments import expert_inputs
from mopeq.hadamard import restored, rotated
from mopeq.precision import GROUPS, Precision, ProjectionGroup
from mopeq.qtensor import Codes
from mopeq.quantizers.signround import ITERATIONS, Rounding
from mopeq.seam import activate

__all__ = ["Learned", "learned"]

TOKENS = 256
"""Tokens in one iteration, drawn anew each time."""
CHECKS = 4
"""Times on the way that the loss over all tokens is taken; the roundings of the least one count."""
Learned = dict[ProjectionGroup, Codes]
Weights = Mapping[ProjectionGroup, Tensor]


def learned(
    seen: Routed,
    module: nn.Module,
    expert: int,
    weights: Weights,
    precisions: Mapping[ProjectionGroup, Precision],
    *,
    minimum: int = 0,
    iterations: int = ITERATIONS,
) -> Learned:
    """Codes (1, rows, in) of the groups of one expert below 16 bits; the others are taken as bfloat16 stores them.

    All that is drawn depends on the expert's number alone. The loss over all its tokens never exceeds that of rounding
    to the nearest on min-max grids. Memory, in float32: some twelve times the expert's weights, and the activations of
    ``CHUNK`` tokens.

    Args:
        seen: what the layer saw.
        module: its experts module, asked for the gate function.
        expert: its number in the layer.
        weights: float32 (rows, in) of each group, gate rows first.
        precisions: of each group.
        minimum: an expert with fewer tokens is given as many more, drawn from those of the whole layer with the weights
            that they have where they went. A layer that saw none is rounded to the nearest.
        iterations: steps, of a rate that falls linearly from 1 / iterations to 0.
    """
    roundings = {
        g: Rounding((rotated(weights[g]) if p.hadamard else weights[g])[None], p)
        for g, p in precisions.items()
        if p.bits < 16
    }
    if not roundings:
        return {}
    kept = {g: weights[g].to(torch.bfloat16).float() for g in GROUPS if g not in roundings}
    draw = torch.Generator().manual_seed(expert)
    rows, scale = _tokens(seen, expert, minimum, draw)

    def error(rows: Tensor, scale: Tensor) -> Tensor:
        """The loss over some tokens of the expert."""
        made = dict(kept)
        for g, rounding in roundings.items():
            (weight,) = rounding.weight()
            made[g] = restored(weight) if precisions[g].hadamard else weight
        total = scale.new_zeros((), device=weights["down"].device)
        for r, x, c in expert_inputs(seen, rows, scale, total.device):
            with torch.no_grad():
                wanted = _output(module, expert, x, weights)
            square = (_output(module, expert, x, made) - wanted).mul(c).square().sum(-1)
            total = total + (square if seen.token_weight is None else square * seen.token_weight[r].to(square)).sum()
        return total

    least, best = torch.inf, {g: rounding.codes() for g, rounding in roundings.items()}
    if not len(rows):
        return best
    check = max(1, iterations // CHECKS)
    for turn in range(iterations + 1):
        if turn % check == 0 or turn == iterations:
            with torch.no_grad():
                loss = float(error(rows, scale))
            if loss < least:
                least, best = loss, {g: rounding.codes() for g, rounding in roundings.items()}
        if turn < iterations:
            some = torch.randint(len(rows), (min(TOKENS, len(rows)),), generator=draw)
            with torch.enable_grad():
                parameters = [p for rounding in roundings.values() for p in rounding.parameters()]
                gradients = torch.autograd.grad(error(rows[some], scale[some]), parameters)
            for i, rounding in enumerate(roundings.values()):
                rounding.step(gradients[2 * i : 2 * i + 2], (1 - turn / iterations) / iterations)
    return best


def _tokens(seen: Routed, expert: int, minimum: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows (n,) and routing weights (n,) of an expert's tokens, filled up to ``minimum``."""
    rows, scale = expert_rows(seen, [expert])[0]
    slots = (seen.index.flatten() >= 0).nonzero().flatten()
    if len(rows) < minimum and len(slots):
        more = slots[torch.randint(len(slots), (minimum - len(rows),), generator=draw)]
        rows = torch.cat([rows, more // seen.index.shape[1]])
        scale = torch.cat([scale, seen.weights.flatten()[more]])
    return rows, scale


def _output(module: nn.Module, expert: int, x: Tensor, weights: Weights) -> Tensor:
    """What an expert makes of x (n, H), before its routing weight and without the bias of down."""
    return activate(module, x @ weights["gate_up"].T, expert) @ weights["down"].T
