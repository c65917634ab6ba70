"""The small grammar of variants: ``gptq-3bit``, ``code=mixed-2.5@code.txt``, ``a/folder``.

::

    VARIANT = [NAME=] RECIPE [@TEXT]  |  [NAME=] FOLDER
    RECIPE  = METHOD-PRECISION [bit]     every expert at one precision: rtn-3bit, gptq-3g64, gptq-4g128s
            | mixed-BITS                 the knapsack at that many bits per expert weight, quantized with GPTQ
    METHOD  = a quantizer, or awq-like

``@TEXT`` calibrates this variant on its own text. ``awq-like`` rounds on grids whose error counts by how strongly each
input is driven, which is AWQ's idea without its scaling of channels. A folder named like a recipe is ``./rtn-3bit``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mopeq.errors import InputError, ModelError
from mopeq.quantizers import DATA_FREE, QUANTIZERS

__all__ = ["METHODS", "Recipe", "parse_recipes"]

AWQ_LIKE, MIXED = "awq-like", "mixed"
METHODS = (*QUANTIZERS, AWQ_LIKE, MIXED)
_RECIPE = re.compile(r"(?P<method>[a-z][a-z-]*[a-z])-(?P<level>\d+(?:\.\d+)?(?:g(?:-1|\d+)s?)?)(?:bit)?\Z")
_NAME = re.compile(r"\w[\w.-]*\Z", re.ASCII)


@dataclass(frozen=True)
class Recipe:
    """One variant: made here by ``method`` at ``level``, calibrated on ``data``, or an existing ``folder``."""

    name: str
    text: str
    """As it was given, without the name."""
    method: str = ""
    level: str = ""
    data: str | None = None
    folder: Path | None = None

    @property
    def quantizer(self) -> str:
        """The name in ``quantizers.QUANTIZERS`` of what rounds the weights."""
        return {AWQ_LIKE: "rtn-mse", MIXED: "gptq"}.get(self.method, self.method)

    @property
    def calibrated(self) -> bool:
        """Whether it needs a pass over calibration text."""
        return self.method not in ("", *DATA_FREE)


def parse_recipes(texts: Sequence[str]) -> tuple[Recipe, ...]:
    """The variants of a set, at least two, of different names.

    Raises :class:`InputError` for a recipe that is not understood, :class:`ModelError` for a folder that is not there.
    """
    made = tuple(_parse(text.strip()) for text in texts if text.strip())
    if len(made) < 2:
        found = f"one variant, {made[0].text!r}" if made else "no variants"
        raise InputError(
            f"{found}; expected at least two to choose from, such as rtn-3bit,gptq-3bit; use mopeq quantize for one"
        )
    names = [recipe.name for recipe in made]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two variants are named {twice}; expected different names; write NAME={twice}")
    return made


def _parse(text: str) -> Recipe:
    name, sign, body = text.partition("=")
    if not sign:
        name, body = "", text
    found, at, data = body.partition("@")
    match = _RECIPE.match(found)
    if match is None:
        return Recipe(_named(name or Path(body).resolve().name), body, folder=_folder(body))
    method, level = match["method"], match["level"]
    if method not in METHODS:
        raise InputError(f"variant {body!r} has method {method!r}; expected one of {', '.join(METHODS)}")
    if method != MIXED and "." in level:
        raise InputError(
            f"variant {body!r}: {method} takes whole bits; expected {method}-3bit, or mixed-{level} to mix"
        )
    if method == MIXED and "g" in level:
        raise InputError(
            f"variant {body!r}: mixed takes bits per weight alone, such as mixed-2.5; expected no group size"
        )
    if at and not Path(data).exists():
        raise InputError(f"variant {body!r}: no text {data or 'after @'}; expected a .txt or .jsonl file or a folder")
    recipe = Recipe(_named(name or found + (f"-{Path(data).stem}" if at else "")), body, method, level, data or None)
    if at and not recipe.calibrated:
        raise InputError(f"variant {body!r}: {method} reads no calibration text; leave out @{data}, or use gptq")
    return recipe


def _named(name: str) -> str:
    if not _NAME.match(name):
        raise InputError(f"variant name {name!r}; expected letters, digits, dots, dashes and underscores")
    return name


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise ModelError(
            f"variant {text!r} is neither a recipe such as gptq-3bit, awq-like-3bit or mixed-2.5, nor a folder; "
            f"check the path"
        )
    return path
