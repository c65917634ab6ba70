"""Reading numbers from a published ``config.json``, or saying what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mopeq.errors import ModelError

__all__ = ["Config", "count", "numbers", "sizes_of"]

Config = Mapping[str, Any]


def count(config: Config, *names: str, default: int | None = None, least: int = 1) -> int:
    """The whole number, not under ``least``, that the configuration has under one of ``names``."""
    found = {name: config[name] for name in names if config.get(name) is not None}
    if not found and default is not None:
        return default
    if len(set(map(str, found.values()))) != 1 or not all(type(v) is int and v >= least for v in found.values()):
        have = ", ".join(f"{k} = {v!r}" for k, v in found.items()) or f"no {' or '.join(names)}"
        raise ModelError(
            f"config.json has {have}; expected a whole number from {least} on; use the model's own config.json"
        )
    return int(next(iter(found.values())))


def numbers(config: Config, name: str) -> list[int] | None:
    """The list of whole numbers under ``name``, None where there is none."""
    value = config.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(v) is int for v in value):
        raise ModelError(f"config.json has {name} = {value!r}; expected a list of layer numbers")
    return value


def sizes_of(config: Config, name: str, whose: Sequence[str]) -> list[int]:
    """The list of sizes under ``name``, one for each of ``whose``."""
    found = config.get(name)
    if not isinstance(found, list) or len(found) != len(whose) or any(type(v) is not int or v < 1 for v in found):
        raise ModelError(
            f"config.json has {name} = {found!r}; expected a list of {len(whose)} sizes, of {' and '.join(whose)}; "
            f"use the model's own config.json"
        )
    return found
