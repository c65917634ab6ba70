"""Tables of numbers: sizes, quality, comparison, layers; and the sums of costs that they and the maps share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mopeq.precision import FULL, GROUPS, PrecisionMap, ProjectionGroup
from mopeq.report.charts import megabytes
from mopeq.report.inputs import Estimate, Inputs, Point
from mopeq.report.maps import number, scale
from mopeq.spec import Inventory, fitting
from mopeq.stats import Stats, cost_metric, cost_options

__all__ = [
    "Table",
    "layer_table",
    "level_table",
    "matrices",
    "percentage",
    "point_table",
    "predicted_loss",
    "quality_table",
    "sensitivity",
    "size_table",
    "task_table",
]

COSTS = ("fisher_error", "output_error")
NAMES = {
    "attention": "Attention", "dense_mlp": "Dense layers", "shared_experts": "Shared experts", "lm_head": "Output head",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Rows of text; ``strong`` are the rows to set off; the first column is a heading."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()


def level_table(precisions: PrecisionMap | None) -> Table | None:
    """How many experts have each precision."""
    if precisions is None:
        return None
    total = sum(precisions.histogram().values())
    rows = []
    for precision in precisions.histogram():
        counts = [sum(p == precision for row in precisions.experts[g].values() for p in row) for g in GROUPS]
        rows.append((str(precision), *(f"{n:,}" for n in counts), f"{100 * sum(counts) / total:.1f} %"))
    return Table("Experts at each precision", ("precision", "gate and up", "down", "share"), tuple(rows))


def point_table(points: Sequence[Point]) -> Table | None:
    """The models of ``frontier.json``; columns that nobody measured are left out."""
    if not points:
        return None

    def kl(p: Point) -> str:
        if p.kind == "original" or p.kl is None:
            return "0" if p.kind == "original" else ""
        span = f" [{number(p.kl_low)}, {number(p.kl_high)}]" if p.kl_low is not None and p.kl_high is not None else ""
        return number(p.kl) + span

    columns: dict[str, Callable[[Point], str]] = {
        "model": lambda p: p.name,
        "bits per expert weight": lambda p: _fixed(p.expert_bits, 3),
        "on disk": lambda p: megabytes(p.bytes) if p.bytes is not None else "",
        "resident": lambda p: megabytes(p.resident_bytes) if p.resident_bytes is not None else "",
        "perplexity": lambda p: _fixed(p.perplexity, 3),
        "KL, nats per token [95 %]": kl,
        "same top token": lambda p: percentage(p.top1) if p.top1 is not None else "",
        "predicted loss": lambda p: number(p.predicted_loss) if p.predicted_loss is not None else "",
    }
    texts = {head: [text(p) for p in points] for head, text in columns.items()}
    kept = {head: column for head, column in texts.items() if any(column)}
    strong = frozenset(i for i, p in enumerate(points) if p.kind == "mixed")
    return Table("All models that were compared", tuple(kept), tuple(zip(*kept.values(), strict=True)), strong)


def size_table(inventory: Inventory | None, precisions: PrecisionMap | None) -> Table | None:
    """Bytes of each part of the checkpoint, at 16 bits and packed."""
    if inventory is None or precisions is None:
        return None
    rows = [("Routed experts", inventory.expert_parameters, f"{inventory.expert_bits(precisions):.3f} bits",
             inventory.expert_bytes(precisions))]  # fmt: skip
    for group, shapes in inventory.linears.items():
        asked = precisions.rest.get(group, FULL)
        weights = sum(out * inp * n for out, inp, n in shapes)
        size = sum(n * fitting(asked, out, inp).nbytes(out, inp) for out, inp, n in shapes)
        used = sorted({fitting(asked, out, inp) for out, inp, _ in shapes})
        rows.append((NAMES.get(group, group), weights, ", ".join(map(str, used)), size))
    kept = inventory.kept_bytes
    rows.append(("Embeddings, norms, routers and the rest", inventory.kept_parameters, "as stored", kept))
    rows.append(("File headers, at most", 0, "", inventory.header_bytes))
    total = inventory.total_bytes(precisions)
    rows.append(("Whole checkpoint, at most", inventory.parameters, "", total))
    made = tuple(
        (
            name,
            f"{n:,}" if n else "",
            how,
            megabytes(2 * n) if n else "",
            megabytes(size),
            f"{100 * size / total:.1f} %",
        )
        for name, n, how, size in rows
        if size or n
    )
    head = ("part", "weights", "stored as", "at 16 bits", "packed", "share")
    return Table("Where the bytes are", head, made, frozenset({len(made) - 1}))


def quality_table(inputs: Inputs) -> Table | None:
    """What ``evaluation.json`` says of quality and speed, and the predicted loss beside it."""
    judged = inputs.judged
    if judged is None:
        return None
    rows: list[tuple[str, str, str]] = []

    def add(name: str, own: Estimate | None, original: Estimate | None = None, percent: bool = False) -> None:
        if own is not None:
            show = percentage if percent else _three if own.value >= 1 else number
            span = "" if own.low is None or own.high is None else f" [{show(own.low)}, {show(own.high)}]"
            rows.append((name, show(own.value) + span, show(original.value) if original else ""))

    add("perplexity", judged.perplexity, judged.reference_perplexity)
    if judged.bits_per_byte is not None:
        original = judged.reference_bits_per_byte
        add(
            "bits per byte of text",
            Estimate(judged.bits_per_byte, None, None),
            None if original is None else Estimate(original, None, None),
        )
    add("KL to the original, nats per token", judged.kl)
    add("same most likely token", judged.agreement, percent=True)
    predicted = predicted_loss(inputs.stats, inputs.precisions)
    if predicted is not None:
        rows.append((f"predicted loss ({predicted[0]})", number(predicted[1]), ""))
    if judged.tokens:
        rows.append(("tokens scored", f"{judged.tokens:,}", ""))
    for key, name in (("prefill", "prefill, tokens per second"), ("decode", "decode, tokens per second")):
        if isinstance(judged.speed.get(key), (int, float)):
            rows.append((name, f"{judged.speed[key]:,.1f}", ""))
    return Table("Measured", ("quantity", "quantized [95 %]", "original"), tuple(rows)) if rows else None


def task_table(inputs: Inputs) -> Table | None:
    """Scores of tasks."""
    if inputs.judged is None or not inputs.judged.tasks:
        return None
    heads = ["task", "metric", "score", "95 % interval", "documents"]
    rows = [
        [t.task, t.metric, f"{t.score.value:.4f}", _span(t.score), f"{t.documents:,}" if t.documents else ""]
        for t in inputs.judged.tasks
    ]
    if any(t.difference is not None for t in inputs.judged.tasks):
        heads += ["original", "difference", "its 95 % interval"]
        for t, row in zip(inputs.judged.tasks, rows, strict=True):
            row += ["" if one is None else f"{one.value:.4f}" for one in (t.reference, t.difference)]
            row.append("" if t.difference is None else _span(t.difference))
    return Table("Tasks", tuple(heads), tuple(map(tuple, rows)))


def _span(value: Estimate) -> str:
    return "" if value.low is None or value.high is None else f"{value.low:.4f} to {value.high:.4f}"


def layer_table(stats: Stats | None, precisions: PrecisionMap | None) -> Table | None:
    """One row a layer: mean bits, summed sensitivity, tokens."""
    columns: dict[str, dict[int, str]] = {}
    if precisions is not None:
        for group in GROUPS:
            rows = precisions.experts[group].items()
            columns[f"mean bits, {matrices(group)}"] = {k: f"{sum(p.bits for p in r) / len(r):.2f}" for k, r in rows}
    for group, (caption, values, _) in sensitivity(stats, precisions).items():
        head = f"{caption.split()[0]}, {matrices(group)}, sum at {caption.split()[-1]}"
        columns[head] = {k: number(sum(r)) for k, r in values.items()}
    if stats is not None and "tokens" in stats.metrics:
        tokens = stats.metrics["tokens"].items()
        columns["fewest tokens"] = {k: f"{min(r):,.0f}" for k, r in tokens}
        columns["most tokens"] = {k: f"{max(r):,.0f}" for k, r in tokens}
    if not columns:
        return None
    layers = sorted(next(iter(columns.values())))
    rows_ = tuple((str(k), *(column[k] for column in columns.values())) for k in layers)
    return Table("Bits, sensitivity and tokens of each layer", ("layer", *columns), rows_)


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _cost_name(stats: Stats, precisions: PrecisionMap | None) -> str | None:
    asked = precisions.note.get("cost") if precisions else None
    return next((c for c in (asked, *COSTS) if isinstance(c, str) and cost_options(stats, c)), None)


def sensitivity(
    stats: Stats | None, precisions: PrecisionMap | None
) -> dict[ProjectionGroup, tuple[str, Mapping[int, Sequence[float]], tuple[float, float, bool]]]:
    """Caption, values and shared scale of each group's cost at the lowest precision that it was measured at."""
    cost = _cost_name(stats, precisions) if stats else None
    if stats is None or cost is None:
        return {}
    lowest = cost_options(stats, cost)[0]
    rows = {group: stats.metrics[cost_metric(cost, group, lowest)] for group in GROUPS}
    bounds = scale(*rows.values())
    return {group: (f"{cost} of each expert alone at {lowest}", rows[group], bounds) for group in GROUPS}


def predicted_loss(stats: Stats | None, precisions: PrecisionMap | None) -> tuple[str, float] | None:
    """The cost by which the map was made, summed over its units; None where a precision of the map was not measured."""
    cost = _cost_name(stats, precisions) if stats else None
    if stats is None or precisions is None or cost is None:
        return None
    total = 0.0
    for group in GROUPS:
        for layer, row in precisions.experts[group].items():
            for expert, precision in enumerate(row):
                values = stats.metrics.get(cost_metric(cost, group, precision))
                if values is None:
                    return None
                total += values[layer][expert]
    return cost, total


def matrices(group: ProjectionGroup) -> str:
    """A projection group in words."""
    return "gate and up" if group == "gate_up" else "down"


def percentage(share: float) -> str:
    """A share of 1 in percent, with more digits close to all of it."""
    return f"{100 * share:.2f} %" if share < 0.9995 or share == 1 else f"{100 * share:.4f} %"


def _three(value: float) -> str:
    return f"{value:.3f}"
