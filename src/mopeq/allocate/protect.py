"""Super-experts: the few whose output has values of another magnitude than all others', on which attention leans.

Without three of its 6,144 experts Qwen3-30B-A3B has a perplexity of 60 for 8.7 (arXiv 2507.23279). Their cost is
measured like all others', but on few tokens: their peaks stand at the first token of a text. So they are kept at the
best precision on offer, which costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mopeq.stats import Stats

__all__ = ["PEAK", "super_experts", "super_sentence"]

PEAK = "output_peak"
"""The metric that tells them (:mod:`mopeq.analyze.peak`)."""
RANK, OF_LARGEST = 99.5, 0.1
"""The source's bounds: above this percentile of all experts, and above this share of the largest."""
OF_MEDIAN = 30.0
"""Times the median. Every model has experts above the other two bounds; the source looks only in layers where values
of the hidden states become massive, a thousand times their median."""


def super_experts(stats: Stats) -> dict[str, float]:
    """``{"3.17": its output's peak over the median of all experts' peaks}``, largest first; empty if not measured."""
    if PEAK not in stats.metrics:
        return {}
    peaks = {f"{layer}.{e}": value for layer, row in stats.metrics[PEAK].items() for e, value in enumerate(row)}
    values = np.array(list(peaks.values()))
    median = float(np.median(values[values > 0])) if (values > 0).any() else np.inf
    bound = max(float(np.percentile(values, RANK, method="lower")), OF_LARGEST * values.max(), OF_MEDIAN * median)
    found = {name: value / median for name, value in peaks.items() if value >= bound}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def super_sentence(found: Mapping[str, float]) -> str:
    """Who they are, for people; empty if there are none."""
    named = [f"{name} ({times:.0f} times the median)" for name, times in found.items()]
    many = "s" if len(named) > 1 else ""
    return f"{len(named)} super-expert{many} by the peak of their output: {', '.join(named)}" if named else ""
