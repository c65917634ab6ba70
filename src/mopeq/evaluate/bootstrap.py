"""Numbers with a confidence interval: the bootstrap over windows of text.

Tokens of one window depend on each other, so windows, not tokens, are resampled. A quantity is a ratio of sums over
windows (nats per token, share of tokens), and every resample computes the ratio again. Intervals are percentile
intervals (Efron, "Better Bootstrap Confidence Intervals", 1987); below some twenty windows they are a little narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mopeq.errors import DataError

__all__ = ["RESAMPLES", "Estimate", "Ratio", "difference_estimate", "ratio_estimate", "ratios_estimate"]

RESAMPLES = 1000
COVERAGE = 0.95
Ratio = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Totals and counts of every unit, float64 (units,)."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; ``low`` and ``high`` are None where a single window leaves nothing to resample."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval has zero outside: for a difference, whether its sign is established."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high

    def through(self, function: Callable[[float], float]) -> Estimate:
        """The estimate of an increasing function of the value."""
        low = None if self.low is None else function(self.low)
        high = None if self.high is None else function(self.high)
        return Estimate(function(self.value), low, high)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Estimate:
        """Inverse of ``dataclasses.asdict``."""
        ends = (None if data[k] is None else float(data[k]) for k in ("low", "high"))
        return cls(float(data["value"]), *ends)


def ratio_estimate(
    totals: Sequence[float], counts: Sequence[int], *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """``sum(totals) / sum(counts)`` over windows; the same seed gives the same interval."""
    _check(totals, counts)
    value = math.fsum(totals) / sum(counts)
    if len(counts) < 2:
        return Estimate(value)
    drawn = _draws(len(counts), seed, resamples)
    return Estimate(value, *_interval((drawn @ np.asarray(totals)) / (drawn @ np.asarray(counts))))


def difference_estimate(
    first: Sequence[float], second: Sequence[float], counts: Sequence[int], *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """``(sum(first) - sum(second)) / sum(counts)``, both resampled with the same windows: a paired comparison."""
    _check(first, counts)
    _check(second, counts)
    return ratio_estimate([a - b for a, b in zip(first, second, strict=True)], counts, seed=seed, resamples=resamples)


def ratios_estimate(
    parts: Sequence[Ratio], minus: Sequence[Ratio] = (), *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """A sum of ratios ``sum(totals) / sum(counts)``, each over units of its own, which are drawn apart.

    With ``minus``, ratios over the same units in the same order, less their sum: the units are drawn together. A ratio
    whose counts add up to 0 is 0.
    """
    value, drawn = 0.0, np.zeros(resamples)
    for number, part in enumerate(parts):
        count = len(part[0])
        weights = _draws(count, [seed, number], resamples)
        for sign, one in ((1, part), *((-1, other) for other in minus[number : number + 1])):
            value += sign * float(_ratio(one, np.ones((1, count)))[0])
            drawn += sign * _ratio(one, weights)
    return Estimate(value, *_interval(drawn)) if any(len(totals) > 1 for totals, _ in parts) else Estimate(value)


def _ratio(part: Ratio, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """weights: (resamples, units), how often each is drawn; returns (resamples,)."""
    above, below = weights @ part[0], weights @ part[1]
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _check(totals: Sequence[float], counts: Sequence[int]) -> None:
    if len(totals) != len(counts):
        raise DataError(f"{len(totals)} totals for {len(counts)} windows; expected one for each")
    if sum(counts) < 1:
        raise DataError("no token was scored; expected at least one; give more text")


def _draws(n: int, seed: int | Sequence[int], resamples: int) -> NDArray[np.float64]:
    """How often each of ``n`` windows is drawn in each resample: (resamples, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    tail = 100 * (1 - COVERAGE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
