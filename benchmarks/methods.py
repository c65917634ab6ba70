"""Methods beside bits and quantizers, each on trial: does it lower the KL to the original at equal bytes?

For every calibration seed the model is observed and measured once, and every unit is quantized (GPTQ) at 2, 3 and 4
bits in groups of 128. A study fills the experts of a copy of the original, whose other weights stay as they were, and
judges it on held-out text, window by window beside what it is to improve on.

Studies: ``balance`` (calibration sequences chosen by experts), ``progressive`` (costs measured again on the quantized
model), ``interactions`` (losses that add up before they are squared), ``residual`` (low-rank corrections beside bits),
``prune`` (experts left out). ``balance`` uses all seeds, the others the first.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import store, study_arguments
from mopeq.allocate import allocate, uniform_map
from mopeq.allocate.knapsack import exact
from mopeq.analyze import Routed, expert_rows, layer_costs, moments, observe
from mopeq.analyze.forward import experts_module
from mopeq.analyze.moments import enough_tokens, expert_inputs
from mopeq.balance import POOL, covering, sequence_tokens
from mopeq.data.text import read_texts, text_windows
from mopeq.evaluate import Divergence, paired_difference
from mopeq.evaluate.divergence import judging
from mopeq.measure import Calibration, Prepared, calibrated, observed, open_model
from mopeq.precision import GROUPS, Precision, PrecisionMap, ProjectionGroup
from mopeq.qtensor import Codes, dequantize
from mopeq.quantizers import QUANTIZERS, fallback_moments
from mopeq.seam import activate
from mopeq.source import read_group
from mopeq.stats import CostTable, Stats, cost_metric, cost_table

OPTIONS = tuple(Precision(bits, 128) for bits in (2, 3, 4))
COST = "fisher_error"
POINTS = (2.25, 2.5)
"""Bits per expert weight at which maps are compared."""
SHARES = (0.25, 1.0)
"""Of an even share, that ``balance`` asks for."""
RANKS = (1, 2, 4)
Weights = dict[int, dict[ProjectionGroup, Tensor]]
"""float32 (experts, rows, in) of every layer and group."""
Key = tuple[int, ProjectionGroup, Precision]


@dataclass
class Bench:
    """One calibration seed: what the original saw, its experts, every unit at every option, costs, and a judge."""

    prepared: Prepared
    seed: int
    full: Weights
    at: dict[Key, Tensor]
    stats: Stats
    judge: Callable[[nn.Module], Divergence]
    rows: list[dict[str, Any]] = field(default_factory=list)
    known: dict[float, Divergence] = field(default_factory=dict)

    def weights(self, precisions: PrecisionMap) -> Weights:
        """Experts at a map's precisions."""
        return {
            layer: {
                g: torch.stack([self.at[layer, g, p][e] for e, p in enumerate(precisions.experts[g][layer])])
                for g in GROUPS
            }
            for layer in self.full
        }

    def model(self, weights: Weights) -> nn.Module:
        """The original with other experts."""
        original = self.prepared.model
        shared: dict[int, Any] = {id(t): t for t in chain(original.parameters(), original.buffers())}
        made = copy.deepcopy(original, shared)
        for layer in self.prepared.spec.layers:
            module: Any = experts_module(made, layer)
            module.gate_up_proj = nn.Parameter(weights[layer.index]["gate_up"], False)
            module.down_proj = nn.Parameter(weights[layer.index]["down"], False)
        return made

    def knapsack(self, bits: float, stats: Stats | None = None) -> PrecisionMap:
        """The map that the additive costs give."""
        return allocate(stats or self.stats, budget=f"{bits}bpw", cost=COST, options=OPTIONS)

    def row(
        self, study: str, name: str, model: nn.Module, size: int, than: Divergence | None = None, **facts: Any
    ) -> Divergence:
        """Judge a model whose experts take ``size`` bytes, beside another one."""
        found = self.judge(model)
        made = {"study": study, "name": name, "seed": self.seed, "expert_bytes": size, "kl": _short(found.kl.value)}
        if than is not None:
            gain = paired_difference(found, than)
            made |= {"than": _short(than.kl.value), "difference": _short(gain.value)}
            made |= {"low": _short(gain.low or 0.0), "high": _short(gain.high or 0.0)}
        self.rows.append(made | facts)
        print(time.strftime("%H:%M:%S"), made | facts, flush=True)
        return found

    def maps(self) -> Iterator[tuple[float, PrecisionMap, Divergence]]:
        """The knapsack at every point, judged once."""
        for bits in POINTS:
            made = self.knapsack(bits)
            if bits not in self.known:
                size = self.prepared.inventory.expert_bytes(made)
                self.known[bits] = self.row("knapsack", f"knapsack {bits}", self.model(self.weights(made)), size)
            yield bits, made, self.known[bits]


