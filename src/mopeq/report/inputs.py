"""The JSON files a report is made from. Each may be absent; one that is there and malformed is a :class:`MapError`.

``DIR/mopeq/`` holds ``stats.json`` (:class:`mopeq.stats.Stats`), ``precision.json``
(:class:`mopeq.precision.PrecisionMap`), ``evaluation.json`` (``mopeq.evaluate.Evaluation``), and two described here.

``run.json``: how the folder was made; every key may be absent.

=================  ====================================================================================================
model              name of the original, as it was given
commands           command lines, each a string or a list of arguments
method             quantizer
seconds            ``{stage: seconds}``
versions           ``{package: version}``
machine, date      free text
bytes              bytes of the packed safetensors files
original_bytes     bytes of the original's tensors
fallbacks          units quantized with pooled moments, such as ``3.17.down``
calibration        facts about the text that was run through the model
inventory          :meth:`mopeq.spec.Inventory.to_json`, needed for sizes where there is no ``stats.json``
=================  ====================================================================================================

``frontier.json``: ``{"points": [...]}`` or the bare list: models compared on one text. A point has ``name`` and
``kind`` (``uniform``, ``mixed`` or ``original``), and as far as known ``expert_bits``, ``bytes``, ``resident_bytes``,
``perplexity``, ``kl``, ``kl_low``, ``kl_high``, ``top1`` (a share, 0 to 1) and ``predicted_loss``.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mopeq.errors import InputError, MapError
from mopeq.precision import PrecisionMap
from mopeq.spec import Inventory
from mopeq.stats import Stats, read_json

__all__ = ["KINDS", "Estimate", "Inputs", "Judged", "Point", "Run", "Task", "read_inputs"]

KINDS = ("original", "uniform", "mixed")
T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, if there is one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Task:
    """One metric of one task."""

    task: str
    metric: str
    score: Estimate
    documents: int
    reference: Estimate | None = None
    difference: Estimate | None = None


@dataclass(frozen=True)
class Judged:
    """What ``evaluation.json`` says, as far as a report shows it."""

    perplexity: Estimate | None
    reference_perplexity: Estimate | None
    nats: Estimate | None
    bits_per_byte: float | None
    reference_bits_per_byte: float | None
    kl: Estimate | None
    agreement: Estimate | None
    tokens: int | None
    resident_bytes: int | None
    reference_resident_bytes: int | None
    tasks: tuple[Task, ...]
    speed: Mapping[str, Any]
    info: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What ``run.json`` says."""

    model: str | None = None
    commands: tuple[str, ...] = ()
    method: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str | None = None
    date: str | None = None
    bytes: int | None = None
    original_bytes: int | None = None
    fallbacks: tuple[str, ...] = ()
    verdicts: tuple[str, ...] = ()
    """What text kept apart said of the map, and of aligned routers."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    inventory: Inventory | None = None


@dataclass(frozen=True)
class Point:
    """One model of a comparison; what was not measured is None."""

    name: str
    kind: str
    expert_bits: float | None
    bytes: float | None
    resident_bytes: float | None
    perplexity: float | None
    kl: float | None
    kl_low: float | None
    kl_high: float | None
    top1: float | None
    predicted_loss: float | None


@dataclass(frozen=True)
class Inputs:
    """All files of one folder."""

    name: str
    stats: Stats | None
    precisions: PrecisionMap | None
    judged: Judged | None
    run: Run | None
    points: tuple[Point, ...] | None

    @property
    def inventory(self) -> Inventory | None:
        """What bytes depend on, from whichever file has it."""
        if self.stats is not None:
            return self.stats.model
        return None if self.run is None else self.run.inventory


def read_inputs(folder: Path) -> Inputs:
    """Read ``folder/mopeq``; :class:`InputError` where there is none of the files, :class:`MapError` for a bad one."""
    inner = folder / "mopeq"
    readers: dict[str, Callable[[Any], Any]] = {
        "stats.json": Stats.from_json,
        "precision.json": PrecisionMap.from_json,
        "evaluation.json": _judged,
        "run.json": _run,
        "frontier.json": _points,
    }
    found = {name: _read(inner / name, reader) for name, reader in readers.items()}
    if all(value is None for value in found.values()):
        raise InputError(
            f"{inner} has none of {', '.join(readers)}; expected a folder made by mopeq quantize; check the path"
        )
    inputs = Inputs(folder.resolve().name, *found.values())
    if inputs.inventory is not None and inputs.precisions is not None:
        inputs.inventory.check(inputs.precisions)
    return inputs


def _read(path: Path, reader: Callable[[Any], T]) -> T | None:
    if not path.exists():
        return None
    data = read_json(path)
    try:
        return reader(data)
    except MapError as error:
        raise MapError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MapError(f"{path} is malformed: {error!r}; make it again, or remove it to leave its part out") from error


def _number(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    if isinstance(value, (bool, str)) or not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    return number


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _estimate(data: Mapping[str, Any] | None) -> Estimate | None:
    if data is None:
        return None
    value = _number(data["value"])
    if value is None:
        raise ValueError("an estimate without a value")
    return Estimate(value, _number(data.get("low")), _number(data.get("high")))


def _judged(data: Mapping[str, Any]) -> Judged:
    if data.get("format") != "mopeq-evaluation" or data.get("version") != 1:
        raise ValueError('expected "format": "mopeq-evaluation" and "version": 1')
    own, original = data.get("perplexity") or {}, data.get("reference_perplexity") or {}
    between = data.get("divergence") or {}
    tasks = []
    for task in data.get("tasks") or ():
        score = _estimate(task["score"])
        if score is not None:
            beside = (_estimate(task.get(name)) for name in ("reference", "difference"))
            tasks.append(Task(str(task["task"]), str(task["metric"]), score, int(task["documents"]), *beside))
    return Judged(
        perplexity=_estimate(own.get("perplexity")),
        reference_perplexity=_estimate(original.get("perplexity")),
        nats=_estimate(own.get("nats")),
        bits_per_byte=_number(own.get("bits_per_byte")),
        reference_bits_per_byte=_number(original.get("bits_per_byte")),
        kl=_estimate(between.get("kl")),
        agreement=_estimate(between.get("agreement")),
        tokens=_whole(own.get("tokens")),
        resident_bytes=_whole(data.get("resident_bytes")),
        reference_resident_bytes=_whole(data.get("reference_resident_bytes")),
        tasks=tuple(tasks),
        speed=dict(data.get("speed") or {}),
        info=dict(data.get("info") or {}),
    )


def _run(data: Mapping[str, Any]) -> Run:
    commands = data.get("commands") or ()
    if isinstance(commands, str):
        raise TypeError("commands is a string; expected a list")
    inventory = data.get("inventory")
    return Run(
        model=_text(data.get("model")),
        commands=tuple(c if isinstance(c, str) else shlex.join(map(str, c)) for c in commands),
        method=_text(data.get("method")),
        seconds={str(k): _number(v) or 0.0 for k, v in (data.get("seconds") or {}).items()},
        versions={str(k): str(v) for k, v in (data.get("versions") or {}).items()},
        machine=_text(data.get("machine")),
        date=_text(data.get("date")),
        bytes=_whole(data.get("bytes")),
        original_bytes=_whole(data.get("original_bytes")),
        fallbacks=tuple(map(str, data.get("fallbacks") or ())),
        verdicts=tuple(str(data[name]) for name in ("guard", "aligned") if data.get(name)),
        calibration=dict(data.get("calibration") or {}),
        inventory=None if inventory is None else Inventory.from_json(inventory),
    )


def _points(data: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> tuple[Point, ...]:
    rows = data["points"] if isinstance(data, Mapping) else data
    points = []
    for row in rows:
        if row["kind"] not in KINDS:
            raise ValueError(f"point {row['name']!r} of kind {row['kind']!r}; expected {', '.join(KINDS)}")
        numbers = {f: _number(row.get(f)) for f in Point.__dataclass_fields__ if f not in ("name", "kind")}
        points.append(Point(str(row["name"]), row["kind"], **numbers))
    return tuple(points)
