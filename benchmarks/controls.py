"""Costs and scores of other allocators, from what mopeq observed: controls that are judged with mopeq's quantizer.

Every function gives metrics of :class:`~mopeq.stats.Stats`. A cost of a whole expert stands under its ``gate_up``, with
zeros under ``down``, so that it is read with the granularity ``expert``. As the papers do, they take the error of
plain rounding (RTN) of a whole expert.

- PMQ (MC-MoE, arXiv 2410.06270): ``frequency^1 * weight^1.5 * error^2``, error the Frobenius norm of the change of the
  MoE layer's output; frequency and mean routing weight as shares of their layer. Solved layer by layer.
- GEMQ (arXiv 2605.23078): squared gradients of the cross entropy of the data's own next tokens at the layer's output
  times the squared change of it. Solved over the model.
- MODE (arXiv 2606.17118), on text: frequency times the mean squared change of the expert's own output. Layer by layer.
- AlphaQ (arXiv 2606.04980), without data: ``(median alpha / alpha)^gamma * Var(W) * 4^-bits`` summed over the matrices,
  alpha the Hill exponent of the largest tenth of the eigenvalues of 128 x 128 parts. Solved over the model. gamma is 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopeq.allocate.knapsack import exact
from mopeq.analyze import expert_rows
from mopeq.analyze.activation import frequency, gate_mass
from mopeq.analyze.forward import experts_module, frozen, inputs_of, logits_of, next_token_loss
from mopeq.analyze.moments import expert_inputs
from mopeq.measure import Prepared
from mopeq.precision import GROUPS, LEFT_OUT, Precision, PrecisionMap, ProjectionGroup
from mopeq.qtensor import dequantize
from mopeq.quantizers import rtn
from mopeq.seam import activate
from mopeq.source import read_group
from mopeq.spec import Inventory
from mopeq.stats import PerExpert, Stats, cost_metric, cost_table

LAYERWISE = ("pmq", "mode")
GLOBAL = ("gemq", "alphaq")
TAIL = 0.1
"""Share of the eigenvalues that AlphaQ's exponent is fitted to."""
PART, STEP, PARTS = 128, 64, 256
"""Rows and columns of the parts of a matrix, the distance between them, and how many at most."""

Rows = dict[str, dict[int, list[float]]]


def control_costs(prepared: Prepared, options: Sequence[Precision]) -> Rows:
    """Costs ``pmq``, ``gemq`` and ``mode`` of every expert at every option, of a model that was observed."""
    gradients = data_gradients(prepared)
    made: Rows = {}
    for layer in prepared.spec.layers:
        routed, count = prepared.routed[layer.index], len(layer.experts)
        module = experts_module(prepared.model, layer)
        weights = {group: read_group(prepared.source, layer, group) for group in GROUPS}
        used, mass = frequency(routed, count), gate_mass(routed, count)
        rows = expert_rows(routed, count)
        weight = mass / torch.tensor([max(1, len(r)) for r, _ in rows])
        weight /= weight.sum()
        changed = {p: {group: dequantize(rtn(weights[group], p)) for group in GROUPS} for p in options}
        found = {cost: torch.zeros(len(options), count) for cost in ("pmq", "gemq", "mode")}
        for e in range(count):
            for r, x, c in expert_inputs(routed, *rows[e], torch.device("cpu")):
                before = _output(module, e, x, weights)
                weighted = c.square() * gradients[layer.index][r].square()
                for i, p in enumerate(options):
                    change = (_output(module, e, x, changed[p]) - before).square()
                    found["pmq"][i, e] += used[e] * weight[e] ** 1.5 * (change * c.square()).sum()
                    found["gemq"][i, e] += (change * weighted).sum()
                    found["mode"][i, e] += used[e] * change.sum() / len(rows[e][0])
        for cost, values in found.items():
            for i, p in enumerate(options):
                _whole(made, cost, p, layer.index, values[i].tolist())
    return made


def _output(module: Any, expert: int, x: Tensor, weights: Mapping[ProjectionGroup, Tensor]) -> Tensor:
    """Output (n, H) of an expert for inputs x (n, H), before its routing weight."""
    return activate(module, x @ weights["gate_up"][expert].T, expert) @ weights["down"][expert].T


def _whole(made: Rows, cost: str, precision: Precision, layer: int, values: list[float]) -> None:
    made.setdefault(cost_metric(cost, "gate_up", precision), {})[layer] = values
    made.setdefault(cost_metric(cost, "down", precision), {})[layer] = [0.0] * len(values)