def main() -> None:
    asked = _parser().parse_args()
    torch.set_num_threads(asked.threads)
    opened = open_model(asked.model)
    results: dict[str, Any] = {
        "model": asked.label or Path(asked.model).name, "windows": asked.windows, "length": asked.length,
        "calibration": {"samples": asked.samples, "length": asked.length}, "rows": [],
    }  # fmt: skip
    for number, seed in enumerate(asked.seeds):
        calibration = Calibration(asked.data, asked.samples, asked.length, 8, seed, cost_share=1.0)
        prepared = observed(opened, calibration, gradients=number == 0, dtype=torch.float32)
        windows = [
            window
            for path in asked.text
            for window in text_windows(
                read_texts(path), prepared.tokenizer, asked.length, limit=asked.windows // len(asked.text)
            )
        ]
        with (
            tempfile.TemporaryDirectory() as folder,
            judging(prepared.model, windows, cache=folder, batch_size=8) as judge,
        ):
            bench = _measured(prepared, seed, lambda model, judge=judge: judge(model, "").divergence, number == 0)
            for study in asked.studies if number == 0 else [s for s in asked.studies if s in EVERY_SEED]:
                before = time.process_time()
                STUDY[study](bench, calibration)
                seconds = results.setdefault("processor_seconds", {})
                seconds[f"{study}, seed {seed}"] = round(time.process_time() - before, 1)
                results["rows"] = [*results["rows"], *bench.rows]
                bench.rows.clear()
                store(asked.out, results)


def _parser() -> argparse.ArgumentParser:
    parser = study_arguments(__doc__ or "", "methods")
    parser.add_argument("--studies", nargs="+", choices=STUDY, default=[*STUDY])
    return parser


def _measured(prepared: Prepared, seed: int, judge: Callable[[nn.Module], Divergence], costs: bool) -> Bench:
    """Every unit at every option (2 bits alone without costs), and costs."""
    found: dict[str, dict[int, list[float]]] = {}
    at: dict[Key, Tensor] = {}
    full: Weights = {}
    for layer in prepared.spec.layers:
        index, seen, module = layer.index, prepared.routed[layer.index], experts_module(prepared.model, layer)
        full[index] = {g: read_group(prepared.source, layer, g) for g in GROUPS}
        if not costs:
            at |= {(index, g, OPTIONS[0]): w for g, w in _at_two_bits(full[index], seen, module).items()}
            continue
        kept: dict[Key, list[Tensor]] = {}

        def keep(group: ProjectionGroup, experts: Sequence[int], codes: Codes, to: Any = kept, at: int = index) -> None:
            to.setdefault((at, group, codes.precision), []).append(dequantize(codes))

        made = moments(seen, module, full[index]["gate_up"])
        for name, row in layer_costs(
            seen, module, full[index], made, OPTIONS, QUANTIZERS["gptq"], costs=(COST,), keep=keep
        ).items():
            found.setdefault(name, {})[index] = row
        at |= {key: torch.cat(parts) for key, parts in kept.items()}
    return Bench(prepared, seed, full, at, Stats(prepared.inventory, {}).with_metrics(found), judge)


def _at_two_bits(
    full: Mapping[ProjectionGroup, Tensor], seen: Routed, module: nn.Module
) -> dict[ProjectionGroup, Tensor]:
    """GPTQ, without costs."""
    made = moments(seen, module, full["gate_up"])
    filled = {g: fallback_moments(m, made.tokens, enough_tokens(m.shape[-1], None))[0]
              for g in GROUPS for m in [getattr(made, g)]}  # fmt: skip
    return {g: dequantize(QUANTIZERS["gptq"](full[g], OPTIONS[0], filled[g])) for g in GROUPS}


