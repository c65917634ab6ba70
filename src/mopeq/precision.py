"""Precisions, precision maps, and the bytes they cost.

A :class:`Precision` is how one weight matrix is stored; a :class:`PrecisionMap` gives one to every unit of a model.
A *unit* is one projection group (``gate_up`` or ``down``) of one routed expert. Nothing here touches tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from mopeq.errors import MapError
from mopeq.layers import layer_key

__all__ = [
    "BITS",
    "DEFAULT_BITS",
    "DEFAULT_GROUP_SIZE",
    "DEFAULT_REST",
    "FULL",
    "GROUPS",
    "GROUP_SIZES",
    "LEFT_OUT",
    "MATRICES",
    "Precision",
    "PrecisionMap",
    "ProjectionGroup",
    "parse_precision",
]

ProjectionGroup = Literal["gate_up", "down"]
GROUPS: tuple[ProjectionGroup, ProjectionGroup] = ("gate_up", "down")
MATRICES: dict[ProjectionGroup, tuple[str, ...]] = {"gate_up": ("gate", "up"), "down": ("down",)}
"""The matrices of an expert that belong to each projection group."""

BITS = (2, 3, 4, 5, 6, 8, 16)
GROUP_SIZES = (32, 64, 128, -1)
DEFAULT_BITS = (2, 3, 4, 5, 6)
"""What an allocator chooses from unless told otherwise: docs/results.md, levels and group sizes."""
DEFAULT_GROUP_SIZE = 128
MAP_FORMAT = "mopeq-precision"
MAP_VERSION = 1


@dataclass(frozen=True, order=True)
class Precision:
    """How one matrix is stored: ``bits`` per code, one fp16 scale per ``group_size`` inputs, a zero point or none.

    ``group_size`` -1 means one group per row. ``symmetric`` fixes the zero point at ``2**(bits-1)`` and stores none.
    ``codebook``, at 2 bits only, stores two weights as one of 16 points of a plane (``qtensor.PAIRS``), without zero
    points. ``hadamard`` stores the matrix for rotated inputs (``hadamard.py``). ``bits`` 16 stores bfloat16 and has no
    groups; 0 stores nothing: the expert is left out. Printed as ``3g64``, ``4g128s`` (symmetric), ``2g128c``
    (codebook), ``2g128h``, ``2g128ch`` (rotated), ``8g-1``, ``16``, ``0``.
    """

    bits: int
    group_size: int = DEFAULT_GROUP_SIZE
    symmetric: bool = False
    codebook: bool = False
    hadamard: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (0, *BITS):
            widths = ", ".join(map(str, BITS))
            raise MapError(f"precision of {self.bits} bits; expected one of {widths}, or 0 for experts left out")
        if self.bits in (0, 16):
            object.__setattr__(self, "group_size", -1)
            object.__setattr__(self, "symmetric", True)
            object.__setattr__(self, "hadamard", False)
        elif self.group_size not in GROUP_SIZES:
            raise MapError(f"group size {self.group_size}; expected one of {', '.join(map(str, GROUP_SIZES))}")
        if self.codebook:
            if self.bits != 2:
                raise MapError(f"a codebook at {self.bits} bits; there is one at 2 bits, such as 2g128c")
            object.__setattr__(self, "symmetric", True)

    def __str__(self) -> str:
        kind = ("c" if self.codebook else "s" if self.symmetric else "") + "h" * self.hadamard
        return str(self.bits) if self.bits in (0, 16) else f"{self.bits}g{self.group_size}{kind}"

    @property
    def levels(self) -> int:
        """Number of distinct codes."""
        return 1 << self.code_bits

    @property
    def code_bits(self) -> int:
        """Bits of a stored code: those of two weights where one code stands for two."""
        return self.bits * self.weights_per_code

    @property
    def weights_per_code(self) -> int:
        """Weights that a code stands for."""
        return 2 if self.codebook else 1

    def group_count(self, in_features: int) -> int:
        """Groups in a row of ``in_features`` inputs (0 at 16 bits and at 0).

        Raises :class:`MapError` where the group size does not divide the row.
        """
        if self.bits in (0, 16):
            return 0
        size = in_features if self.group_size == -1 else self.group_size
        if self.codebook and in_features % 64:
            raise MapError(
                f"a codebook does not fit rows of {in_features} inputs: expected a multiple of 64; use 2g{size}"
            )
        if in_features % size or in_features % 8:
            fits = [str(g) for g in GROUP_SIZES if g > 0 and in_features % g == 0]
            fits = fits or (["-1"] if in_features % 8 == 0 else [])
            advice = f"use group size {' or '.join(fits)}" if fits else "keep this matrix at 16 bits"
            raise MapError(f"groups of {size} do not fit rows of {in_features} inputs; {advice}")
        return in_features // size

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Stored bytes of a matrix (out, in): codes, scales and zero points (docs/format.md)."""
        if self.bits in (0, 16):
            return self.bits // 8 * out_features * in_features
        if out_features % 8:
            raise MapError(
                f"a matrix of {out_features} outputs cannot be packed: expected a multiple of 8; keep it at 16 bits"
            )
        groups = self.group_count(in_features)
        codes = out_features * in_features * self.bits // 8
        zeros = 0 if self.symmetric else groups * out_features * self.bits // 8
        return codes + 2 * out_features * groups + zeros

    def fits(self, out_features: int, in_features: int) -> bool:
        """Whether a matrix of this shape can be stored at this precision."""
        try:
            self.nbytes(out_features, in_features)
        except MapError:
            return False
        return True


