"""Budgets: what the user writes, and the bytes it leaves for routed experts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mopeq.errors import BudgetError, MapError
from mopeq.precision import GROUPS, LEFT_OUT, Precision
from mopeq.spec import Inventory

__all__ = ["Budget", "check_budget", "expert_budget", "least_bytes", "parse_budget"]

UNITS = {"B": 1, **{f"{p}B": 10 ** (3 * i) for i, p in enumerate("KMGT", 1)},
         **{f"{p}IB": 2 ** (10 * i) for i, p in enumerate("KMGT", 1)}}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """An upper bound on size.

    kind ``bpw``: ``amount`` is the average bits per routed-expert weight, scales and zero points counted.
    kind ``bytes``: ``amount`` is the bytes of the whole checkpoint's safetensors files.
    """

    kind: Literal["bpw", "bytes"]
    amount: float
    text: str

    def __str__(self) -> str:
        return self.text


def parse_budget(value: str | float | Budget) -> Budget:
    """``3.0bpw`` or ``3.0``: bits per routed-expert weight; ``1.4GB``, ``900MB``, ``1.4GiB``: bytes of the checkpoint.

    Raises :class:`BudgetError` on anything else.
    """
    if isinstance(value, Budget):
        return value
    text = str(value).strip()
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)", text)
    unit = match[2].upper() if match else ""
    if not match or unit not in {"", "BPW", *UNITS}:
        raise BudgetError(f"budget {text!r}; expected bits per expert weight such as 3.0bpw, or a size such as 1.4GB")
    amount = float(match[1])
    if not (0 < amount < math.inf):
        raise BudgetError(f"budget {text!r} is not a positive number; give one such as 3.0bpw or 1.4GB")
    if unit in UNITS:
        return Budget("bytes", float(math.floor(amount * UNITS[unit])), text)
    return Budget("bpw", amount, text if unit else f"{text}bpw")


def expert_budget(budget: Budget, model: Inventory, rest: Mapping[str, Precision]) -> int:
    """Bytes that the routed experts may take; may be negative where the rest alone is too large for a byte budget."""
    if budget.kind == "bpw":
        return math.floor(budget.amount * model.expert_parameters / 8)
    return int(budget.amount) - _fixed(model, rest)


def check_budget(budget: Budget, model: Inventory, rest: Mapping[str, Precision], floor: int) -> int:
    """:func:`expert_budget`, if it holds the cheapest map (``floor`` expert bytes) and is at most 16 bits per weight.

    Raises :class:`BudgetError` that states the budget, the smallest and the largest one possible.
    """
    found, ceiling = expert_budget(budget, model, rest), 2 * model.expert_parameters

    def told(expert_bytes: int) -> str:
        bits = f"{_up(8 * expert_bytes / model.expert_parameters)}bpw"
        total = _megabytes(expert_bytes + _fixed(model, rest))
        return bits if budget.kind == "bpw" else f"{total} ({bits})"

    if found < floor:
        advice = "allow lower bits or larger groups" if budget.kind == "bpw" else "lower the precision of the rest"
        raise BudgetError(
            f"budget {budget} is below the smallest map that the options allow, {told(floor)}; "
            f"expected {told(floor)} to {told(ceiling)}; raise the budget, or {advice}"
        )
    if found > ceiling:
        raise BudgetError(
            f"budget {budget} is above 16 bits per expert weight; expected {told(floor)} to {told(ceiling)}; "
            "lower the budget, or keep the model as it is"
        )
    return found


def _fixed(model: Inventory, rest: Mapping[str, Precision]) -> int:
    return model.rest_bytes(rest) + model.kept_bytes + model.header_bytes


def _up(bits: float) -> str:
    """Rounded up, so that the number told is one that works."""
    return f"{math.ceil(bits * 1000 - 1e-6) / 1000:g}"


def _megabytes(count: int) -> str:
    return f"{math.ceil(count / 1e4) / 100:.2f}MB"


def least_bytes(model: Inventory, options: Sequence[Precision]) -> int:
    """Bytes of the smallest routed experts that these options allow; with 0 bits, a layer keeps those a token needs."""
    if set(options) <= {LEFT_OUT}:
        raise MapError("0 bits is the only precision to choose from; add others to the levels, such as 0,2,3,4")
    total = 0
    for index, layer in model.layers.items():
        kept = layer.top_k if LEFT_OUT in options else layer.experts
        for group in GROUPS:
            total += kept * min(model.unit_bytes(index, group, p) for p in options if p != LEFT_OUT)
    return total
