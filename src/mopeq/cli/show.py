"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from mopeq.precision import GROUPS, Precision, PrecisionMap
from mopeq.progress import Track, drawn, events
from mopeq.spec import Inventory
from mopeq.stats import Stats

if TYPE_CHECKING:
    from mopeq.evaluate import Estimate, Evaluation

__all__ = [
    "count",
    "evaluation_table",
    "following",
    "map_table",
    "megabytes",
    "print_balance",
    "print_json",
    "print_result",
    "print_starved",
    "print_super",
    "ranges",
    "table",
    "write",
]


def write(text: str) -> None:
    """Print a piece of text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(record: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    print(json.dumps(record, indent=1, allow_nan=False))


def print_result(record: Mapping[str, Any]) -> None:
    """Print the last of the events that :func:`following` writes with ``--json``: what came out."""
    print(json.dumps({"event": "result", **record}, allow_nan=False))


def following(options: argparse.Namespace) -> AbstractContextManager[Track]:
    """Progress of a long command: bars on a terminal, with ``--json`` events."""
    return events() if options.json else drawn()


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False).print(table)


def map_table(precisions: PrecisionMap, inventory: Inventory) -> None:
    """Print how many units got which precision, and what the map weighs and predicts."""
    rows = []
    for group in GROUPS:
        counts: dict[Precision, int] = {}
        for row in precisions.experts[group].values():
            for precision in row:
                counts[precision] = counts.get(precision, 0) + 1
        rows += [(group, precision, count) for precision, count in sorted(counts.items())]
    table("Precisions of the routed experts", ("group", "precision", "experts"), rows)
    total = inventory.total_bytes(precisions)
    print(f"{inventory.expert_bits(precisions):.3f} bits per expert weight, at most {megabytes(total)} MB in all")
    if held := precisions.note.get("super_experts"):
        print(f"super-experts at the most bits on offer: {', '.join(held)}")
    loss = precisions.note.get("predicted_loss")
    if loss is not None:
        print(f"predicted {precisions.note.get('cost', 'loss')}: {float(loss):.5g} a token")


def evaluation_table(found: Evaluation) -> None:
    """Print what was measured."""
    rows: list[tuple[str, str]] = [("resident", f"{megabytes(found.resident_bytes)} MB")]
    if found.reference_perplexity:
        rows.append(("perplexity of the original", _estimate(found.reference_perplexity.perplexity)))
    if found.perplexity:
        rows.append(("perplexity", _estimate(found.perplexity.perplexity)))
    if found.divergence:
        rows.append(("KL to the original, nats a token", _estimate(found.divergence.kl)))
        rows.append(("top-1 agreement", _estimate(found.divergence.agreement)))
    for task in found.tasks:
        than = "" if task.difference is None else f", {_estimate(task.difference)} above the original"
        rows.append((f"{task.task}, {task.metric}", _estimate(task.score) + than))
    if found.speed:
        rows.append(("prefill", f"{found.speed.prefill:.1f} tokens/s"))
        rows.append(("decode", f"{found.speed.decode:.1f} tokens/s"))
    table("Evaluation", ("", "value [95 % interval]"), rows)


def _estimate(value: Estimate) -> str:
    ends = "" if value.low is None or value.high is None else f" [{value.low:.4g}, {value.high:.4g}]"
    return f"{value.value:.5g}{ends}"


def print_starved(stats: Stats) -> None:
    """Name the experts that saw few tokens."""
    starved: Mapping[str, int] = stats.info.get("starved") or {}
    if starved:
        some = ", ".join(f"{name} ({count})" for name, count in list(starved.items())[:8])
        more = " ..." if len(starved) > 8 else ""
        print(f"{len(starved)} experts saw fewer than {stats.info['minimum_tokens']} tokens: {some}{more}")


def print_super(found: Mapping[str, float]) -> None:
    """Name the super-experts, if there are any."""
    if found:
        from mopeq.allocate.protect import super_sentence

        print(super_sentence(found))


def print_balance(info: Mapping[str, Any]) -> None:
    """Say what choosing calibration sequences changed."""
    found: Mapping[str, int] = info.get("balance") or {}
    if found:
        print(
            f"{found['taken']} of {found['pool']} sequences chosen: experts with fewer than {found['least']} tokens "
            f"{found['short_before']} -> {found['short_after']}, fewest tokens of one {found['fewest_before']} -> "
            f"{found['fewest_after']}"
        )


def megabytes(count: int) -> str:
    """Bytes as megabytes (10**6)."""
    return f"{count / 1e6:.2f}"


def count(number: int) -> str:
    """A number of weights."""
    return f"{number / 1e9:.3f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def ranges(numbers: Sequence[int]) -> str:
    """``0-2, 5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
