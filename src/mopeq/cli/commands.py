"""What each command does: one public function, and a table of what came out."""

from __future__ import annotations

import argparse
from pathlib import Path

from mopeq.cli import show
from mopeq.cli.align import alignment_of
from mopeq.cli.applies import check_allocate, check_quantize
from mopeq.cli.fit import fitted
from mopeq.cli.given import (
    calibration_of,
    dtype_of,
    new_file,
    one_precision,
    outside_of,
    precisions_of,
    rest_of,
    size_of,
)
from mopeq.cli.images import do_quickstart_vlm
from mopeq.cli.recipes import recipe_line
from mopeq.cli.spread import spread
from mopeq.precision import DEFAULT_REST, PrecisionMap
from mopeq.progress import drawn
from mopeq.stats import Stats, read_json, write_json

__all__ = [
    "do_allocate",
    "do_analyze",
    "do_describe",
    "do_quantize",
    "do_quickstart",
    "do_report",
]


def do_quickstart(options: argparse.Namespace) -> None:
    """Run the main job on a bundled model."""
    if options.vlm:
        return do_quickstart_vlm(options)
    from mopeq.quickstart import quickstart

    with drawn() as track:
        result = quickstart(options.out, command=options.command_line, track=track)
    if options.json:
        return show.print_json(result.to_json())
    rows = [
        (
            point.name,
            f"{point.expert_bits:.2f}",
            show.megabytes(point.bytes),
            show.megabytes(point.resident_bytes),
            f"{point.perplexity:.3f}",
            "" if point.kl is None else f"{point.kl:.4f} [{point.kl_low:.4f}, {point.kl_high:.4f}]",
            "" if point.top1 is None else f"{100 * point.top1:.1f} %",
        )
        for point in result.points
    ]
    heads = ("model", "bits/weight", "MB on disk", "MB resident", "perplexity", "KL, nats [95 %]", "top-1 equal")
    show.table(f"Bundled model, {result.tokens} held-out tokens", heads, rows)
    print("\n".join(result.sentences))
    print(f"report: {result.report}")
    return None


def do_describe(options: argparse.Namespace) -> None:
    """Show what is understood of a model."""
    from mopeq.adapters import coverage, groups_table, inventory_of
    from mopeq.adapters import describe as described
    from mopeq.source import open_source

    source = open_source(options.model)
    spec = described(source)
    inventory = inventory_of(source, spec)
    groups = groups_table(spec, source)
    covered = coverage(groups)
    if options.json:
        found = {"model": inventory.to_json(), "groups": [vars(row) for row in groups], "coverage": covered}
        return show.print_json(found)
    print(f"{options.model}: {spec.model_type}, {show.count(inventory.parameters)} parameters")
    runs: dict[tuple[int, ...], list[int]] = {}
    for layer in spec.layers:
        key = (len(layer.experts), layer.top_k, layer.hidden_size, layer.intermediate_size)
        runs.setdefault(key, []).append(layer.index)
    layers = [(show.ranges(numbers), *key) for key, numbers in runs.items()]
    show.table("Routed experts", ("layers", "experts", "per token", "hidden size", "expert width"), layers)
    rows = [
        (row.group, row.tensors, show.count(row.parameters), show.megabytes(row.nbytes), row.treatment, row.precision)
        for row in groups
    ]
    show.table("Parameters", ("group", "tensors", "weights", "MB", "treatment", "default precision"), rows)
    print(f"{100 * covered:.1f} % of the weights are quantized; every tensor is accounted for.")
    return None


def do_analyze(options: argparse.Namespace) -> None:
    """Measure every expert."""
    from mopeq.allocate import super_experts
    from mopeq.measure import measure, open_model

    metrics = [name.strip() for name in options.metrics.split(",") if name.strip()]
    out = new_file(options.out)
    model = open_model(options.model).inventory
    with show.following(options) as track, spread(options) as across:
        stats = measure(
            options.model,
            metrics,
            calibration=calibration_of(options),
            options=precisions_of(options, model),
            quantizer=options.method,
            dtype=dtype_of(options),
            out=out,
            resume=options.resume,
            max_memory=size_of(options.max_memory),
            command=options.command_line,
            across=across,
            track=track,
        )
    if options.json:
        return show.print_result({"out": str(out), "info": dict(stats.info), "metrics": sorted(stats.metrics)})
    rows = []
    for name, values in stats.metrics.items():
        flat = sorted(value for row in values.values() for value in row)
        rows.append((name, *(f"{flat[int(q * (len(flat) - 1))]:.4g}" for q in (0, 0.25, 0.5, 0.75, 1))))
    show.table("Metrics over experts", ("metric", "least", "25 %", "median", "75 %", "most"), rows)
    show.print_balance(stats.info)
    show.print_starved(stats)
    show.print_super(super_experts(stats))
    print(f"wrote {out}")
    return None


