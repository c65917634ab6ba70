"""How often experts are used, from the recorded routing alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mopeq.analyze.observe import Routed
from mopeq.errors import DataError

__all__ = ["USAGE", "expert_tokens", "frequency", "gate_mass", "gradient_norm", "usage"]

USAGE = ("tokens", "frequency", "gate_mass", "gradient_norm")
"""What :func:`usage` measures."""


def expert_tokens(routed: Routed, experts: int, rows: Tensor | None = None) -> Tensor:
    """Tokens routed to each expert, int64 (experts,); of the tokens that ``rows`` (bool) marks, or all."""
    index = routed.index if rows is None else routed.index[rows]
    return torch.bincount(index[index >= 0], minlength=experts)


def frequency(routed: Routed, experts: int, rows: Tensor | None = None) -> Tensor:
    """Share of all routed slots that each expert took, float64 (experts,): sums to 1, or 0 where there are none."""
    counts = expert_tokens(routed, experts, rows).double()
    return counts / counts.sum().clamp_min(1)


def gate_mass(routed: Routed, experts: int, rows: Tensor | None = None) -> Tensor:
    """Sum of the routing weights given to each expert, float64 (experts,)."""
    index, weights = (routed.index, routed.weights) if rows is None else (routed.index[rows], routed.weights[rows])
    chosen = index >= 0
    return torch.bincount(index[chosen], weights[chosen].double(), minlength=experts)


def gradient_norm(routed: Routed, experts: int, rows: Tensor | None = None) -> Tensor:
    """Mean length of the loss gradient at the layer's output over each expert's measured tokens, float64 (experts,).

    The loss is that of :func:`~mopeq.analyze.observe.observe`. 0 for an expert without tokens. Between text and image
    tokens its ratio is VEQ's modality weight (arXiv 2602.01037).
    """
    if routed.gradient is None:
        raise DataError("gradient_norm needs gradients; this layer was observed without; use observe(gradients=True)")
    part, rows = routed.part(), rows if rows is None or routed.measured is None else rows[routed.measured]
    index = part.index if rows is None else part.index[rows]
    length = routed.gradient if rows is None else routed.gradient[rows]
    norms = length.float().norm(dim=-1).double()[:, None].expand(index.shape)
    chosen = index >= 0
    total = torch.bincount(index[chosen], norms[chosen], minlength=experts)
    return total / expert_tokens(part, experts, rows).clamp_min(1)


def usage(
    routed: Mapping[int, Routed], experts: Mapping[int, int], names: tuple[str, ...]
) -> dict[str, dict[int, list[float]]]:
    """The metrics of :data:`USAGE` of every layer, those in ``names``.

    Where there are images, each is also given for image tokens (``frequency.vision``) and the others
    (``frequency.text``). All are counts: a weight of tokens does not enter them.
    """
    functions = {
        "tokens": expert_tokens,
        "frequency": frequency,
        "gate_mass": gate_mass,
        "gradient_norm": gradient_norm,
    }
    found: dict[str, dict[int, list[float]]] = {}
    for name in names:
        for layer, seen in routed.items():
            parts: dict[str, Tensor | None] = {"": None, **seen.kinds()}
            for suffix, rows in parts.items():
                values = functions[name](seen, experts[layer], rows)
                found.setdefault(name + suffix, {})[layer] = values.double().tolist()
    return found