def balance(bench: Bench, calibration: Calibration) -> None:
    """Uniform 2 bits from sequences drawn, from as many chosen of a pool, and from the whole pool."""
    prepared, taken = bench.prepared, calibration.samples
    made = uniform_map(prepared.inventory, OPTIONS[:1])
    size = prepared.inventory.expert_bytes(made)
    drawn = bench.row("balance", f"{taken} drawn", bench.model(bench.weights(made)), size)
    larger = Calibration(calibration.data, POOL * taken, calibration.length, 8, calibration.seed)
    pool = calibrated(prepared, larger).batches
    counts = sequence_tokens(prepared.source, prepared.spec, pool, taken)
    ids = torch.cat([batch["input_ids"] for batch in pool])
    even = counts[:taken].sum() / counts.shape[1]
    for share in (*SHARES, None):
        wanted = int((share or 1.0) * even)
        rows = list(range(len(ids)))
        if share is not None:
            rows = covering(counts, np.full(counts.shape[1], wanted), taken)
        batches = [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in ids[rows].split(8)]
        routed = observe(prepared.model, prepared.spec, batches)
        weights = {
            layer.index: _at_two_bits(
                bench.full[layer.index], routed[layer.index], experts_module(prepared.model, layer)
            )
            for layer in prepared.spec.layers
        }
        name = f"{len(ids)}, the whole pool" if share is None else f"{taken} of {len(ids)} at {share} of an even share"
        short = [int((counts[part].sum(0) < wanted).sum()) for part in (range(taken), rows)]
        bench.row("balance", name, bench.model(weights), size, drawn, wanted=wanted, short=short)


def changes(
    bench: Bench, seen: Routed, index: int, changed: Mapping[ProjectionGroup, Sequence[Tensor]]
) -> Iterator[tuple[tuple[int, int, int], Tensor, Tensor]]:
    """Of each (expert, group, option): rows (n,) and the change (n, H) of the layer's output at them."""
    module: Any = experts_module(bench.prepared.model, bench.prepared.spec.layer(index))
    full = bench.full[index]
    for expert, (rows, weights) in enumerate(expert_rows(seen, len(full["down"]))):
        up, down = full["gate_up"][expert], full["down"][expert]
        for r, x, c in expert_inputs(seen, rows, weights, torch.device("cpu"), len(seen.hidden)):
            h = activate(module, x @ up.T, expert)
            for o, weight in enumerate(changed["gate_up"]):
                yield (expert, 0, o), r, (activate(module, x @ weight[expert].T, expert) - h) @ down.T * c
            for o, weight in enumerate(changed["down"]):
                yield (expert, 1, o), r, h @ (weight[expert] - down).T * c


def losses(bench: Bench, seen: Routed, index: int, changed: Mapping[ProjectionGroup, Sequence[Tensor]]) -> Any:
    """fisher_error (experts, groups, options) of other weights, as mopeq/analyze/cost.py defines it."""
    assert seen.gradient is not None
    made = np.zeros((len(bench.full[index]["down"]), len(GROUPS), max(map(len, changed.values()))))
    for at, rows, dz in changes(bench, seen, index, changed):
        made[at] = float((dz * seen.gradient[rows]).square().sum(dtype=torch.float64))
    return made / len(seen.hidden)


def _options(bench: Bench, index: int) -> dict[ProjectionGroup, list[Tensor]]:
    return {g: [bench.at[index, g, p] for p in OPTIONS] for g in GROUPS}


def progressive(bench: Bench, calibration: Calibration) -> None:
    """Costs measured on the model at 3.0 bits, then on the one that these make at 2.5."""
    known = {bits: (made, than) for bits, made, than in bench.maps()}
    before = bench.knapsack(3.0)
    for bits, start in ((2.5, "3.0"), (2.25, "2.5 after 3.0")):
        stats = _measured_on(bench, bench.model(bench.weights(before)))
        made = bench.knapsack(bits, stats)
        old, than = known[bits]
        moved = sum(a != b for g in GROUPS for k in old.layers
                    for a, b in zip(old.experts[g][k], made.experts[g][k], strict=True))  # fmt: skip
        size = bench.prepared.inventory.expert_bytes(made)
        model = bench.model(bench.weights(made))
        bench.row("progressive", f"knapsack {bits}, costs at {start}", model, size, than, units_that_differ=moved)
        before = made


def _measured_on(bench: Bench, model: nn.Module) -> Stats:
    """Costs at another model's activations and gradients, of the original's weights and their codes."""
    prepared, found = bench.prepared, dict[str, dict[int, list[float]]]()
    for index, seen in observe(model, prepared.spec, prepared.batches, gradients=True, seed=bench.seed).items():
        made = losses(bench, seen, index, _options(bench, index))
        for (i, g), (j, p) in product(enumerate(GROUPS), enumerate(OPTIONS)):
            found.setdefault(cost_metric(COST, g, p), {})[index] = made[:, i, j].tolist()
    return Stats(prepared.inventory, {}).with_metrics(found)


