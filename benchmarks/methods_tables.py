"""The tables of ``methods.py`` and ``few_bits.py``, from the results of their runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common import table

HEAD = ["map", "seed", "MB of experts", "KL", "KL without", "difference, 95 %", "of it"]


def methods(results: Mapping[str, Any]) -> dict[str, str]:
    """One table for each study: what it made, beside what it was made from."""
    made = {}
    for study in dict.fromkeys(row["study"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["study"] == study and "than" in row]
        if rows:
            made[f"methods {study}"] = table(HEAD, [_line(row) for row in rows])
    return made


def _line(row: Mapping[str, Any]) -> list[str]:
    share = 100 * row["difference"] / row["than"]
    return [
        row["name"], str(row["seed"]), f"{row['expert_bytes'] / 1e6:.3f}", f"{row['kl']:.5f}", f"{row['than']:.5f}",
        f"{row['difference']:+.5f} ({row['low']:+.5f} to {row['high']:+.5f}), {share:+.1f} %", _fact(row),
    ]  # fmt: skip


def _fact(row: Mapping[str, Any]) -> str:
    if "of_them_unseen" in row:
        return f"{row['left_out']} experts, {row['of_them_unseen']} of them without tokens"
    if row.get("left_out") is not None:
        return f"{row['left_out']} experts left out"
    if "exchanges" in row:
        return f"{row['exchanges']} exchanges"
    if "with_residual" in row:
        return f"{row['with_residual']} of {row['units']} units with one"
    if "units_that_differ" in row:
        return f"{row['units_that_differ']} units differ"
    if "short" in row:
        return f"experts below {row['wanted']} tokens: {row['short'][0]} to {row['short'][1]}"
    if "same_experts" in row:
        return f"same experts: {100 * row['same_experts'][0]:.1f} to {100 * row['same_experts'][1]:.1f} %"
    return ""