def data_gradients(prepared: Prepared) -> dict[int, Tensor]:
    """Gradients (tokens, H) of the summed cross entropy of the data's next tokens at every MoE layer's output."""
    model: Any = prepared.model
    caught: dict[int, list[Tensor]] = {layer.index: [] for layer in prepared.spec.layers}

    def hook(index: int) -> Any:
        def seen(module: Any, args: Any, output: Tensor) -> None:
            output.register_hook(lambda gradient: caught[index].append(gradient.reshape(-1, gradient.shape[-1])))

        return seen

    handles = [experts_module(model, layer).register_forward_hook(hook(layer.index)) for layer in prepared.spec.layers]
    embedding = model.get_input_embeddings()
    handles.append(embedding.register_forward_hook(lambda module, args, output: output.requires_grad_()))
    try:
        with frozen(model), torch.enable_grad():
            for batch in prepared.batches:
                if not bool(batch["attention_mask"].all()):
                    raise RuntimeError("batches with padding; rows of gradients would not be rows of tokens")
                loss, _ = next_token_loss(logits_of(model, inputs_of(batch, embedding.weight.device)), batch)
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return {index: torch.cat(parts) for index, parts in caught.items()}


def alphaq(prepared: Prepared, options: Sequence[Precision], gamma: float = 1.0) -> Rows:
    """AlphaQ's cost, from the weights alone."""
    alphas: dict[int, Tensor] = {}
    variances: dict[int, Tensor] = {}
    for layer in prepared.spec.layers:
        gate_up, down = (read_group(prepared.source, layer, group) for group in GROUPS)
        matrices = [*gate_up.chunk(2, 1), down]
        alphas[layer.index] = torch.stack([hill(matrix) for matrix in matrices], 1)
        variances[layer.index] = torch.stack([matrix.flatten(1).var(-1) for matrix in matrices], 1)
    middle = torch.cat([row.flatten() for row in alphas.values()]).median()
    made: Rows = {}
    for p in options:
        for index, alpha in alphas.items():
            values = ((middle / alpha) ** gamma * variances[index]).sum(1) * 4.0**-p.bits
            _whole(made, "alphaq", p, index, values.tolist())
    return made


def hill(matrices: Tensor, tail: float = TAIL) -> Tensor:
    """PL_Alpha_Hill of matrices (n, rows, columns): ``1 + k / sum over the k largest of ln(l / l_(k+1))``, (n,).

    The eigenvalues l are those of W^T W of equally large square parts of a matrix, taken together (FARMS).
    """
    side = min(PART, *matrices.shape[-2:])
    parts = matrices.unfold(1, side, min(STEP, side)).unfold(2, side, min(STEP, side)).flatten(1, 2)[:, :PARTS]
    values = torch.linalg.svdvals(parts.double()).square().flatten(1).sort(-1, descending=True).values
    k = max(1, int(tail * values.shape[-1]))
    return 1 + k / (values[:, :k] / values[:, k : k + 1]).log().sum(-1)


def layer_ranks(scores: PerExpert) -> dict[int, list[float]]:
    """Ranks within the layer, 0 to 1: dealt out by these, every layer gets its share of a histogram."""
    return {
        layer: (np.argsort(np.argsort(row, kind="stable"), kind="stable") / max(1, len(row) - 1)).tolist()
        for layer, row in scores.items()
    }


def unused(frequency: PerExpert, precision: Precision) -> Rows:
    """Cost ``unused``, of leaving an expert out (its frequency) or having it at ``precision`` (nothing)."""
    made: Rows = {}
    for layer, row in frequency.items():
        _whole(made, "unused", LEFT_OUT, layer, list(row))
        _whole(made, "unused", precision, layer, [0.0] * len(row))
    return made


def random_scores(model: Inventory, seed: int) -> dict[int, list[float]]:
    """A random number for every expert."""
    draw = np.random.default_rng(seed)
    return {layer: draw.random(count).tolist() for layer, count in model.experts.items()}


def layerwise(stats: Stats, cost: str, budget: int, options: Sequence[Precision], rest: Mapping[str, Precision]) -> Any:
    """The map of least cost of whole experts if every layer gets an even share of ``budget``, bytes of all experts.

    What a layer cannot spend goes to the next.
    """
    table = cost_table(stats, cost, options, "expert")
    layers = np.array([unit.layer for unit in table.units])
    choice = np.zeros(len(table.units), dtype=np.int64)
    spent = 0
    for number, layer in enumerate(stats.model.layers, 1):
        at = np.flatnonzero(layers == layer)
        share = budget * number // len(stats.model.layers) - spent
        solved = exact(table.loss[at], table.size[at], share)
        choice[at] = solved.choice
        spent += solved.size
    made: PrecisionMap = table.to_map(choice, rest, {"method": "knapsack by layers", "cost": cost})
    stats.model.check(made)
    return made
