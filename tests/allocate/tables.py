"""Statistics with drawn costs for tests of allocation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mopeq.precision import GROUPS, Precision
from mopeq.spec import Inventory, LayerShape
from mopeq.stats import Stats, cost_metric

P2, P3, P4 = Precision(2, 32), Precision(3, 32), Precision(4, 32)
OPTIONS = (P2, P3, P4)


def model(layers: int = 3, experts: int = 8, uneven: bool = False) -> Inventory:
    """``uneven``: the last layer has half the width and one expert more."""
    shapes = {k: LayerShape(experts, 64, 64, 2) for k in range(layers)}
    if uneven:
        shapes[layers - 1] = LayerShape(experts + 1, 64, 32, 2)
    return Inventory("olmoe", shapes, {"attention": ((64, 64, 4),), "lm_head": ((128, 64, 1),)}, 9000, 18000, 900)


def drawn(inventory: Inventory, seed: int = 0) -> dict[int, tuple[float, ...]]:
    random = np.random.default_rng(seed)
    return {k: tuple(random.lognormal(sigma=1.5, size=n).tolist()) for k, n in inventory.experts.items()}


def measured(
    inventory: Inventory | None = None,
    options: Sequence[Precision] = OPTIONS,
    seed: int = 0,
    cost: str = "fisher_error",
) -> Stats:
    """Scores and a cost at each option: heavy-tailed over experts, falling fourfold a bit, with noise."""
    inventory = inventory or model()
    random = np.random.default_rng(seed)
    metrics = {name: drawn(inventory, seed + i) for i, name in enumerate(("frequency", "inverse_norm"), 100)}
    for i, group in enumerate(GROUPS):
        sizes = drawn(inventory, seed + 200 + i)
        for p in options:
            noise = {k: random.lognormal(sigma=0.2, size=n) for k, n in inventory.experts.items()}
            metrics[cost_metric(cost, group, p)] = {
                k: tuple(float(v) for v in np.array(row) * noise[k] * 4.0**-p.bits) for k, row in sizes.items()
            }
    return Stats(inventory, metrics)
