"""Whether the error of GPTQ can be told from the factor of its moments, without rounding, at every width.

GPTQ's squared error in its damped moments R D R^T is ``sum_j D_jj r_j^2``, r the rounding errors of the compensated
columns (quantizers/gptq.py). Uniform errors of steps s give ``sum_j D_jj s_j^2 / 12``. Without the damping d, which the
error of the layer does not have, it is ``sum_j (D_jj - d |row j of R^-1|^2) s_j^2 / 12``: the errors that columns get
to compensate others are r R^-1. Both are compared with the errors of what GPTQ makes, of every unit at every option:

- ``moments``: with tr(E H E^T) of the codes, which is what the estimate is of.
- ``output``: with ``output_error``, the cost that allocation reads. As an estimate of it serves what is measured at one
  option times the ratio of estimates, so that one option in all is rounded.

Steps are those of min-max grids, or of the grids that GPTQ searches. ``map`` is what the knapsack makes of these costs
at ``--bits``: the sum of its units' output errors as they are solved, beside that of the map from solved ones. Seconds
are of the processor.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from common import START, arguments, store
from mopeq.allocate import allocate
from mopeq.analyze import layer_costs, moments
from mopeq.analyze.moments import enough_tokens
from mopeq.measure import Calibration, observed, open_model
from mopeq.precision import GROUPS, Precision
from mopeq.quantizers import fallback_moments, gptq, moment_error
from mopeq.quantizers.gptq import DAMPING, FACTORS, Factored, factored
from mopeq.quantizers.grid import minmax, searched
from mopeq.source import read_group
from mopeq.spec import Inventory
from mopeq.stats import Stats, cost_metric

MIDDLE = 3
"""Bits of the option whose output error is measured."""


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "", "estimate")
    parser.add_argument("--model", required=True, help="folder of the original")
    parser.add_argument("--label", required=True, help="how results call it")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument(
        "--bits", type=float, default=2.5, help="a weight of the experts, of the maps that are compared"
    )
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    results: dict[str, Any] = json.loads(asked.out.read_text())["results"] if asked.out.exists() else {}
    calibration = Calibration(asked.data, samples=asked.samples, length=asked.length)
    prepared = observed(open_model(asked.model), calibration, gradients=False)
    options = [p for p in prepared.inventory.precisions() if p.bits < 16 and not p.codebook]
    cells: dict[str, list[Tensor]] = {}
    spent: dict[str, float] = {}
    measured: dict[str, dict[int, list[float]]] = {}
    guessed: dict[str, dict[int, list[float]]] = {}
    for layer in prepared.spec.layers:
        seen, module = prepared.routed[layer.index], prepared.model.get_submodule(layer.module)
        weights = {group: read_group(prepared.source, layer, group) for group in GROUPS}
        found = moments(seen, module, weights["gate_up"])
        costs = layer_costs(seen, module, weights, found, options, gptq, costs=["output_error"])
        for name, values in costs.items():
            measured.setdefault(name, {})[layer.index] = list(values)
            guessed.setdefault(name, {})[layer.index] = list(values)
        for group in GROUPS:
            used = (found.tokens > 0).nonzero().flatten().tolist()
            add(cells, spent, group, weights[group], getattr(found, group), found.tokens, options, costs)
            for j, option in enumerate(options):
                values = guessed[cost_metric("output_error", group, option)][layer.index]
                for e, value in zip(used, scaled(cells, "min-max", options)[-1][:, j].tolist(), strict=True):
                    values[e] = value
    table = {name: torch.cat(parts) for name, parts in cells.items()}  # (units, options)
    row = {"options": list(map(str, options)), "units": len(table["moments"]), "spent": spent, **judged(table, options)}
    row["map"] = allocated(prepared.inventory, measured, guessed, options, asked.bits)
    results[asked.label] = row | {k: START[k] for k in ("commit", "command", "started")}
    print(json.dumps(row, indent=1))
    store(asked.out, results)


def add(
    cells: dict[str, list[Tensor]],
    spent: dict[str, float],
    group: str,
    weight: Tensor,
    summed: Tensor,
    tokens: Tensor,
    options: Sequence[Precision],
    costs: Mapping[str, Sequence[float]],
) -> None:
    """Errors (experts that saw tokens, options) of one group of one layer, solved and estimated."""
    used = (tokens > 0).nonzero().flatten().tolist()
    filled, _ = fallback_moments(summed, tokens, enough_tokens(summed.shape[-1], None))
    weight, filled = weight[used], filled[used]

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begun = time.process_time()
        made = work()
        spent[name] = spent.get(name, 0) + time.process_time() - begun
        return made

    factors = timed("factors", lambda: factored(filled))
    columns: dict[str, list[Tensor]] = {}
    inverse = timed("inverse", lambda: inverses(factors))
    for option in options:
        codes = timed(f"solved at {option}", lambda o=option: gptq(weight, o, factors))
        columns.setdefault("moments", []).append(moment_error(weight, codes, filled))
        output = costs[cost_metric("output_error", group, option)]
        columns.setdefault("output", []).append(torch.tensor([output[e] for e in used], dtype=torch.float64))
        coarse = timed("min-max grids", lambda o=option: minmax(weight, o).scale)
        fine = timed("searched grids", lambda o=option: searched(weight, o, factors.importance, factors=FACTORS,
                                                                 refits=0).scale)  # fmt: skip
        mean = filled.diagonal(dim1=1, dim2=2).mean(1).double()
        for name, scale, rest in (
            ("min-max", coarse, inverse), ("searched", fine, inverse), ("searched, damped", fine, None),
        ):  # fmt: skip
            made = timed(name, lambda s=scale, r=rest: estimated(factors, s, r))
            columns.setdefault(name, []).append(mean * made)
    for name, parts in columns.items():
        cells.setdefault(name, []).append(torch.stack(parts, 1))


def inverses(factors: Factored) -> Tensor:
    """Squares of the rows of R^-1, summed: (experts, in)."""
    eye = torch.eye(factors.upper.shape[-1]).expand_as(factors.upper)
    rows = torch.linalg.solve_triangular(factors.upper, eye, upper=True, unitriangular=True)
    return rows.square().sum(2)


def estimated(factors: Factored, scale: Tensor, inverse: Tensor | None) -> Tensor:
    """Expected errors (experts,) at a mean diagonal of 1."""
    weights = factors.pivots if inverse is None else factors.pivots - DAMPING * inverse
    size = weights.shape[1] // scale.shape[2]
    steps = scale.double().square().sum(1).repeat_interleave(size, 1).gather(1, factors.order)
    return (weights.double() * steps).sum(1) / 12


def scaled(cells: Mapping[str, Sequence[Tensor]], name: str, options: Sequence[Precision]) -> list[Tensor]:
    """Output errors (units, options) that one option and the ratio of estimates give."""
    middle = [option.bits for option in options].index(MIDDLE)
    at = slice(middle, middle + 1)
    return [o[:, at] * e / e[:, at] for o, e in zip(cells["output"], cells[name], strict=True)]


def allocated(
    inventory: Inventory,
    measured: Mapping[str, Mapping[int, Sequence[float]]],
    guessed: Mapping[str, Mapping[int, Sequence[float]]],
    options: Sequence[Precision],
    bits: float,
) -> dict[str, Any]:
    """Measured output errors, summed over units, of maps of equal bits from measured and from estimated costs."""
    maps = {
        name: allocate(Stats(inventory, {}).with_metrics(costs), budget=f"{bits}bpw", cost="output_error",
                       options=options, protect=False)
        for name, costs in (("measured", measured), ("estimated", guessed))
    }  # fmt: skip
    chosen = {
        name: [(g, layer, e, p) for g in GROUPS for layer, row in made.experts[g].items() for e, p in enumerate(row)]
        for name, made in maps.items()
    }
    sums = {
        name: sum(measured[cost_metric("output_error", g, p)][layer][e] for g, layer, e, p in units)
        for name, units in chosen.items()
    }
    same = sum(a == b for a, b in zip(*chosen.values(), strict=True))
    return {"bits": bits, "output error": sums, "units": len(chosen["measured"]), "same precision": same}


def judged(table: Mapping[str, Tensor], options: Sequence[Precision]) -> dict[str, Any]:
    """Rank correlations over units at each option and over all pairs, and the ratio to what is solved."""
    found: dict[str, Any] = {}
    for name in ("min-max", "searched", "searched, damped"):
        by_output = scaled({key: [cells] for key, cells in table.items()}, name, options)[0]
        for what, guess in (("moments", table[name]), ("output", by_output)):
            solved = table[what]
            ratio = (guess / solved).log()
            found[f"{name}, {what}"] = {
                "all pairs": float(spearmanr(guess.flatten(), solved.flatten()).statistic),
                "by option": [float(spearmanr(guess[:, j], solved[:, j]).statistic) for j in range(len(options))],
                "ratio": [float(ratio[:, j].mean().exp()) for j in range(len(options))],
                "spread": [float(ratio[:, j].std().exp()) for j in range(len(options))],
            }
    return found


if __name__ == "__main__":
    main()