def interactions(bench: Bench, calibration: Calibration) -> None:
    """The knapsack's map after exchanges at equal bytes that lower additive losses plus what units do to each other.

    With s the inner product of gradient and output change of a unit at a token, KL is half the mean of the squared sum
    of s over units and over the tokens of a sequence, in expectation over labels. The additive loss has its diagonal;
    cross terms between units come from the Gram matrix of s over tokens, or over sequences.
    """
    table = cost_table(bench.stats, COST, OPTIONS)
    units = {(u.layer, u.expert, GROUPS.index(u.group or "down")): i for i, u in enumerate(table.units)}
    tokens = len(next(iter(bench.prepared.routed.values())).hidden)
    inner = torch.zeros(tokens, len(units), len(OPTIONS))
    for index, seen in bench.prepared.routed.items():
        assert seen.gradient is not None
        for (expert, group, option), rows, dz in changes(bench, seen, index, _options(bench, index)):
            inner[rows, units[index, expert, group], option] = (dz * seen.gradient[rows]).sum(-1)
    flat = inner.flatten(1)
    by = {"tokens": flat, "sequences": flat.reshape(-1, calibration.length, flat.shape[1]).sum(1)}
    for bits, made, than in bench.maps():
        size = bench.prepared.inventory.expert_bytes(made)
        for kind, rows in by.items():
            halves = [((part.T @ part) / (tokens / 2)).double().numpy() for part in (rows[::2], rows[1::2])]
            start = _choice(table, made)
            crossed = [_crossed(gram, start) for gram in halves]
            choice, steps = _exchanged(table, (halves[0] + halves[1]) / 2, start)
            model = bench.model(bench.weights(table.to_map(choice, made.rest, {})))
            facts = {"exchanges": steps, "additive": _short(float(_at(table.loss, start).sum())),
                     "cross_terms_of_both_halves": [_short(v) for v in crossed]}  # fmt: skip
            bench.row("interactions", f"knapsack {bits}, cross terms over {kind}", model, size, than, **facts)


def _choice(table: CostTable, made: PrecisionMap) -> Any:
    return np.array([OPTIONS.index(made.of(u.layer, u.expert, u.group or "down")) for u in table.units])


def _at(values: Any, choice: Any) -> Any:
    return values[np.arange(len(choice)), choice]


def _crossed(gram: Any, choice: Any) -> float:
    """Sum of the Gram matrix between different units at their options."""
    at = np.arange(len(choice)) * len(OPTIONS) + choice
    part = gram[np.ix_(at, at)]
    return float(part.sum() - np.trace(part))


def _exchanged(table: CostTable, gram: Any, choice: Any, most: int = 200) -> tuple[Any, int]:
    """Exchanges of the options of two units of one shape, the best first, while they lower losses plus cross terms."""
    count, options = len(choice), len(OPTIONS)
    choice = choice.copy()
    for step in range(most):
        at = np.arange(count) * options + choice
        field_ = gram[:, at].sum(1).reshape(count, options)
        own = np.stack([gram[np.arange(count) * options + o, at] for o in range(options)], 1)
        single = table.loss - _at(table.loss, choice)[:, None] + 2 * (field_ - own - _at(field_ - own, choice)[:, None])
        best, pair = -1e-12, None
        for low in range(options - 1):
            up, down = np.flatnonzero(choice == low), np.flatnonzero(choice == low + 1)
            a, b = np.meshgrid(up, down, indexing="ij")
            both = single[a, low + 1] + single[b, low]
            u = gram.reshape(count, options, count, options)
            both += 2 * (u[a, low + 1, b, low] - u[a, low + 1, b, low + 1] - u[a, low, b, low] + u[a, low, b, low + 1])
            both = np.where(table.size[a, low] == table.size[b, low], both, np.inf)
            if both.size and both.min() < best:
                best, where = both.min(), np.unravel_index(both.argmin(), both.shape)
                pair = int(up[where[0]]), int(down[where[1]])
        if pair is None:
            return choice, step
        choice[list(pair)] = choice[list(pair[::-1])]
    return choice, most


