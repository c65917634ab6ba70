"""``mopeq moqe ...``: several quantized variants of one model behind a router."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopeq.cli import given, show, talk
from mopeq.errors import InputError
from mopeq.progress import drawn

if TYPE_CHECKING:
    from mopeq.evaluate import Estimate
    from mopeq.moqe.judging import Judged
    from mopeq.moqe.store import VariantSet

__all__ = ["add_moqe"]

GRAMMAR = "rtn-3bit,gptq-3bit,awq-like-3bit,mixed-2.5, NAME=RECIPE@TEXT, folders: comma-separated"


def add_moqe(verbs: Any) -> None:
    """Add ``moqe`` and its commands."""
    from mopeq.cli import flags  # which imports this module

    text = "several quantized variants of one model behind a light router"
    top = verbs.add_parser("moqe", help=text, description=text)
    verbs_of_moqe = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def verb(
        name: str, run: Callable[[argparse.Namespace], None], text: str, json: bool = True
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = verbs_of_moqe.add_parser(name, help=text, description=text)
        if json:
            made.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        made.set_defaults(run=run)
        return made

    p = verb("build", do_build, "make variants, or take existing ones, and store equal tensors once")
    flags._model(p)
    p.add_argument("--variants", required=True, help=GRAMMAR)
    p.add_argument("-o", "--out", required=True, help="folder to make")
    p.add_argument("--images", metavar="DIR", help="of a vision model: images to calibrate on, one folder a class")
    flags._calibration(p)
    flags._rest(p)

    p = verb("train", do_train, "train the router on text that no variant was calibrated on")
    _set(p)
    p.add_argument("--data", help="text or JSONL (default: the third of the bundled text that build keeps apart)")
    p.add_argument("--images", metavar="DIR", help="of a vision set: images, one folder a class")
    p.add_argument("--prompt-tokens", type=int, default=64, help="tokens the router reads (default: %(default)s)")
    p.add_argument("--length", type=int, default=192, help="tokens of a window (default: %(default)s)")
    p.add_argument("--epochs", type=int, default=40)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--learning-rate", type=float, default=1e-3)
    p.add_argument(
        "--temperature", type=float, default=0.5, help="of soft labels; 0 takes the least loss (default: %(default)s)"
    )
    p.add_argument("--alpha", type=float, default=0.02, help="of the balance loss, falling to 0 (default: %(default)s)")
    p.add_argument("--restart", action="store_true", help="forget an interrupted training instead of continuing it")
    flags._seed(p)

    p = verb("run", do_run, "generate text, each prompt with the variant that the router chooses")
    _set(p)
    p.add_argument("--prompt", action="append", help="may be given several times: one batch, grouped by variant")
    p.add_argument("--image", action="append", metavar="FILE", help="of a vision set: images to classify")
    flags._sampling(p)

    p = verb("chat", do_chat, "talk to a set of variants in the terminal", json=False)
    _set(p)
    flags._sampling(p)

    p = verb("eval", do_eval, "each variant, the router, chance, oracles, the ensemble and the original, side by side")
    _set(p)
    p.add_argument("--text", nargs="+", metavar="FILE", help="one file a domain (default: the bundled held-out text)")
    p.add_argument(
        "--images", nargs="+", metavar="DIR", help="of a vision set: a domain each, one folder a class in it"
    )
    p.add_argument("--against", metavar="MODEL", help="the original, to judge it too")
    p.add_argument("--windows", type=int, default=64, help="windows of each domain (default: %(default)s)")
    p.add_argument("--prompt-tokens", type=int, default=64, help="tokens the router reads (default: %(default)s)")
    p.add_argument("--length", type=int, default=192, help="tokens of a window (default: %(default)s)")
    p.add_argument("--pairs", type=int, default=15, help="pairs of runs that time the router (default: %(default)s)")
    p.add_argument("--no-ensemble", action="store_true", help="do not hold all variants in memory for the ensemble")
    flags._seed(p)


def _set(p: argparse.ArgumentParser) -> None:
    p.add_argument("set", metavar="DIR", help="a set of variants, made by mopeq moqe build")
    p.add_argument("--resident", type=int, metavar="N", help="variants in memory at a time (default: all)")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="compute type (default: the checkpoints')"
    )


def do_build(options: argparse.Namespace) -> None:
    """Make a set of variants."""
    from mopeq.moqe.make import build
    from mopeq.moqe.vision import build_images, is_image_model

    variants, command = options.variants.split(","), options.command_line
    images = is_image_model(options.model)
    if options.images and not images:
        raise InputError(f"--images is for image classifiers; {options.model} is none; leave it out, or use --data")
    with drawn() as track:
        made = (
            build_images(options.model, variants, options.out, options.images, command=command, track=track)
            if images
            else build(
                options.model,
                variants,
                options.out,
                calibration=given.calibration_of(options),
                rest=given.rest_of(options.rest),
                dtype=given.dtype_of(options),
                command=command,
                track=track,
            )
        )
    if options.json:
        return show.print_json({"out": str(options.out), **made.to_json()})
    _print_set(made)
    print(f"wrote {options.out}; train its router with: mopeq moqe train {options.out}")
    return None


def _print_set(made: VariantSet) -> None:
    rows = [(v.name, v.recipe, show.megabytes(v.bytes), show.megabytes(v.own_bytes)) for v in made.variants]
    show.table(f"Variants of {made.base}", ("variant", "recipe", "MB", "MB of its own"), rows)
    print(
        f"{show.megabytes(made.bytes)} MB in all, where separate folders would have "
        f"{show.megabytes(made.separate_bytes)} MB: equal tensors are stored once"
    )


def do_train(options: argparse.Namespace) -> None:
    """Train the router."""
    from mopeq.moqe.language import train
    from mopeq.moqe.training import Settings
    from mopeq.moqe.vision import train_images

    settings = Settings(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        temperature=options.temperature,
        alpha=options.alpha,
        seed=options.seed,
    )
    common: dict[str, Any] = {
        "settings": settings,
        "resident": 1 if options.resident is None else options.resident,
        "restart": options.restart,
        "command": options.command_line,
    }
    images = _is_vision(options)
    try:
        with drawn() as track:
            if images:
                found = train_images(options.set, _needed(options.images, "--images DIR"), track=track, **common)
            else:
                windows = {"prompt": options.prompt_tokens, "length": options.length}
                dtype = given.dtype_of(options)
                found = train(options.set, options.data, dtype=dtype, track=track, **windows, **common)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("interrupted; the same command goes on where it stopped") from stop
    if options.json:
        return show.print_json({**asdict(found), "sentence": found.sentence})
    print(f"{found.inputs} inputs to learn from, {found.validation_inputs} kept apart; best after epoch {found.epoch}")
    print(found.sentence)
    print(f"wrote {Path(options.set) / 'router'}")
    return None


def do_run(options: argparse.Namespace) -> None:
    """Generate text from one or several prompts, or classify images."""
    if _is_vision(options):
        return _classify(options)
    opened = _loaded(options)
    _needed(options.prompt, "--prompt TEXT, once or several times")
    routes = opened.route([opened.encode(prompt) for prompt in options.prompt])
    if len(options.prompt) == 1:
        stream = None if options.json else show.write
        made = [opened.generate(options.prompt[0], **given.sampling_of(options), stream=stream)]
    else:
        made = opened.generate(options.prompt, **given.sampling_of(options))
    if options.json:
        done = [
            {"variant": name, "text": m.text, "tokens": len(m.tokens)} for name, m in zip(routes, made, strict=True)
        ]
        return show.print_json({"generations": done, **_pool(opened)})
    if len(made) > 1:
        for prompt, name, generation in zip(options.prompt, routes, made, strict=True):
            print(f"[{name}] {prompt}{generation.text}\n")
    else:
        print(flush=True)
    counts = ", ".join(f"{name} {routes.count(name)}" for name in dict.fromkeys(routes))
    pool = _pool(opened)
    print(
        f"[{counts}; {pool['loads']} loads in {pool['load_seconds']:.2f} s, "
        f"{show.megabytes(pool['resident_bytes'])} MB resident]",
        file=sys.stderr,
    )
    return None


def _classify(options: argparse.Namespace) -> None:
    from mopeq.moqe.vision import classify, load_images

    opened = load_images(options.set, resident=options.resident)
    rows = classify(opened, _needed(options.image, "--image FILE, once or several times"))
    if options.json:
        return show.print_json({"images": [row._asdict() for row in rows], **_pool(opened)})
    cells = [(row.file, row.label, f"{100 * row.probability:.1f} %", row.variant) for row in rows]
    show.table("Images", ("file", "class", "probability", "variant"), cells)
    return None


def _is_vision(options: argparse.Namespace) -> bool:
    from mopeq.moqe.store import read_set

    return read_set(options.set).kind == "vision"


def _needed(value: Any, flag: str) -> Any:
    if not value:
        raise InputError(f"nothing to work on; expected {flag}")
    return value


def _pool(opened: Any) -> dict[str, Any]:
    pool = opened.pool
    return {
        "loads": pool.loads, "hits": pool.hits, "evictions": pool.evictions,
        "load_seconds": round(pool.load_seconds, 3), "resident_bytes": pool.bytes,
    }  # fmt: skip


def do_chat(options: argparse.Namespace) -> None:
    """Talk to a set; every answer is routed by the conversation so far."""
    opened = _loaded(options)

    def answer(messages: list[dict[str, str]]) -> str:
        text: str = opened.generate(tuple(messages), **given.sampling_of(options), stream=show.write).text
        return text

    talk.converse(opened.tokenizer, answer)


def do_eval(options: argparse.Namespace) -> None:
    """Judge a set."""
    from mopeq.data.samples import bundled_text
    from mopeq.data.text import read_texts
    from mopeq.moqe.judging import judge
    from mopeq.stats import write_json

    if _is_vision(options):
        return _judge_images(options)
    files = [Path(text) for text in options.text or ()]
    files = files or [bundled_text("heldout_code.txt"), bundled_text("heldout_docs.txt")]
    opened = _loaded(options)
    with drawn() as track:
        found = judge(
            opened,
            {file.stem: read_texts(file) for file in files},
            prompt=options.prompt_tokens,
            length=options.length,
            limit=options.windows,
            beside={"original": options.against} if options.against else None,
            ensemble=not options.no_ensemble,
            pairs=options.pairs,
            seed=options.seed,
            track=track,
        )
    record = {**found.to_json(), "sentence": found.sentence, "command": options.command_line}
    write_json(Path(options.set) / "evaluation.json", record)
    if options.json:
        return show.print_json(record)
    _print_judged(found)
    print(f"wrote {Path(options.set) / 'evaluation.json'}")
    return None


def _judge_images(options: argparse.Namespace) -> None:
    from mopeq.moqe.vision import judge_images, load_images
    from mopeq.stats import write_json

    folders = [Path(folder) for folder in _needed(options.images, "--images DIR, one a domain")]
    beside = {"original": options.against} if options.against else None
    opened = load_images(options.set)
    loss, wrong = judge_images(opened, {folder.name: folder for folder in folders}, beside=beside, seed=options.seed)
    record = {"loss": loss.to_json(), "wrong": wrong.to_json(), "sentence": loss.sentence}
    write_json(Path(options.set) / "evaluation.json", {**record, "command": options.command_line})
    if options.json:
        return show.print_json(record)
    _print_judged(loss, wrong)
    print(f"wrote {Path(options.set) / 'evaluation.json'}")
    return None


def _print_judged(found: Judged, wrong: Judged | None = None) -> None:
    measure = "perplexity [95 %]" if wrong is None else "% right [95 %]"
    for domain, rows in found.rows.items():
        lines = []
        for number, row in enumerate(rows):
            gap = found.differences[domain].get(f"{row.name} - best single")
            beside = "best single" if row.name == found.best[domain] else ""
            value = _interval(row.perplexity, ".3f") if wrong is None else _right(wrong.rows[domain][number].loss)
            size = show.megabytes(found.bytes[row.name])
            lines.append((row.name, size, value, beside if gap is None else _interval(gap, "+.4f")))
        heads = ("", "MB", measure, "nats more than the best single [95 %]")
        show.table(f"{domain}: {found.inputs[domain]} {'windows' if wrong is None else 'images'}", heads, lines)
    for latency in found.latency:
        print(
            f"{latency.prompt_tokens} tokens in, {latency.new_tokens} out: {1000 * latency.alone_seconds:.1f} ms, "
            f"with the router {100 * latency.overhead:+.1f} % (median of {latency.pairs} pairs; "
            f"the choice takes {1000 * latency.router_seconds:.2f} ms)"
        )
    print(found.sentence)


def _right(wrong: Estimate) -> str:
    """A share of errors as per cent right, its interval turned round."""
    low, high = (wrong.value if end is None else end for end in (wrong.low, wrong.high))
    return f"{100 - 100 * wrong.value:.1f} [{100 - 100 * high:.1f}, {100 - 100 * low:.1f}]"


def _interval(value: Estimate, form: str) -> str:
    return (
        f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"
        if value.low is not None
        else f"{value.value:{form}}"
    )


def _loaded(options: argparse.Namespace) -> Any:
    from mopeq.moqe.model import load

    return load(options.set, resident=options.resident, dtype=given.dtype_of(options), device=given.device_of(options))