FULL = Precision(16)
LEFT_OUT = Precision(0)
"""Of both groups of an expert that is not there; a token's other experts take its share (docs/format.md)."""
DEFAULT_REST = {"attention": Precision(8, 128, True), "dense_mlp": Precision(8, 128, True),
                "shared_experts": Precision(8, 128, True), "lm_head": Precision(8, 128, True)}  # fmt: skip
"""Precision of the groups outside the routed experts, where nothing else is asked for."""

_TEXT = re.compile(r"(\d+)(?:g(-1|\d+)([sc]?)(h?)|(c?)(h?))?\Z")


def parse_precision(value: object, base: Precision | None = None) -> Precision:
    """A :class:`Precision` from ``3``, ``"3g64"``, ``"4g128s"``, ``"2g128c"``, ``"2g128h"``, ``"2c"``, ``"16"``.

    A bare number takes ``base``'s groups and rotation, and so do ``2c`` and ``3h``.
    """
    base = base or Precision(4)
    match = _TEXT.match(str(value).strip())
    if not match or isinstance(value, bool):
        raise MapError(
            f"precision {value!r}; expected bits such as 3, 2c or 3h, or bits and group size such as 3g64, 4g128s or "
            "2g128c"
        )
    bits, group, kind, turned, bare, bare_turned = match.groups()
    if group is None:
        rotated = base.hadamard or bool(bare_turned)
        return Precision(int(bits), base.group_size, base.symmetric, bool(bare), rotated)
    return Precision(int(bits), int(group), kind == "s", kind == "c", turned == "h")


