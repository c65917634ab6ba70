"""The tables of servers and of loading, for tables.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common import table

__all__ = ["fit", "loading", "serving", "soak"]


def soak(results: Mapping[str, Any]) -> dict[str, str]:
    seen, samples = results["requests"], results["samples"]
    kinds = {
        "good, whole": "ask", "good, streamed": "stream", "bad": "send_bad", "left by the client": "leave",
        "sent slowly": "send_slowly", "read slowly": "read_slowly", "never ended by the client": "never_end",
        "good, at the end": "once more",
    }  # fmt: skip
    rows = [[name, seen[key]] for name, key in kinds.items()]
    rows += [["hangs", seen.get("hangs", 0)], ["wrong answers", results["wrong_count"]]]
    tenth = len(samples) // 10
    over = [[f"{samples[i]['seconds'] / 60:.0f}", f"{samples[i]['resident_bytes'] / 1e6:.0f}", samples[i]["threads"],
             samples[i]["files"]] for i in [*range(0, len(samples) - tenth, 2 * tenth), -1]]  # fmt: skip
    return {
        "soak": table(["requests", "number"], rows),
        "soak memory": table(["minute", "resident MB", "threads", "files"], over),
    }


def fit(results: Mapping[str, Any]) -> dict[str, str]:
    """A row for each prompt; MB."""
    rows = [
        [f"{case['batch']} x {case['context']}", *(f"{count / 1e6:.0f}" for count in (
            case["checkpoint"], case["predicted"]["keys and values"], case["predicted"]["activations"],
            case["predicted"]["process"], case["predicted"]["total"], case["peak"])),
         f"{100 * (case['predicted_over_peak'] - 1):+.1f} %"]
        for case in results["cases"]
    ]  # fmt: skip
    head = ["prompt", "checkpoint", "keys and values", "activations", "process", "predicted", "measured peak", "off by"]
    return {"fit": table(head, rows)}


def loading(results: Mapping[str, Any]) -> dict[str, str]:
    ways = results["median"]
    rows = [[way, step, *(f"{value:.2f}" for value in row.values())]
            for way, steps in ways.items() for step, row in steps.items()]  # fmt: skip
    return {"loading": table(["way", "until", *next(iter(next(iter(ways.values())).values()))], rows)}


def serving(results: Mapping[str, Any]) -> dict[str, str]:
    rows = [
        [name, clients, *(f"{row[key]:.2f}" for key in ("tokens_per_second", "first_p50", "first_p99", "p50", "p99")),
         f"{found['memory_bytes'] / 2**30:.2f}", f"{row['busy']:.2f}", f"{row['tokens_per_second'] / row['busy']:.1f}"]
        for name, found in results["servers"].items() for clients, row in found["clients"].items()
    ]  # fmt: skip
    head = ["server", "clients", "tokens/s", "first text, s, p50", "p99", "answer, s, p50", "p99", "memory GiB", "busy",
            "tokens per processor s"]  # fmt: skip
    return {"serving": table(head, rows)}
