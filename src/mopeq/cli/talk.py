"""``mopeq run`` and ``mopeq chat``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mopeq.cli import show
from mopeq.cli.given import device_of, dtype_of, load_any, sampling_of
from mopeq.cli.images import reader_of, with_images
from mopeq.garbage import uncollected

__all__ = ["converse", "do_chat", "do_run"]


def do_run(options: argparse.Namespace) -> None:
    """Generate text from a prompt."""
    model, reader = _opened(options)
    from mopeq.runtime.generate import generate

    prompt = (
        [{"role": "user", "content": with_images(options.prompt, options.image)}] if options.image else options.prompt
    )
    stream = None if options.json else show.write
    made = generate(model, reader, prompt, **sampling_of(options), stream=stream)
    if options.json:
        return show.print_json({"text": made.text, "tokens": len(made.tokens), "seconds": made.seconds})
    print(flush=True)
    print(f"[{len(made.tokens)} tokens, {made.tokens_per_second:.1f} tokens/s]", file=sys.stderr)
    return None


def do_chat(options: argparse.Namespace) -> None:
    """Talk to a model."""
    model, reader = _opened(options)
    from mopeq.runtime.generate import generate

    def answer(messages: list[dict[str, Any]]) -> str:
        return generate(model, reader, messages, **sampling_of(options), stream=show.write).text

    converse(reader, answer, options.image)


@uncollected()
def _opened(options: argparse.Namespace) -> tuple[Any, Any]:
    """Model and reader; where mopeq runs the model by itself, its files are read while the reader is imported."""
    from mopeq.runtime.lean_load import lean_of

    plain = not options.image and device_of(options) in (None, "cpu")
    model = lean_of(options.model, dtype_of(options)) if plain else None
    reader = reader_of(options)
    return (load_any(options.model, options) if model is None else model), reader


def converse(reader: Any, answer: Callable[[list[dict[str, Any]]], str], images: Sequence[str] = ()) -> None:
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