def residual(bench: Bench, calibration: Calibration) -> None:
    """2 bits with a correction of low rank in float16, least squared output error, as options of the knapsack."""
    prepared, two = bench.prepared, OPTIONS[0]
    table = cost_table(bench.stats, COST, OPTIONS)
    loss, size = [table.loss], [table.size]
    filled: dict[Key | tuple[int, ProjectionGroup, int], Tensor] = dict(bench.at)
    extra = np.zeros((len(table.units), len(RANKS)))
    more = np.zeros((len(table.units), len(RANKS)), dtype=np.int64)
    for layer in prepared.spec.layers:
        index, seen = layer.index, prepared.routed[layer.index]
        made = moments(seen, experts_module(prepared.model, layer), bench.full[index]["gate_up"])
        changed: dict[ProjectionGroup, list[Tensor]] = {}
        for g in GROUPS:
            summed = fallback_moments(getattr(made, g), made.tokens, enough_tokens(getattr(made, g).shape[-1], None))[0]
            damp = 0.2 * summed.diagonal(dim1=1, dim2=2).mean(1)
            root = torch.linalg.cholesky(summed + damp[:, None, None] * torch.eye(summed.shape[-1]))
            q = bench.at[index, g, two]
            u, s, v = torch.linalg.svd((bench.full[index][g] - q) @ root, full_matrices=False)
            changed[g] = []
            for rank in RANKS:
                right = torch.linalg.solve_triangular(root, v[:, :rank], upper=False, left=False)
                left = (u[..., :rank] * s[:, None, :rank]).half().float()
                changed[g].append(q + left @ right.half().float())
                filled[index, g, rank] = changed[g][-1]
        found = losses(bench, seen, index, changed)
        for i, unit in enumerate(table.units):
            if unit.layer == index and unit.group is not None:
                extra[i] = found[unit.expert, GROUPS.index(unit.group)]
                rows, inputs = bench.full[index][unit.group].shape[1:]
                more[i] = [table.size[i, 0] + 2 * rank * (rows + inputs) for rank in RANKS]
    loss, size = np.concatenate([table.loss, extra], 1), np.concatenate([table.size, more], 1)
    names: list[Any] = [*OPTIONS, *RANKS]
    for bits, plain, than in bench.maps():
        budget = prepared.inventory.expert_bytes(plain)
        solved = exact(loss, size, budget)
        parts: dict[tuple[int, ProjectionGroup], list[Tensor]] = {}
        for u, c in zip(table.units, solved.choice, strict=True):
            assert u.group is not None
            parts.setdefault((u.layer, u.group), []).append(filled[u.layer, u.group, names[c]][u.expert])
        weights: Weights = {k: {g: torch.stack(parts[k, g]) for g in GROUPS} for k in bench.full}
        without = float(_at(table.loss, _choice(table, plain)).sum())
        facts = {"with_residual": int((solved.choice >= len(OPTIONS)).sum()), "units": len(table.units),
                 "predicted": _short(solved.loss), "predicted_without": _short(without)}  # fmt: skip
        bench.row("residual", f"knapsack {bits} with residuals", bench.model(weights), solved.size, than, **facts)
    saved, spent = (loss[:, :1] - loss).sum(0), (size - size[:, :1]).sum(0)
    bench.rows[-1]["loss_saved_per_megabyte_over_2_bits"] = {
        str(name): _short(1e6 * saved[i] / spent[i]) for i, name in enumerate(names) if i
    }


