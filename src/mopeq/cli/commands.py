"""What each command does: one public function, and a table of what came out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mopeq.cli import show
from mopeq.cli.applies import check_allocate, check_quantize
from mopeq.cli.fit import fitted
from mopeq.cli.images import do_quickstart_vlm, reader_of, with_images
from mopeq.cli.recipes import recipe_line
from mopeq.errors import InputError, OutputError
from mopeq.precision import DEFAULT_REST, Precision, PrecisionMap, parse_precision
from mopeq.progress import drawn
from mopeq.spec import Inventory
from mopeq.stats import Stats, read_json, write_json

__all__ = [
    "do_allocate",
    "do_analyze",
    "do_chat",
    "do_describe",
    "do_eval",
    "do_quantize",
    "do_quickstart",
    "do_report",
    "do_run",
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
    from mopeq.measure import measure, open_model

    metrics = [name.strip() for name in options.metrics.split(",") if name.strip()]
    out = _new_file(options.out)
    model = open_model(options.model).inventory
    with show.following(options) as track:
        stats = measure(
            options.model,
            metrics,
            calibration=_calibration_of(options),
            options=_precisions(options, model),
            quantizer=options.method,
            dtype=_dtype(options),
            track=track,
        )
    info = {**stats.info, "command": options.command_line}
    write_json(out, {**stats.to_json(), "info": info})
    if options.json:
        return show.print_result({"out": str(out), "info": info, "metrics": sorted(stats.metrics)})
    rows = []
    for name, values in stats.metrics.items():
        flat = sorted(value for row in values.values() for value in row)
        rows.append((name, *(f"{flat[int(q * (len(flat) - 1))]:.4g}" for q in (0, 0.25, 0.5, 0.75, 1))))
    show.table("Metrics over experts", ("metric", "least", "25 %", "median", "75 %", "most"), rows)
    show.print_starved(stats)
    print(f"wrote {out}")
    return None


def do_allocate(options: argparse.Namespace) -> None:
    """Give every expert a precision."""
    from mopeq.allocate import allocate

    check_allocate(options)
    out = _new_file(options.out)
    stats = Stats.from_json(read_json(options.stats))
    made = allocate(
        stats,
        method=options.method,
        budget=options.budget,
        cost=options.cost,
        score=options.score,
        scope=options.scope,
        options=_precisions(options, stats.model) if options.levels else None,
        granularity=options.granularity,
        uniform_layers=options.uniform_layers,
        rest={**DEFAULT_REST, **_rest_map(options.rest)},
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
    if not options.resume:
        require_new(Path(options.out))  # before a model is downloaded
    model = open_model(options.model).inventory
    precisions = PrecisionMap.from_json(read_json(options.map)) if options.map else None
    if options.fit:
        options.budget = fitted(options, model)
    if options.recipe and not options.json:
        print(f"recipe {recipe_line(options)}")
    with show.following(options) as track:
        packed = quantize(
            options.model,
            options.out,
            precisions=precisions,
            uniform=_one_precision(options, model) if options.uniform is not None else None,
            budget=options.budget,
            method=options.method,
            calibration=_calibration_of(options),
            options=_precisions(options, model),
            cost=options.cost,
            granularity=options.granularity,
            uniform_layers=options.uniform_layers,
            rest=_rest_map(options.rest),
            dtype=_dtype(options),
            evaluated=not options.no_eval,
            guard=options.guard,
            refine=options.refine,
            resume=options.resume,
            max_memory=_size(options.max_memory),
            recipe=recipe_line(options),
            command=options.command_line,
            track=track,
        )
    judged = packed.evaluation
    if options.json:
        kl = judged.divergence.kl.value if judged and judged.divergence else None
        found = {"out": str(packed.path), "bytes": packed.bytes, "original_bytes": packed.original_bytes, "kl": kl}
        found |= {"note": dict(packed.precisions.note), "fallbacks": list(packed.fallbacks), "skipped": packed.note}
        found["guard"] = packed.guard
        return show.print_result(found)
    show.map_table(packed.precisions, packed.inventory)
    smaller = packed.original_bytes / packed.bytes
    print(
        f"{show.megabytes(packed.original_bytes)} MB -> {show.megabytes(packed.bytes)} MB, {smaller:.2f} times smaller"
    )
    if packed.fallbacks:
        some = ", ".join(packed.fallbacks[:8]) + (" ..." if len(packed.fallbacks) > 8 else "")
        print(f"{len(packed.fallbacks)} units saw few calibration tokens and used their layer's moments too: {some}")
    if packed.guard:
        print(packed.guard)
    if judged:
        show.evaluation_table(judged)
    if packed.note:
        print(packed.note)
    print(f"wrote {packed.path}; what led to it is in {packed.path}/mopeq")
    return None


def do_run(options: argparse.Namespace) -> None:
    """Generate text from a prompt."""
    from mopeq.runtime.generate import generate

    reader = reader_of(options)
    prompt = (
        [{"role": "user", "content": with_images(options.prompt, options.image)}] if options.image else options.prompt
    )
    stream = None if options.json else show.write
    made = generate(_load_any(options.model, options), reader, prompt, **_sampling_of(options), stream=stream)
    if options.json:
        return show.print_json({"text": made.text, "tokens": len(made.tokens), "seconds": made.seconds})
    print(flush=True)
    print(f"[{len(made.tokens)} tokens, {made.tokens_per_second:.1f} tokens/s]", file=sys.stderr)
    return None


def do_chat(options: argparse.Namespace) -> None:
    """Talk to a model."""
    from mopeq.runtime.generate import generate

    reader = reader_of(options)
    model = _load_any(options.model, options)

    def answer(messages: list[dict[str, Any]]) -> str:
        return generate(model, reader, messages, **_sampling_of(options), stream=show.write).text

    _converse(reader, answer, options.image)


def _converse(reader: Any, answer: Callable[[list[dict[str, Any]]], str], images: Sequence[str] = ()) -> None:
    """Read lines and print what ``answer`` makes of the conversation so far, until an empty one.

    ``reader`` is a tokenizer or processor; ``images`` go with the first words.
    """
    if not hasattr(reader, "tokenizer") and not getattr(reader, "chat_template", None):
        print("this model has no chat template: it continues your text instead of answering", file=sys.stderr)
    print("empty line or Ctrl-D ends", file=sys.stderr)
    messages: list[dict[str, Any]] = []
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            return None
        if not said:
            return None
        messages.append({"role": "user", "content": with_images(said, [] if messages else list(images))})
        text = answer(messages)
        print()
        messages.append({"role": "assistant", "content": text})


def do_eval(options: argparse.Namespace) -> None:
    """Judge a model."""
    from mopeq.data.samples import bundled_text
    from mopeq.evaluate import evaluate
    from mopeq.load import is_packed

    tasks = [name.strip() for name in (options.tasks or "").split(",") if name.strip()]
    out = _new_file(options.out) if options.out else None
    if options.against:
        _check_original(options.model, options.against)
    model, tokenizer = _loaded(options)
    if out is None and is_packed(options.model) and Path(options.model).is_dir():
        out = Path(options.model) / "mopeq" / "evaluation.json"
    against = _load_any(options.against, options) if options.against else None
    scored: Any = None
    if options.perplexity:
        scored = Path(options.perplexity)
    elif against is not None or not (tasks or options.speed):
        scored = [bundled_text(name).read_text(encoding="utf-8") for name in ("heldout_code.txt", "heldout_docs.txt")]
    with drawn() as track:
        found = evaluate(
            model,
            tokenizer,
            reference=against,
            text=scored,
            tasks=tasks,
            task_folder=options.task_path,
            speed=options.speed,
            length=options.length,
            limit=options.windows,
            seed=options.seed,
            track=track,
        )
    record = found.to_json()
    record["info"] = {**record["info"], "command": options.command_line}
    if out is not None:
        out.parent.mkdir(exist_ok=True)  # DIR/mopeq, which a packed folder may lack
        write_json(out, _with_earlier(out, record))
    if options.json:
        return show.print_json(record)
    show.evaluation_table(found)
    if out is not None:
        print(f"wrote {out}")
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


def _loaded(options: argparse.Namespace) -> tuple[Any, Any]:
    from mopeq.load import load_tokenizer

    return _load_any(options.model, options), load_tokenizer(options.model)


def _load_any(model: str, options: argparse.Namespace) -> Any:
    """A packed or an original model."""
    from mopeq.load import is_packed, load, load_original

    device = _device(options)
    made = load(model, _dtype(options), device) if is_packed(model) else load_original(model, _dtype(options))
    return made.to(device) if device else made


def _device(options: argparse.Namespace) -> str | None:
    """The device asked for, if this machine has it."""
    import torch

    name: str | None = getattr(options, "device", None)
    if name is None:
        return None
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without CUDA
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used ({reason}); give another, such as cpu") from error
    return name


def _check_original(model: str, against: str) -> None:
    """Raise :class:`InputError` where a packed folder is compared with a model of other shapes."""
    from mopeq.adapters import describe, inventory_of
    from mopeq.checkpoint import read_manifest
    from mopeq.load import is_packed
    from mopeq.source import open_source

    if not (Path(model).is_dir() and is_packed(model)) or is_packed(against):
        return
    source = open_source(against)
    found, expected = inventory_of(source, describe(source)), read_manifest(model).inventory
    if found.fingerprint != expected.fingerprint:
        raise InputError(
            f"{against} ({found.model_type}, {found.parameters:,} weights) is not the original of {model} "
            f"({expected.model_type}, {expected.parameters:,} weights): their shapes differ; "
            "give the model that was quantized"
        )


def _sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
    return {name: getattr(options, name) for name in names}


def _with_earlier(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record, and what an evaluation that is there already has beyond it: measuring speed keeps the divergence."""
    from mopeq.evaluate import Evaluation

    if not path.is_file():
        return record
    earlier = Evaluation.from_json(read_json(path)).to_json()
    kept = {name: value for name, value in earlier.items() if value and not record.get(name)}
    return {**record, **kept, "info": {**earlier["info"], **record["info"]}}


