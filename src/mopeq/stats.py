"""Named numbers per expert, their file, and the cost table an allocator reads.

The one shape of this project: every per-expert quantity is ``{layer: [one value per expert]}``. Costs of a unit at an
option are metrics too, named ``<cost>/<group>/<precision>``, for example ``fisher_error/down/3g64``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mopeq.errors import MapError
from mopeq.layers import layer_key
from mopeq.precision import GROUPS, Precision, PrecisionMap, ProjectionGroup, parse_precision
from mopeq.spec import Inventory

__all__ = [
    "CostTable",
    "PerExpert",
    "Stats",
    "Unit",
    "cost_metric",
    "cost_options",
    "cost_table",
    "read_json",
    "write_json",
]

PerExpert = Mapping[int, Sequence[float]]
STATS_FORMAT = "mopeq-stats"
STATS_VERSION = 1


@dataclass(frozen=True)
class Stats:
    """Everything measured on one model.

    metrics: ``{name: {layer: (one value per expert)}}``; a standard error of ``x`` is the metric ``x.stderr``.
    info: how it was measured: data, tokens, seed, seconds, command line, experts with few tokens.
    """

    model: Inventory
    metrics: Mapping[str, Mapping[int, tuple[float, ...]]]
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, rows in self.metrics.items():
            if {layer: len(row) for layer, row in rows.items()} != self.model.experts:
                raise MapError(
                    f"metric {name!r} does not have one value for each expert of this {self.model.model_type}"
                )
            bad = [f"{layer}.{e}" for layer, row in rows.items() for e, v in enumerate(row) if not math.isfinite(v)]
            if bad:
                raise MapError(f"metric {name!r} is not finite for experts {', '.join(bad[:8])}; measure again")

    def metric(self, name: str) -> Mapping[int, tuple[float, ...]]:
        """One metric, or a :class:`MapError` that lists those there are."""
        if name not in self.metrics:
            scores = [n for n in self.metrics if "/" not in n and not n.endswith(".stderr")]
            raise MapError(
                f"no metric {name!r} in these statistics; they have {', '.join(scores)}; "
                "measure it with mopeq analyze --metrics"
            )
        return self.metrics[name]

    def with_metrics(self, metrics: Mapping[str, PerExpert], **info: Any) -> Stats:
        """A copy with more metrics (a later one replaces an earlier one of the same name) and facts."""
        added = {
            name: {layer: tuple(float(v) for v in row) for layer, row in rows.items()} for name, rows in metrics.items()
        }
        return replace(self, metrics={**self.metrics, **added}, info={**self.info, **info})

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        metrics = {
            n: {str(layer): [_short(v) for v in row] for layer, row in rows.items()} for n, rows in self.metrics.items()
        }
        return {
            "format": STATS_FORMAT,
            "version": STATS_VERSION,
            "model": self.model.to_json(),
            "info": dict(self.info),
            "metrics": metrics,
        }

    @classmethod
    def from_json(cls, data: object) -> Stats:
        """Inverse of :meth:`to_json`. Raises :class:`MapError` on anything unexpected."""
        if not isinstance(data, Mapping) or data.get("format") != STATS_FORMAT:
            raise MapError(f'not a statistics file: expected an object with "format": "{STATS_FORMAT}"')
        if data.get("version") != STATS_VERSION:
            raise MapError(f"statistics version {data.get('version')!r}; this mopeq reads version {STATS_VERSION}")
        try:
            metrics = {
                str(n): {layer_key(k): tuple(map(float, row)) for k, row in rows.items()}
                for n, rows in data["metrics"].items()
            }
            return cls(Inventory.from_json(data["model"]), metrics, dict(data.get("info", {})))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MapError(f"malformed statistics file: {error!r}") from error


def _short(value: float) -> float:
    return float(f"{value:.9g}")


@dataclass(frozen=True, order=True)
class Unit:
    """What gets one precision: one projection group of one expert, or (``group`` None) a whole expert."""

    layer: int
    expert: int
    group: ProjectionGroup | None = None

    def __str__(self) -> str:
        return f"{self.layer}.{self.expert}" + (f".{self.group}" if self.group else "")


@dataclass(frozen=True)
class CostTable:
    """Predicted loss and bytes of every unit at every option: what an allocator reads.

    loss: (units, options) float64, additive; size: (units, options) int64 bytes.
    """

    units: tuple[Unit, ...]
    options: tuple[Precision, ...]
    loss: NDArray[np.float64]
    size: NDArray[np.int64]

    def to_map(
        self, choice: Sequence[int] | NDArray[np.int64], rest: Mapping[str, Precision], note: Mapping[str, Any]
    ) -> PrecisionMap:
        """The map in which unit ``i`` gets option ``choice[i]``."""
        chosen: dict[ProjectionGroup, dict[int, dict[int, Precision]]] = {g: {} for g in GROUPS}
        for unit, index in zip(self.units, choice, strict=True):
            for group in GROUPS if unit.group is None else (unit.group,):
                chosen[group].setdefault(unit.layer, {})[unit.expert] = self.options[int(index)]
        experts = {
            g: {layer: tuple(row[e] for e in sorted(row)) for layer, row in rows.items()} for g, rows in chosen.items()
        }
        return PrecisionMap(experts, rest, note)


def cost_metric(cost: str, group: ProjectionGroup, precision: Precision) -> str:
    """Name of the metric that holds the cost of a unit at a precision."""
    return f"{cost}/{group}/{precision}"


def cost_options(stats: Stats, cost: str) -> tuple[Precision, ...]:
    """The precisions at which ``cost`` was measured for both groups, ordered."""
    found = [{parse_precision(n.split("/")[2]) for n in stats.metrics if n.startswith(f"{cost}/{g}/")} for g in GROUPS]
    return tuple(sorted(found[0] & found[1]))


def cost_table(
    stats: Stats, cost: str, options: Sequence[Precision] | None = None, granularity: str = "group"
) -> CostTable:
    """One cost over all units; ``granularity`` is ``group`` (gate_up and down apart) or ``expert`` (tied)."""
    known = cost_options(stats, cost)
    chosen = tuple(sorted(options)) if options else known
    missing = [str(p) for p in chosen if p not in known]
    if missing or not chosen:
        have = ", ".join(map(str, known)) or "none"
        raise MapError(
            f"cost {cost!r} was not measured at {', '.join(missing) or 'any precision'}; it was at: {have}; "
            "choose among those with --levels, or measure it with mopeq analyze"
        )
    if granularity not in ("group", "expert"):
        raise MapError(f"granularity {granularity!r}; expected group or expert")
    units: list[Unit] = []
    loss: list[list[float]] = []
    size: list[list[int]] = []
    for layer, count in stats.model.experts.items():
        tables = {g: [stats.metrics[cost_metric(cost, g, p)][layer] for p in chosen] for g in GROUPS}
        bytes_ = {g: [stats.model.unit_bytes(layer, g, p) for p in chosen] for g in GROUPS}
        for expert in range(count):
            rows = {g: [column[expert] for column in tables[g]] for g in GROUPS}
            if granularity == "expert":
                units.append(Unit(layer, expert))
                loss.append([sum(v) for v in zip(*rows.values(), strict=True)])
                size.append([sum(v) for v in zip(*bytes_.values(), strict=True)])
            else:
                for g in GROUPS:
                    units.append(Unit(layer, expert, g))
                    loss.append(rows[g])
                    size.append(bytes_[g])
    return CostTable(tuple(units), chosen, np.array(loss, dtype=np.float64), np.array(size, dtype=np.int64))


def read_json(path: str | Path) -> Any:
    """Parse a JSON file, or raise :class:`MapError` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MapError(f"no file {path}; check the path") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MapError(f"{path} is not readable JSON: {error}") from error


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write JSON beside the target and rename it into place; rows of numbers stay on one line."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two processes may write the same file
    try:
        beside.write_text(_rows(data) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _rows(value: Any, indent: str = "") -> str:
    inner = indent + " "
    if isinstance(value, Mapping) and value:
        body = ",\n".join(f"{inner}{json.dumps(str(k))}: {_rows(v, inner)}" for k, v in value.items())
        return f"{{\n{body}\n{indent}}}"
    if isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        return "[\n" + ",\n".join(inner + _rows(v, inner) for v in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)