@torch.no_grad()
def prune(bench: Bench, calibration: Calibration) -> None:
    """Experts left out at no bytes, as one more option of whole experts; the next expert of a token takes its place."""
    prepared, two = bench.prepared, uniform_map(bench.prepared.inventory, OPTIONS[:1])
    table = cost_table(bench.stats, COST, OPTIONS)
    pairs = list(product(range(len(OPTIONS)), repeat=2))
    experts = [(layer.index, e) for layer in prepared.spec.layers for e in range(len(layer.experts))]
    rows = {(u.layer, u.expert, u.group): i for i, u in enumerate(table.units)}
    loss, size = np.zeros((len(experts), len(pairs) + 1)), np.zeros((len(experts), len(pairs) + 1), dtype=np.int64)
    for i, (layer, expert) in enumerate(experts):
        up, down = rows[layer, expert, "gate_up"], rows[layer, expert, "down"]
        for j, (a, b) in enumerate(pairs):
            loss[i, j], size[i, j] = table.loss[up, a] + table.loss[down, b], table.size[up, a] + table.size[down, b]
    model = bench.model(bench.weights(two))
    points = [("uniform 2", two, bench.row("prune", "uniform 2", model, prepared.inventory.expert_bytes(two)))]
    points += [(f"knapsack {bits}", made, than) for bits, made, than in bench.maps()]
    for how, next_one in (("the next in their place", True), ("the others rescaled", False)):
        without = {layer.index: _without(bench, layer.index, next_one) for layer in prepared.spec.layers}
        loss[:, -1] = [without[layer][expert] for layer, expert in experts]
        for name, made, than in points:
            solved = exact(loss, size, prepared.inventory.expert_bytes(made))
            weights: Weights = {k: {} for k in bench.full}
            for g, k in product(GROUPS, bench.full):
                chosen = [pairs[min(c, len(pairs) - 1)][GROUPS.index(g)]
                          for (layer, _), c in zip(experts, solved.choice, strict=True) if layer == k]  # fmt: skip
                weights[k][g] = torch.stack([bench.at[k, g, OPTIONS[o]][e] for e, o in enumerate(chosen)])
            model = bench.model(weights)
            left_out = [experts[i] for i in np.flatnonzero(solved.choice == len(pairs))]
            for spec in prepared.spec.layers:
                gone = torch.zeros(len(spec.experts), dtype=torch.bool)
                gone[[e for k, e in left_out if k == spec.index]] = True
                if next_one:
                    router: Any = model.get_submodule(spec.router)
                    router.forward = partial(_masked, router, gone)
                else:
                    experts_module(model, spec).register_forward_pre_hook(partial(_rescaled, gone))
            unseen = sum(without[k][e] == 0 for k, e in left_out)
            facts = {"left_out": len(left_out), "of_them_unseen": int(unseen), "predicted": _short(solved.loss)}
            bench.row("prune", f"{name} with experts left out, {how}", model, solved.size, than, **facts)


def _masked(router: Any, gone: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """OLMoE's router with the logits of some experts (experts,) at minus infinity, so that the next ones are chosen."""
    logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
    scores, index = logits.masked_fill(gone, -torch.inf).softmax(-1, dtype=torch.float32).topk(router.top_k, -1)
    if router.norm_topk_prob:
        scores = scores / scores.sum(-1, keepdim=True)
    return logits, scores.to(logits.dtype), index


def _rescaled(gone: Tensor, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs of an experts module with the weights of some experts at zero, and the others' sum what it was."""
    hidden, index, weights = given
    kept = weights.masked_fill(gone[index], 0)
    total = kept.sum(-1, keepdim=True)
    return hidden, index, torch.where(total > 0, kept * weights.sum(-1, keepdim=True) / total.clamp_min(1e-9), 0)


def _without(bench: Bench, index: int, next_one: bool) -> Any:
    """fisher_error (experts,) of leaving each one out: the token's next expert comes in, or the others are rescaled."""
    layer, seen = bench.prepared.spec.layer(index), bench.prepared.routed[index]
    router: Any = bench.prepared.model.get_submodule(layer.router)
    module = experts_module(bench.prepared.model, layer)
    assert seen.gradient is not None
    count = len(layer.experts)
    score = nn.functional.linear(seen.hidden.float(), router.weight).softmax(-1)
    top, best = score.topk(layer.top_k + 1, -1)
    put = torch.zeros(len(score), layer.top_k + 1, seen.hidden.shape[1])
    for expert in range(count):
        up, down = bench.full[index]["gate_up"][expert], bench.full[index]["down"][expert]
        at, slot = (best == expert).nonzero(as_tuple=True)
        put[at, slot] = activate(module, seen.hidden[at].float() @ up.T, expert) @ down.T
    before = _mixed(top[:, :-1], put[:, :-1])
    made = np.zeros(count)
    for slot in range(layer.top_k):
        kept = [s for s in range(layer.top_k + next_one) if s != slot]
        change = (_mixed(top[:, kept], put[:, kept]) - before) * seen.gradient
        np.add.at(made, best[:, slot].numpy(), change.square().sum(-1, dtype=torch.float64).numpy())
    return made / len(score)


def _mixed(weights: Tensor, outputs: Tensor) -> Tensor:
    """Outputs (tokens, k, H) by their weights (tokens, k), scaled to sum to one."""
    return ((weights / weights.sum(-1, keepdim=True))[..., None] * outputs).sum(1)


EVERY_SEED = ("balance",)
STUDY: dict[str, Callable[[Bench, Calibration], None]] = {
    "prune": prune,
    "interactions": interactions,
    "residual": residual,
    "progressive": progressive,
    "balance": balance,
}


def _short(value: float) -> float:
    return float(f"{value:.6g}")


if __name__ == "__main__":
    main()
