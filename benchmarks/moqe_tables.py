"""The tables of MoQE, made from ``benchmarks/results/moqe.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common import table


def moqe(results: Mapping[str, Any]) -> dict[str, str]:
    """Of each set: all ways of choosing on all text, differences by domain; what sets and routers cost."""
    studies = results["studies"]
    made = {f"moqe {name}": _ways(found) for name, found in studies.items()}
    made["moqe domains"] = table(
        [
            "set",
            "domain",
            "best single",
            "routed - best single, nats",
            "oracle - best single, nats",
            "sent to each variant, %",
        ],
        [row for name, found in studies.items() for row in _by_domain(name, found)],
    )
    text = {name: found for name, found in studies.items() if found["judged"]["latency"]}
    costs = [
        [name, len(found["variants"]), f"{found['bytes_once'] / 1e6:.2f}", f"{found['bytes_apart'] / 1e6:.2f}",
         f"{found['router']['parameters']:,} ({100 * found['router']['share']:.2f})", f"{found['train_seconds']:.0f}"]
        + [f"{1000 * t['router_seconds']:.2f} of {1000 * t['alone_seconds']:.1f} ({100 * t['overhead']:+.1f})"
           for t in found["judged"]["latency"]]
        for name, found in text.items()
    ]  # fmt: skip
    tokens = [f"{t['prompt_tokens']} in, {t['new_tokens']} out" for t in next(iter(text.values()))["judged"]["latency"]]
    head = ["set", "variants", "MB", "MB apart", "router's parameters (% of the model's)", "training s",
            *(f"router ms of ms, {n} (overhead %)" for n in tokens)]  # fmt: skip
    made["moqe costs"] = table(head, costs)
    rows = [
        [name, row["resident"], f"{row['bytes'] / 1e6:.1f}", row["loads"], f"{row['load_seconds']:.2f}",
         f"{row['seconds']:.2f}"]
        for name, found in text.items() for row in found["residency"]
    ]  # fmt: skip
    made["moqe residency"] = table(["set", "resident variants", "most MB", "loads", "loading s", "all s"], rows)
    return made


def _ways(found: Mapping[str, Any]) -> str:
    judged, wrong = found["judged"], found.get("wrong")
    domains = list(judged["rows"])
    rows = []
    for number, row in enumerate(judged["rows"]["all"]):
        name = row["name"]
        gap = judged["differences"]["all"].get(f"{name} - best single")
        values = [judged["rows"][d][number]["perplexity" if wrong is None else "loss"] for d in domains]
        cells = [f"{values[0]['value']:.3f} ({values[0]['low']:.3f} to {values[0]['high']:.3f})"]
        if wrong is None:
            cells += [f"{value['value']:.2f}" for value in values[1:]]
        else:
            cells += [f"{100 - 100 * wrong['rows'][d][number]['loss']['value']:.1f}" for d in domains]
        between = "best single" if name == judged["best"]["all"] else "" if gap is None else _signed(gap)
        rows.append([name, f"{judged['bytes'][name] / 1e6:.3g}", cells[0], between, *cells[1:]])
    measure = "perplexity" if wrong is None else "nats"
    others = domains[1:] if wrong is None else [f"{d}, % right" for d in domains]
    return table(["", "MB", f"{measure}, 95 %", "nats - best single, 95 %", *others], rows)


def _by_domain(name: str, found: Mapping[str, Any]) -> list[list[str]]:
    judged, rows = found["judged"], []
    for domain, gaps in judged["differences"].items():
        asked = ("routed - best single", "oracle - best single", "routed - one calibrated on all")
        cells = [_signed(gaps[gap]) if gap in gaps else "" for gap in asked]
        shares = ", ".join(f"{100 * share:.0f}" for share in judged["usage"][domain])
        rows.append([name, domain, judged["best"][domain], *cells, shares])
    return rows


def _signed(gap: Mapping[str, float]) -> str:
    return f"{gap['value']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})"
