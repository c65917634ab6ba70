"""The tables of ``methods.py``, ``few_bits.py``, ``unseen.py`` and ``fitted_costs.py``, from their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common import estimate, table

MEASURED = ("each left out", "other tokens", "plain rounding")
"""Costs whose sums stand beside those of the fitted tokens."""
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


def unseen(results: Mapping[str, Any]) -> dict[str, str]:
    """KL on a domain's text with and without text of its kind in the calibration."""
    (run,) = results["runs"]
    rows = {(row["apart"], row["name"]): row for row in run["rows"]}
    names = list(dict.fromkeys(name for _, name in rows))
    body = []
    for apart in dict.fromkeys(domain for domain, _ in rows if domain):
        for name in names:
            own, without = (rows[which, name]["window_kl"][apart] for which in ("", apart))
            gap = estimate([a - b for a, b in zip(without, own, strict=True)])
            first, second = (estimate(values).value for values in (own, without))
            body.append([
                apart, name, rows[apart, name]["left_out"], f"{first:.4f}", f"{second:.4f}",
                f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})", f"{second / first:.2f}",
            ])  # fmt: skip
    head = ["text", "map at 2.25 bits", "experts left out", "KL, calibrated on all", "KL, without this kind of text",
            "difference, 95 %", "times"]  # fmt: skip
    return {"unseen": table(head, body)}


def fitted(results: Mapping[str, Any]) -> dict[str, str]:
    """Maps by costs that differ in one thing, and those costs by the number of tokens of an expert."""
    named: dict[tuple[str, float, str], dict[int, Mapping[str, Any]]] = {}
    for run in results["runs"]:
        for row in run["rows"]:
            named.setdefault((row["granularity"], row["bits"], row["cost"]), {})[run["seed"]] = row
    body = []
    for (granularity, bits, cost), by_seed in sorted(named.items(), key=lambda item: item[0][:2]):
        rows = list(by_seed.values())
        first = [named[granularity, bits, "fitted tokens"][seed] for seed in by_seed]
        means = [
            [sum(v) / len(v) for v in zip(*(row["window_kl"] for row in part), strict=True)] for part in (rows, first)
        ]
        gap = estimate([a - b for a, b in zip(*means, strict=True)])
        won = sum(a["kl"] < b["kl"] for a, b in zip(rows, first, strict=True))
        beside = [f"{gap.value:+.5f} ({gap.low:+.5f} to {gap.high:+.5f})", f"{won} of {len(rows)}"]
        which = "whole experts" if granularity == "expert" else "gate and up apart from down"
        kl = estimate(means[0]).value
        body.append([bits, which, cost, f"{kl:.5f}", *(beside if cost != "fitted tokens" else ["", ""])])
    head = ["bits", "what has one precision", "cost", "KL", "above that of the fitted tokens, 95 %", "seeds won"]
    return {"fitted costs": table(head, body), "fitted costs by tokens": _by_tokens(results)}


def _by_tokens(results: Mapping[str, Any]) -> str:
    """Sums over seeds, as multiples of what is measured on the fitted tokens."""
    runs = [run["experts"] for run in results["runs"]]
    body = []
    for rows in zip(*runs, strict=True):
        cells = [_times(rows, way, bits) for bits in ("2", "4") for way in MEASURED]
        body.append([rows[0]["least"], sum(row["experts"] for row in rows), *cells])
    ways = [f"{way}, {bits} bits" for bits in (2, 4) for way in MEASURED]
    return table(["tokens of an expert, at least", "experts, all seeds", *ways], body)


def _times(rows: Sequence[Mapping[str, Any]], way: str, bits: str) -> str:
    both = [row for row in rows if way in row]
    first, second = (sum(row[which][bits] for row in both) for which in ("fitted tokens", way))
    return f"{second / first:.2f}" if first else ""
