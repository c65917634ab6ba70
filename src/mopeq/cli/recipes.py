"""Recipes: named sets of flags for ``quantize``, each with its evidence in docs/recipes.md.

A recipe only sets what flags are when they are not given; flags that are given win.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["RECIPES", "add_recipe", "parse", "recipe_line"]

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "best": {"method": "gptq", "cost": "fisher_error", "samples": 256, "levels": "2,3,4,5,6", "compensate": True},
    "fast": {"method": "gptq", "cost": "output_error", "samples": 32, "levels": "2,3,4"},
    "smallest": {
        "method": "gptq",
        "cost": "fisher_error",
        "samples": 256,
        "levels": "0,2c,3,4,5,6",
        "compensate": True,
    },
    "data-free": {"method": "gptq", "cost": "fisher_error", "data": "self"},
}
"""Flags by the name that ``options`` has them under."""


def add_recipe(p: argparse.ArgumentParser) -> None:
    """The flag; its values are read by :func:`parse`."""
    p.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        help="; ".join(f"{name}: {_flags(flags)}" for name, flags in RECIPES.items()) + "; flags given win",
    )
    p.set_defaults(set_defaults=p.set_defaults)


def parse(parser: argparse.ArgumentParser, given: Sequence[str]) -> argparse.Namespace:
    """The flags given, over those of the recipe given, over the defaults."""
    options = parser.parse_args(given)
    name = getattr(options, "recipe", None)
    if name is None:
        return options
    options.set_defaults(**RECIPES[name])
    return parser.parse_args(given)


def recipe_line(options: argparse.Namespace) -> str:
    """The recipe and its flags as they are now, for people and for ``run.json``; empty without one."""
    if options.recipe is None:
        return ""
    return f"{options.recipe}: {_flags({name: getattr(options, name) for name in RECIPES[options.recipe]})}"


def _flags(flags: Mapping[str, Any]) -> str:
    said = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        said.append((f"--{flag}" if value else f"--no-{flag}") if isinstance(value, bool) else f"--{flag} {value}")
    return " ".join(said)