def _new_file(path: str) -> Path:
    """A file that can be written: its folder exists."""
    if not Path(path).resolve().parent.is_dir():
        raise OutputError(f"no folder {Path(path).parent} for {Path(path).name}; make it, or give another path with -o")
    if Path(path).is_dir():
        raise OutputError(f"{Path(path)} is a folder; expected the path of a file; give one with -o")
    return Path(path)


def _precisions(options: argparse.Namespace, model: Inventory, text: str | None = None) -> tuple[Precision, ...]:
    (base,) = model.precisions([4], options.group_size, options.symmetric)
    return tuple(parse_precision(part, base) for part in (text or options.levels).split(",") if part.strip())


def _one_precision(options: argparse.Namespace, model: Inventory) -> Precision:
    found = _precisions(options, model, options.uniform) if options.uniform else ()
    if len(found) != 1:
        raise InputError(f"--uniform {options.uniform!r}; expected one precision, such as 3 or 4g128s")
    return found[0]


def _size(text: str | None) -> int | None:
    """Bytes of a size such as 8GB."""
    from mopeq.allocate import parse_budget

    if text is None:
        return None
    size = parse_budget(text)
    if size.kind != "bytes":
        raise InputError(f"--max-memory {text!r}; expected a size such as 8GB or 900MiB")
    return int(size.amount)


def _rest_map(text: str) -> dict[str, Precision]:
    made = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, sign, value = part.partition("=")
        if not sign:
            raise InputError(f"--rest {part!r}; expected GROUP=PRECISION, such as attention=4g64")
        if name.strip() in made:
            raise InputError(f"--rest names {name.strip()} twice; expected each group once")
        made[name.strip()] = parse_precision(value, Precision(8, 128, True))
    return made


def _calibration_of(options: argparse.Namespace) -> Any:
    from mopeq.measure import Calibration

    if options.data == "":
        raise InputError("--data is empty; expected a text or JSONL file; leave it out for the bundled text")
    return Calibration(options.data, options.samples, options.length, options.batch_size, options.seed,
                       options.modality_weight)  # fmt: skip


def _dtype(options: argparse.Namespace) -> Any:
    import torch

    return getattr(torch, options.dtype) if options.dtype else None
