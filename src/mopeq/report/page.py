"""What stands on the page: numbers, pictures and tables, from the records of the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mopeq.allocate.protect import super_experts, super_sentence
from mopeq.precision import GROUPS, PrecisionMap
from mopeq.report.charts import Plot, coverage, frontier, megabytes, prediction
from mopeq.report.inputs import Estimate, Inputs
from mopeq.report.maps import TONES, HeatMap, bit_map, number, scale, value_map
from mopeq.report.tables import (
    layer_table,
    level_table,
    matrices,
    percentage,
    point_table,
    quality_table,
    sensitivity,
    size_table,
    task_table,
)
from mopeq.stats import Stats

__all__ = ["Missing", "Starved", "Tile", "page"]

SCORES = ("hessian_trace", "fisher", "inverse_norm")
RAMPS = {
    "bits": (("#dfebf7", "#4f94cd", "#08306b"), ("#16304a", "#2f78ba", "#d6eaff")),
    "cost": (("#fcecd4", "#dd8a33", "#6b2503"), ("#38230d", "#b5691f", "#ffe6c4")),
    "use": (("#e0f2e8", "#40a07a", "#00402c"), ("#102f24", "#2f9069", "#d2f7e6")),
}
"""Ends and middle of each colour ramp, light page then dark: lightness alone orders them, so hue need not be seen."""


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Missing:
    """A part that is left out, and the command that makes its file."""

    sentence: str
    command: str


def page(inputs: Inputs) -> dict[str, Any]:
    """Everything that the template prints."""
    stats, precisions, points = inputs.stats, inputs.precisions, inputs.points or ()
    return {
        "ramps": {name: list(zip(_ramp(light), _ramp(dark), strict=True)) for name, (light, dark) in RAMPS.items()},
        "high": [f"t{i}" for i in range(TONES // 2, TONES)],
        "name": inputs.run.model if inputs.run and inputs.run.model else inputs.name,
        "folder": inputs.name,
        "facts": _facts(inputs),
        "tiles": _tiles(inputs),
        "maps": _maps(stats, precisions),
        "levels": level_table(precisions),
        "coverage": _coverage(stats),
        "starved": _starved(stats),
        "supers": super_sentence(super_experts(stats)) if stats else "",
        "enough": stats.info.get("minimum_tokens") if stats else None,
        "fallbacks": inputs.run.fallbacks if inputs.run else (),
        "plots": [plot for plot in (frontier(points), prediction(points)) if plot is not None],
        "points": point_table(points),
        "sizes": size_table(inputs.inventory, precisions),
        "judged": quality_table(inputs),
        "tasks": task_table(inputs),
        "layers": layer_table(stats, precisions),
        "run": inputs.run,
        "seconds": _seconds(inputs),
        "choice": _settings(precisions.note if precisions else {}),
        "measured": _settings(stats.info if stats else inputs.run.calibration if inputs.run else {}, ("starved",)),
        "evaluated": _settings(inputs.judged.info if inputs.judged else {}),
        "missing": _missing(inputs),
    }


def _ramp(stops: Sequence[str]) -> list[str]:
    """``TONES`` colours through three stops, straight lines in RGB."""
    ends = [tuple(int(stop[i : i + 2], 16) for i in (1, 3, 5)) for stop in stops]
    shades = []
    for i in range(TONES):
        place = i / (TONES - 1) * 2
        a, b = (ends[0], ends[1]) if place < 1 else (ends[1], ends[2])
        share = place if place < 1 else place - 1
        shades.append("#" + "".join(f"{round(x + (y - x) * share):02x}" for x, y in zip(a, b, strict=True)))
    return shades


def _missing(inputs: Inputs) -> dict[str, Missing]:
    parts = {
        "stats": (inputs.stats, "No stats.json here, so sensitivity, frequency and coverage are left out; made by",
                  "mopeq analyze MODEL --metrics frequency,fisher_error -o DIR/mopeq/stats.json"),
        "precision": (inputs.precisions, "No precision.json here, so the bit map is left out; made by",
                      "mopeq allocate DIR/mopeq/stats.json --budget 2.5bpw -o DIR/mopeq/precision.json"),
        "evaluation": (inputs.judged, "No evaluation.json here, so measured quality is left out; made by",
                       "mopeq eval DIR --against MODEL"),
        "run": (inputs.run, "No run.json here, so command lines and versions are left out; made by",
                "mopeq quantize MODEL -o DIR --budget 2.5bpw"),
        "frontier": (inputs.points, "No frontier.json here, so comparison with uniform precision is left out; made by",
                     "mopeq quickstart"),
    }  # fmt: skip
    return {name: Missing(sentence, command) for name, (found, sentence, command) in parts.items() if found is None}


def _facts(inputs: Inputs) -> list[str]:
    facts = []
    inventory = inputs.inventory
    if inventory is not None:
        shapes = list(inventory.layers.values())
        experts, chosen = sorted({s.experts for s in shapes}), sorted({s.top_k for s in shapes})
        facts.append(inventory.model_type)
        facts.append(f"{_count(inventory.parameters)} parameters")
        facts.append(f"{len(shapes)} MoE layers of {_among(experts)} experts, {_among(chosen)} for each token")
    elif inputs.precisions is not None:
        layers = inputs.precisions.layers
        facts.append(f"{len(layers)} MoE layers of {_among(sorted(set(layers.values())))} experts")
    if inputs.run and inputs.run.method:
        facts.append(f"quantized with {inputs.run.method}")
    if inputs.run and inputs.run.date:
        facts.append(inputs.run.date)
    return facts


def _among(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _count(n: float) -> str:
    return f"{n / 1e9:.2f} billion" if n >= 1e9 else f"{n / 1e6:.1f} million" if n >= 1e6 else f"{n:,.0f}"


def _span(estimate: Estimate, percent: bool = False) -> str:
    if estimate.low is None or estimate.high is None:
        return "no interval: one window"
    low, high = (f"{100 * v:.2f} %" if percent else number(v) for v in (estimate.low, estimate.high))
    return f"95 % interval {low} to {high}"


def _tiles(inputs: Inputs) -> list[Tile]:
    tiles = []
    inventory, precisions, run, judged = inputs.inventory, inputs.precisions, inputs.run, inputs.judged
    packed = run.bytes if run and run.bytes else None
    if packed is None and inventory and precisions:
        packed = inventory.total_bytes(precisions)
    before = run.original_bytes if run and run.original_bytes else None
    if before is None and inventory:
        before = 2 * inventory.parameters
    if packed:
        note = f"from {megabytes(before)}: {before / packed:.2f} times smaller" if before else "packed checkpoint"
        tiles.append(Tile("Size on disk", megabytes(packed), note))
    if inventory and precisions:
        bits = inventory.expert_bits(precisions)
        tiles.append(Tile("Bits per expert weight", f"{bits:.3f}", "in routed experts; scales and zero points counted"))
    if judged and judged.kl:
        tiles.append(Tile("KL to the original", number(judged.kl.value), f"nats per token; {_span(judged.kl)}"))
    if judged and judged.agreement:
        share = judged.agreement
        tiles.append(Tile("Same most likely token", percentage(share.value), _span(share, percent=True)))
    if judged and judged.perplexity:
        original = judged.reference_perplexity
        note = f"original {original.value:.3f}" if original else _span(judged.perplexity)
        tiles.append(Tile("Perplexity", f"{judged.perplexity.value:.3f}", note))
    if judged and judged.resident_bytes:
        original_bytes = judged.reference_resident_bytes
        note = f"weights and buffers; original {megabytes(original_bytes)}" if original_bytes else "weights and buffers"
        tiles.append(Tile("Resident in memory", megabytes(judged.resident_bytes), note))
    return tiles


def _maps(stats: Stats | None, precisions: PrecisionMap | None) -> list[HeatMap]:
    """Bits and sensitivity side by side for gate_up, then for down, then frequencies."""
    maps: list[HeatMap] = []
    costs = sensitivity(stats, precisions)
    levels = list(precisions.histogram()) if precisions else []
    for group in GROUPS:
        if precisions is not None:
            title = f"Bits of {matrices(group)}"
            maps.append(bit_map(f"bits-{group}", title, "precision of each expert", precisions.experts[group], levels))
        if group in costs:
            caption, rows, bounds = costs[group]
            title = f"Sensitivity of {matrices(group)}"
            maps.append(value_map(f"cost-{group}", "cost", title, caption, rows, bounds, _plain(rows), "no tokens"))
    if stats is not None and not costs:
        name = next((n for n in SCORES if n in stats.metrics), None)
        if name is not None:
            rows = stats.metrics[name]
            maps.append(value_map("cost", "cost", "Sensitivity", name, rows, scale(rows), _plain(rows), "zero"))
    return maps + _uses(stats)


def _uses(stats: Stats | None) -> list[HeatMap]:
    """Which experts tokens go to; where there were images, which text tokens do and which image tokens."""
    metrics = {} if stats is None else stats.metrics
    made = []
    for kind, what in (("", ""), (".text", " text"), (".vision", " image")):
        if rows := metrics.get(f"frequency{kind}"):
            caption = f"share of the layer's routed{what} tokens that went to each expert"
            title, name = f"Frequency of{what} tokens" if kind else "Frequency", f"frequency{kind.replace('.', '-')}"
            said = _used(rows, metrics.get(f"tokens{kind}"))
            made.append(value_map(name, "use", title, caption, rows, scale(rows), said, "no tokens", _share))
    return made


def _used(
    rows: Mapping[int, Sequence[float]], tokens: Mapping[int, Sequence[float]] | None
) -> Callable[[int, int], str]:
    def said(layer: int, expert: int) -> str:
        seen = f", {tokens[layer][expert]:,.0f} tokens" if tokens else ""
        return _share(rows[layer][expert]) + seen

    return said


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _plain(rows: Mapping[int, Sequence[float]]) -> Callable[[int, int], str]:
    return lambda layer, expert: number(rows[layer][expert])


def _coverage(stats: Stats | None) -> Plot | None:
    if stats is None or "tokens" not in stats.metrics:
        return None
    enough = stats.info.get("minimum_tokens")
    return coverage(stats.metrics["tokens"], float(enough) if isinstance(enough, (int, float)) and enough > 0 else None)


@dataclass(frozen=True)
class Starved:
    """Experts with too few tokens: how many, and ``(layer, ((name, tokens), ...))``."""

    count: int
    layers: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


def _starved(stats: Stats | None) -> Starved | None:
    """Experts by name, as ``stats.info["starved"]`` lists them; None where it was not measured."""
    if stats is None or "starved" not in stats.info:
        return None
    named = stats.info["starved"]
    found = dict(named) if isinstance(named, Mapping) else dict.fromkeys(named, "")
    layers: dict[str, list[tuple[str, str]]] = {}
    for name, tokens in found.items():
        text = f"{tokens:,}" if isinstance(tokens, int) else str(tokens)
        layers.setdefault(str(name).rpartition(".")[0], []).append((str(name), text))
    return Starved(len(found), tuple((layer, tuple(layers[layer])) for layer in sorted(layers, key=_by_number)))


def _by_number(layer: str) -> tuple[bool, int, str]:
    """3 before 10 before 2.vision, whatever else there is last."""
    number, _, kind = layer.partition(".")
    return bool(kind), int(number) if number.isdecimal() else 1 << 30, layer


def _seconds(inputs: Inputs) -> list[tuple[str, str]]:
    """Seconds of each stage and their sum."""
    seconds = dict(inputs.run.seconds) if inputs.run else {}
    return [(k, f"{v:,.1f}") for k, v in {**seconds, "together": sum(seconds.values())}.items()] if seconds else []


def _settings(data: Mapping[str, Any], leave_out: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Facts as text, in the order of the file."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{k} {text(v)}" for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return ", ".join(map(text, value))
        return number(value) if isinstance(value, float) else str(value)

    return [
        (str(k).replace("_", " "), text(v)) for k, v in data.items() if k not in leave_out and v not in (None, {}, [])
    ]