def do_allocate(options: argparse.Namespace) -> None:
    """Give every expert a precision."""
    from mopeq.allocate import allocate

    check_allocate(options)
    out = new_file(options.out)
    stats = Stats.from_json(read_json(options.stats))
    made = allocate(
        stats,
        method=options.method,
        budget=fitted(options, stats.model) if options.fit else options.budget,
        cost=options.cost,
        score=options.score,
        scope=options.scope,
        options=precisions_of(options, stats.model) if options.levels else None,
        granularity=options.granularity,
        uniform_layers=options.uniform_layers,
        protect=not options.no_protect,
        rest={**DEFAULT_REST, **rest_of(options.rest)},
        seed=options.seed,
    )
    write_json(out, made.to_json())
    if options.json:
        return show.print_json({"out": str(out), "note": dict(made.note)})
    show.map_table(made, stats.model)
    print(f"wrote {out}")
    return None


def do_quantize(options: argparse.Namespace) -> None:
    """Quantize and pack a model."""
    from mopeq.measure import open_model
    from mopeq.quantize import quantize, require_new

    check_quantize(options)
    align = alignment_of(options)
    if not options.resume:
        require_new(Path(options.out))  # before a model is downloaded
    model = open_model(options.model).inventory
    precisions = PrecisionMap.from_json(read_json(options.map)) if options.map else None
    if options.fit:
        options.budget = fitted(options, model)
    if options.recipe and not options.json:
        print(f"recipe {recipe_line(options)}")
    with show.following(options) as track, spread(options) as across:
        packed = quantize(
            options.model,
            options.out,
            precisions=precisions,
            uniform=one_precision(options, model) if options.uniform is not None else None,
            budget=options.budget,
            method=options.method,
            calibration=calibration_of(options),
            options=precisions_of(options, model),
            cost=options.cost,
            granularity=options.granularity,
            uniform_layers=options.uniform_layers,
            protect=not options.no_protect,
            **outside_of(options.rest),
            dtype=dtype_of(options),
            evaluated=not options.no_eval,
            guard=options.guard,
            refine=options.refine,
            compensate=options.compensate,
            align=align,
            resume=options.resume,
            max_memory=size_of(options.max_memory),
            recipe=recipe_line(options),
            command=options.command_line,
            across=across,
            track=track,
        )
    judged = packed.evaluation
    if options.json:
        kl = judged.divergence.kl.value if judged and judged.divergence else None
        found = {"out": str(packed.path), "bytes": packed.bytes, "original_bytes": packed.original_bytes, "kl": kl}
        found |= {"note": dict(packed.precisions.note), "fallbacks": list(packed.fallbacks), "skipped": packed.note}
        found |= {"guard": packed.guard, "aligned": packed.aligned}
        return show.print_result(found)
    show.map_table(packed.precisions, packed.inventory)
    smaller = packed.original_bytes / packed.bytes
    print(
        f"{show.megabytes(packed.original_bytes)} MB -> {show.megabytes(packed.bytes)} MB, {smaller:.2f} times smaller"
    )
    show.print_balance(read_json(packed.path / "mopeq" / "run.json")["calibration"])
    if packed.fallbacks:
        some = ", ".join(packed.fallbacks[:8]) + (" ..." if len(packed.fallbacks) > 8 else "")
        print(f"{len(packed.fallbacks)} units saw few calibration tokens and used their layer's moments too: {some}")
    if packed.guard:
        print(packed.guard)
    if packed.aligned:
        print(packed.aligned)
    if judged:
        show.evaluation_table(judged)
    if packed.note:
        print(packed.note)
    print(f"wrote {packed.path}; what led to it is in {packed.path}/mopeq")
    return None


def do_report(options: argparse.Namespace) -> None:
    """Make the HTML page."""
    from mopeq.report import render

    folder = Path(options.folder)
    page = render(folder, Path(options.out) if options.out else folder / "mopeq" / "report.html")
    if options.json:
        return show.print_json({"out": str(page)})
    print(f"wrote {page}")
    return None
