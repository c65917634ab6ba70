"""``--fit``: a budget from the memory of a device."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mopeq.errors import InputError
from mopeq.spec import Inventory

__all__ = ["add_fit", "add_fit_to_allocate", "fitted"]


def add_fit(p: argparse.ArgumentParser, ways: Any) -> None:
    """Its flags; ``ways`` is the group of which one is given."""
    ways.add_argument("--fit", metavar="MEMORY", help="8GiB: what serving may take in all, with --context and --batch")
    p.add_argument("--context", type=int, default=4096, help="tokens of a sequence to fit (default: %(default)s)")
    p.add_argument("--batch", type=int, default=1, help="sequences at a time to fit (default: %(default)s)")


def add_fit_to_allocate(p: argparse.ArgumentParser, ways: Any) -> None:
    """Its flags where there are statistics and no model: ``--model`` for the numbers that they do not have."""
    add_fit(p, ways)
    p.add_argument("--model", metavar="MODEL", help="with --fit: the model measured, for its configuration")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="compute type to fit (default: MODEL's)")


def fitted(options: argparse.Namespace, model: Inventory) -> str:
    """The budget for the checkpoint; prints its table to stderr, for results are on stdout."""
    from mopeq.fit import fit
    from mopeq.load import model_config

    config = model_config(options.model)
    _check(config, model, options.model)
    dtype = options.dtype or str(config.get_text_config().dtype or "float32").removeprefix("torch.")
    made = fit(options.fit, config, model, options.context, options.batch, dtype)
    title = f"{options.fit}: {options.batch} x {options.context} tokens in {dtype}, native runtime"
    print(
        "\n".join([title, *(f"  {name:<28} {count / 1e6:>10,.1f} MB" for name, count in made.rows())]), file=sys.stderr
    )
    return f"{made.weights}B"


def _check(config: Any, model: Inventory, name: str) -> None:
    """Raise :class:`InputError` unless the configuration is that of the model."""
    text = config.get_text_config()
    sizes = {layer.hidden_size for layer in model.layers.values()}
    if config.model_type != model.model_type or sizes != {text.hidden_size}:
        raise InputError(
            f"{name} is a {config.model_type} of hidden size {text.hidden_size}; the statistics are of "
            f"{model.model_type}, hidden size {', '.join(map(str, sorted(sizes)))}; give the model that was measured"
        )