@dataclass(frozen=True)
class PrecisionMap:
    """A precision for every routed-expert unit and for every non-expert group of one model.

    experts: ``{group: {layer: (one Precision per expert)}}`` for both projection groups.
    rest: ``{group name: Precision}`` for ``attention``, ``dense_mlp``, ``shared_experts``, ``lm_head``; else 16 bits.
    note: free facts about how the map was made (method, scope, budget, predicted loss ...).
    """

    experts: Mapping[ProjectionGroup, Mapping[int, tuple[Precision, ...]]]
    rest: Mapping[str, Precision] = field(default_factory=dict)
    note: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if set(self.experts) != set(GROUPS):
            raise MapError(f"expert groups {sorted(self.experts)}; expected {sorted(GROUPS)}")
        up, down = ({k: len(v) for k, v in self.experts[g].items()} for g in GROUPS)
        if up != down:
            raise MapError("gate_up and down must list the same layers and numbers of experts; they differ")
        for layer, row in self.experts["gate_up"].items():
            for expert, pair in enumerate(zip(row, self.experts["down"][layer], strict=True)):
                if (pair[0] == LEFT_OUT) != (pair[1] == LEFT_OUT):
                    raise MapError(
                        f"expert {layer}.{expert} has {pair[0]} and {pair[1]}; 0 bits leaves out a whole expert"
                    )
        if LEFT_OUT in self.rest.values():
            raise MapError("0 bits outside the routed experts; only experts can be left out")
        if turned := next((p for p in self.rest.values() if p.hadamard), None):
            raise MapError(f"{turned} outside the routed experts; only experts can have rotated inputs")

    @classmethod
    def uniform(cls, layers: Mapping[int, int], precision: Precision, rest: Mapping[str, Precision] | None = None,
                note: Mapping[str, Any] | None = None) -> PrecisionMap:  # fmt: skip
        """Every unit at one precision; ``layers`` is ``{layer: number of experts}``."""
        experts = {g: {layer: (precision,) * n for layer, n in layers.items()} for g in GROUPS}
        return cls(experts, DEFAULT_REST if rest is None else rest, note or {"method": "uniform"})

    @property
    def layers(self) -> dict[int, int]:
        """``{layer: number of experts}``."""
        return {layer: len(row) for layer, row in self.experts["gate_up"].items()}

    def of(self, layer: int, expert: int, group: ProjectionGroup) -> Precision:
        """The precision of one unit."""
        return self.experts[group][layer][expert]

    def histogram(self) -> dict[Precision, int]:
        """Number of units at each precision, ordered by precision."""
        counts: dict[Precision, int] = {}
        for rows in self.experts.values():
            for row in rows.values():
                for p in row:
                    counts[p] = counts.get(p, 0) + 1
        return dict(sorted(counts.items()))

    def to_json(self) -> dict[str, Any]:
        """A dictionary a person can edit: one row of bits per layer; units off the most common grouping are strings."""
        counts: dict[tuple[int, bool], int] = {}
        for p, n in self.histogram().items():
            if p.bits not in (0, 16) and not p.codebook and not p.hadamard:
                counts[p.group_size, p.symmetric] = counts.get((p.group_size, p.symmetric), 0) + n
        size, symmetric = max(counts, key=lambda k: counts[k]) if counts else (DEFAULT_GROUP_SIZE, False)
        base = (size, symmetric)

        def cell(p: Precision) -> int | str:
            usual = not p.codebook and not p.hadamard and (p.group_size, p.symmetric) == base
            return p.bits if p.bits in (0, 16) or usual else str(p)

        return {
            "format": MAP_FORMAT,
            "version": MAP_VERSION,
            "base": {"group_size": size, "symmetric": symmetric},
            "experts": {
                g: {str(layer): [cell(p) for p in row] for layer, row in sorted(self.experts[g].items())}
                for g in GROUPS
            },
            "rest": {name: str(p) for name, p in sorted(self.rest.items())},
            "note": dict(self.note),
        }

    @classmethod
    def from_json(cls, data: object) -> PrecisionMap:
        """Inverse of :meth:`to_json`. Raises :class:`MapError` on anything unexpected."""
        if not isinstance(data, Mapping) or data.get("format") != MAP_FORMAT:
            raise MapError(f'not a precision map: expected an object with "format": "{MAP_FORMAT}"')
        if data.get("version") != MAP_VERSION:
            raise MapError(f"precision map version {data.get('version')!r}; this mopeq reads version {MAP_VERSION}")
        unknown = set(data) - {"format", "version", "base", "experts", "rest", "note"}
        if unknown:
            raise MapError(f"precision map has unknown keys {sorted(unknown)}; remove them")
        try:
            raw = data["base"]
            if type(raw["group_size"]) is not int or type(raw["symmetric"]) is not bool:
                raise MapError(
                    f"malformed precision map: base {dict(raw)!r}; expected a whole group_size, symmetric true or false"
                )
            base = Precision(4, raw["group_size"], raw["symmetric"])
            experts = {
                cast(ProjectionGroup, g): {_layer(layer): _row(g, layer, row, base) for layer, row in rows.items()}
                for g, rows in data["experts"].items()
            }
            rest = {str(name): parse_precision(v, base) for name, v in data.get("rest", {}).items()}
            note = dict(data.get("note", {}))
            json.dumps(note, allow_nan=False)  # ValueError: it is written again, and JSON has no NaN
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MapError(
                f"malformed precision map: {error!r}; expected base, experts {{gate_up, down}} and rest"
            ) from error
        return cls(experts, rest, note)


def _layer(text: str) -> int:
    """A layer's key, or a :class:`MapError`."""
    try:
        return layer_key(text)
    except ValueError as error:
        raise MapError(f"malformed precision map: {error}") from error


def _row(group: str, layer: str, row: object, base: Precision) -> tuple[Precision, ...]:
    """One precision for each expert of a layer."""
    if not isinstance(row, list):
        raise MapError(
            f"malformed precision map: layer {layer} {group} is {row!r}; expected a list, one entry for each expert"
        )
    made = []
    for expert, value in enumerate(row):
        try:
            made.append(parse_precision(value, base))
        except MapError as error:
            raise MapError(f"malformed precision map: layer {layer} {group}, expert {expert}: {error}") from error
    return tuple(made)
