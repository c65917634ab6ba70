"""``mopeq eval``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopeq.cli import show
from mopeq.cli.applies import refuse
from mopeq.cli.given import load_any, new_file
from mopeq.errors import InputError
from mopeq.progress import Track, drawn
from mopeq.stats import read_json, write_json

if TYPE_CHECKING:
    from mopeq.evaluate import Evaluation
    from mopeq.evaluate.vqa import Table

__all__ = ["add_eval", "do_eval"]


def add_eval(p: argparse.ArgumentParser) -> None:
    """Its flags, but for those of every model."""
    p.add_argument("--against", metavar="MODEL", help="the original: adds KL divergence and top-1 agreement")
    p.add_argument(
        "--perplexity", metavar="FILE", help="text, or conversations with images, to score (default: bundled text)"
    )
    p.add_argument("--tasks", help="lm-eval tasks, comma-separated")
    p.add_argument("--task-path", metavar="DIR", help="folder with task YAML files")
    p.add_argument("--vqa", metavar="FILE", nargs="+", default=[], help="tables of questions, as VLMEvalKit has them")
    p.add_argument("--vqa-metric", metavar="KIND", help="how to score them (default: by name, else by columns)")
    p.add_argument("--limit", type=int, help="questions of each table, evenly spread (default: all)")
    p.add_argument("--max-new-tokens", type=int, default=200, help="of an answer (default: %(default)s)")
    p.add_argument("--speed", action="store_true", help="measure tokens per second")
    p.add_argument("--windows", type=int, default=32, help="windows of text, or conversations (default: %(default)s)")
    p.add_argument("--length", type=int, default=512, help="tokens of a window (default: %(default)s)")
    p.add_argument("--device", help="cpu, cuda, cuda:1 ...")
    p.add_argument("-o", "--out", help="file to write; for a packed folder default DIR/mopeq/evaluation.json")


def do_eval(options: argparse.Namespace) -> None:
    """Judge a model."""
    from mopeq.data.conversations import has_images
    from mopeq.load import is_packed, load_processor

    out = new_file(options.out) if options.out else None
    if not options.vqa:
        refuse(options, ("vqa_metric", "limit", "max_new_tokens"), "--vqa")
    pictures = options.perplexity is not None and has_images(options.perplexity)
    if pictures:
        refuse(options, ("length",), "text, and conversations are taken whole")
    processor = load_processor(options.model) if options.vqa or pictures else None
    tables = _tables(options)
    if options.against:
        _check_original(options.model, options.against)
    model = load_any(options.model, options)
    if out is None and is_packed(options.model) and Path(options.model).is_dir():
        out = Path(options.model) / "mopeq" / "evaluation.json"
    against = load_any(options.against, options) if options.against else None
    with drawn() as track:
        found = _of_text(options, model, against, processor if pictures else None, track)
        found = _asked(options, found, model, against, processor, tables, out, track)
    record = found.to_json()
    record["info"] = {**record["info"], "command": options.command_line}
    if out is not None:
        out.parent.mkdir(exist_ok=True)  # DIR/mopeq, which a packed folder may lack
        write_json(out, _with_earlier(out, record))
    if options.json:
        return show.print_json(record)
    for table in tables:
        print(f"{table.name}: {len(table.questions)} questions, {_about(table)}")
    show.evaluation_table(found)
    if out is not None:
        print(f"wrote {out}")
    return None


def _tables(options: argparse.Namespace) -> list[Table]:
    from mopeq.evaluate.vqa import read_table

    tables = [read_table(path, options.vqa_metric, options.limit) for path in options.vqa]
    names = [table.name for table in tables]
    if len(set(names)) < len(names):
        raise InputError(f"two tables are called {max(names, key=names.count)}; expected different names; rename one")
    return tables


def _about(table: Table) -> str:
    from mopeq.evaluate.vqa import METRICS

    return f"scored by {table.way.metric} ({METRICS[table.way.metric]}), because of {table.way.why}"


def _of_text(options: argparse.Namespace, model: Any, against: Any, processor: Any, track: Track) -> Evaluation:
    """Everything but questions. ``processor`` where the text to score are conversations with images."""
    from mopeq.data.conversations import conversation_batches, read_conversations
    from mopeq.data.samples import bundled_text
    from mopeq.evaluate import evaluate
    from mopeq.evaluate.answers import evaluate_answers
    from mopeq.load import load_tokenizer

    tasks = [name.strip() for name in (options.tasks or "").split(",") if name.strip()]
    scored: Any = None
    if processor is None and options.perplexity:
        scored = Path(options.perplexity)
    elif processor is None and not options.vqa and (against is not None or not (tasks or options.speed)):
        scored = [bundled_text(name).read_text(encoding="utf-8") for name in ("heldout_code.txt", "heldout_docs.txt")]
    found = evaluate(
        model,
        load_tokenizer(options.model),
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
    if processor is None:
        return found
    batches = conversation_batches(
        read_conversations(options.perplexity), processor, samples=options.windows, batch_size=1, seed=options.seed
    )
    judged = evaluate_answers(against, model, batches, seed=options.seed, track=track)
    info = {**found.info, **judged.info, "text": Path(options.perplexity).name}
    return replace(judged, tasks=found.tasks, speed=found.speed, process_bytes=found.process_bytes, info=info)


def _asked(
    options: argparse.Namespace,
    found: Evaluation,
    model: Any,
    against: Any,
    processor: Any,
    tables: Sequence[Table],
    out: Path | None,
    track: Track,
) -> Evaluation:
    """With the scores of tables of questions; what was answered is left beside ``out``."""
    from mopeq.evaluate.vqa import ask, scores, write_answers

    made, facts = list(found.tasks), {}
    for table in tables:
        answers = ask(model, processor, table, max_new_tokens=options.max_new_tokens, track=track)
        original = None
        if against is not None:
            original = ask(against, processor, table, max_new_tokens=options.max_new_tokens, track=track)
        made += scores(table, answers, original, seed=options.seed)
        facts[table.name] = {"questions": len(table.questions), "scored": _about(table)}
        if out is not None:
            out.parent.mkdir(exist_ok=True)
            write_answers(out.parent / f"answers-{table.name}.tsv", table, answers, original)
    return replace(found, tasks=tuple(made), info={**found.info, **({"vqa": facts} if facts else {})})


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


def _with_earlier(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record, and what an evaluation that is there already has beyond it: measuring speed keeps the divergence."""
    from mopeq.evaluate import Evaluation

    if not path.is_file():
        return record
    earlier = Evaluation.from_json(read_json(path)).to_json()
    kept = {name: value for name, value in earlier.items() if value and not record.get(name)}
    return {**record, **kept, "info": {**earlier["info"], **record["info"]}}
