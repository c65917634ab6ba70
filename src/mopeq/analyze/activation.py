"""How often experts are used, from the recorded routing alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mopeq.analyze.observe import Routed

__all__ = ["expert_tokens", "frequency", "gate_mass", "usage"]


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


def usage(
    routed: Mapping[int, Routed], experts: Mapping[int, int], names: tuple[str, ...]
) -> dict[str, dict[int, list[float]]]:
    """The metrics ``tokens``, ``frequency`` and ``gate_mass`` of every layer, those in ``names``.

    Where there are images, each is also given for image tokens (``frequency.vision``) and the others
    (``frequency.text``).
    """
    functions = {"tokens": expert_tokens, "frequency": frequency, "gate_mass": gate_mass}
    found: dict[str, dict[int, list[float]]] = {}
    for name in names:
        for layer, seen in routed.items():
            parts: dict[str, Tensor | None] = {"": None}
            if seen.vision is not None:
                parts |= {".vision": seen.vision, ".text": ~seen.vision}
            for suffix, rows in parts.items():
                values = functions[name](seen, experts[layer], rows)
                found.setdefault(name + suffix, {})[layer] = values.double().tolist()
    return found
