"""Which tokens to measure costs on: costs of the same form that differ in one thing at a time.

GPTQ does better on the tokens that it fits its codes to than on others, and calibration text gives both. Measured are
the change of the layer's output on the fitted tokens, which is mopeq's; on each as if the codes had been fitted without
it (``unfitted.py``); on other sequences of the same text; the change that plain rounding makes on the fitted tokens,
alone and times what the second of the layer, group and option is to it; and GEMQ's, which is plain rounding's with the
data's next tokens in the place of drawn labels. Every cost deals out the bits of whole experts and, but for GEMQ's, of
gate and up apart from down; all maps are judged with the same GPTQ codes. Rows are stored one by one; the same command
goes on where it was stopped.

``experts`` sums the costs up by the number of tokens that an expert saw: what is fitted is low where tokens are few.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from common import START, settings_of, store, study_arguments
from fidelity import short, windows_of
from frontier import COST, KEPT, LEVELS, Study, studied
from mopeq.allocate import allocate
from mopeq.analyze import Routed, expert_tokens, layer_costs, moments
from mopeq.analyze.forward import experts_module
from mopeq.analyze.moments import enough_tokens, expert_inputs
from mopeq.analyze.observe import expert_rows
from mopeq.evaluate.divergence import judging
from mopeq.load import load_source
from mopeq.measure import Calibration, Prepared, observed, open_model
from mopeq.precision import GROUPS, Precision
from mopeq.qtensor import Codes, dequantize
from mopeq.quantizers import fallback_moments, rtn
from mopeq.quantizers.gptq import factored
from mopeq.seam import activate
from mopeq.source import read_group
from mopeq.spec import MoELayer
from mopeq.stats import Stats, cost_metric
from unfitted import unfitted

OPTIONS = [Precision(bits, 128) for bits in LEVELS]
OTHER = 100
"""Added to a seed: the sequences on which the codes of that seed are measured again."""
WAYS = {
    "fitted tokens": (COST, "group", "expert"),
    "each left out": ("left_out", "group", "expert"),
    "other tokens": ("other_tokens", "group", "expert"),
    "plain rounding": ("rounding", "group", "expert"),
    "plain rounding, scaled": ("scaled_rounding", "group", "expert"),
    "GEMQ": ("gemq", "expert"),
}
"""Costs, and whether they are of gate and up apart from down."""
FIRST = ("fitted tokens", "each left out")
"""Those that are judged below ``FROM`` bits, too."""
FROM = 3.0
EDGES = (0, 1, 64, 256, 1024)
"""Least numbers of tokens of the experts whose costs are summed up."""


def main() -> None:
    parser = study_arguments(__doc__ or "", "fitted_costs")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.25, 2.5, 3.0, 3.5, 4.0], help="sizes of the maps")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    opened = open_model(asked.model)
    settings = settings_of(asked)
    results: dict[str, Any] = {**settings, "runs": []}
    if asked.out.exists():
        stored = json.loads(asked.out.read_text(encoding="utf-8"))["results"]
        results["runs"] = stored["runs"] if {key: stored[key] for key in settings} == settings else []
    runs = results["runs"]
    for seed in asked.seeds:
        run = next((run for run in runs if run["seed"] == seed), None)
        if run is None:
            run = {"seed": seed, "rows": []}
            runs.append(run)
        known = {(row["bits"], row["cost"], row["granularity"]) for row in run["rows"]}
        left = [job for job in _jobs(asked.bits) if job not in known]
        if not left:
            continue
        wanted = {way for _, way, _ in left}
        study = studied(asked, opened, seed, "GEMQ" in wanted, load_source(opened.source, torch.float32))
        prepared = study.prepared
        stats = measured(study, wanted, Calibration(asked.data, asked.samples, asked.length, 8, seed + OTHER))
        before = run.get("experts", [{}] * len(EDGES))
        run["experts"] = [{**old, **new} for old, new in zip(before, by_tokens(stats, prepared), strict=True)]
        with (
            tempfile.TemporaryDirectory() as folder,
            judging(prepared.model, windows_of(asked, prepared), cache=folder, batch_size=8) as judge,
        ):
            for bits, way, granularity in left:
                made = allocate(
                    stats, budget=f"{bits}bpw", cost=WAYS[way][0], options=OPTIONS, granularity=granularity, rest=KEPT
                )
                found = judge(study.take(made), way).divergence
                run["rows"].append({
                    "bits": bits, "cost": way, "granularity": granularity, "kl": short(found.kl.value),
                    "bytes": opened.inventory.total_bytes(made), "commit": START["commit"],
                    "window_kl": [short(v / n) for v, n in zip(found.window_kl, found.window_tokens, strict=True)],
                })  # fmt: skip
                print(time.strftime("%H:%M:%S"), seed, bits, way, granularity, short(found.kl.value), flush=True)
                store(asked.out, results)


def _jobs(sizes: Sequence[float]) -> list[tuple[float, str, str]]:
    """Bits, costs and granularities of the maps, those of most bits first."""
    return [
        (bits, way, granularity)
        for bits in sorted(sizes, reverse=True)
        for way, (_, *granularities) in WAYS.items()
        for granularity in granularities
        if bits >= FROM or way in FIRST
    ]


def measured(study: Study, wanted: Collection[str], calibration: Calibration) -> Stats:
    """What a study measured, with the costs of the ways that are wanted, and of tokens left out."""
    prepared = study.prepared
    found = left_out(study)
    if "other tokens" in wanted:
        other = observed(prepared, replace(calibration, cost_share=1.0), dtype=torch.float32)
        found |= again("other_tokens", study, other.routed)
    if {"plain rounding", "plain rounding, scaled"} & set(wanted):
        found |= again("rounding", study, prepared.routed, plain=True)
        found |= scaled(study.stats.with_metrics(found))
    return study.stats.with_metrics(found)


def again(
    name: str, study: Study, seen: Mapping[int, Routed], plain: bool = False
) -> dict[str, dict[int, list[float]]]:
    """Fisher costs on the tokens ``seen`` of a study's codes, or of plain rounding, by a name."""
    made: dict[str, dict[int, list[float]]] = {}
    for layer in study.prepared.spec.layers:
        module = experts_module(study.prepared.model, layer)
        weights = {group: read_group(study.prepared.source, layer, group) for group in GROUPS}

        def known(
            weight: Tensor, precision: Precision, moments: Any = None, layer: MoELayer = layer, weights: Any = weights
        ) -> Codes:
            group = next(group for group in GROUPS if weights[group].shape == weight.shape)
            found = [study.codes[layer.index, e, group, precision] for e in range(len(weight))]
            zeros = [c.zeros for c in found if c.zeros is not None]
            codes, scales = (torch.stack([getattr(c, part) for c in found]) for part in ("codes", "scales"))
            return Codes(codes, scales, torch.stack(zeros) if zeros else None, precision)

        found = layer_costs(
            seen[layer.index], module, weights, None, OPTIONS, rtn if plain else known, costs=[COST],
            memory=1 << 40, keep=lambda *unit: None,
        )  # fmt: skip
        for group in GROUPS:
            for p in OPTIONS:
                made.setdefault(cost_metric(name, group, p), {})[layer.index] = found[cost_metric(COST, group, p)]
    return made


@torch.no_grad()
def left_out(study: Study) -> dict[str, dict[int, list[float]]]:
    """Fisher costs of a study's codes on each token as if they had been fitted without it."""
    made: dict[str, dict[int, list[float]]] = {}
    for layer in study.prepared.spec.layers:
        k, module = layer.index, experts_module(study.prepared.model, layer)
        seen = study.prepared.routed[k]
        assert seen.gradient is not None
        weights = {group: read_group(study.prepared.source, layer, group) for group in GROUPS}
        summed = moments(seen, module, weights["gate_up"])
        full = {group: getattr(summed, group) for group in GROUPS}
        full = {g: fallback_moments(h, summed.tokens, enough_tokens(h.shape[-1], None))[0] for g, h in full.items()}
        factors = {group: factored(h) for group, h in full.items()}
        scale = {group: h.diagonal(dim1=-2, dim2=-1).mean(-1) for group, h in full.items()}
        for e, rows in enumerate(expert_rows(seen, len(layer.experts))):
            up, down = weights["gate_up"][e], weights["down"][e]
            found = {(group, p): 0.0 for group in GROUPS for p in OPTIONS}
            for r, x, c in expert_inputs(seen, *rows, up.device):
                z, g = x @ up.T, seen.gradient[r].float()
                h = activate(module, z, e)
                given = {group: unfitted(factors[group], e, scale[group][e], inputs, c[:, 0].square())
                         for group, inputs in zip(GROUPS, (x, h), strict=True)}  # fmt: skip
                for group, p in found:
                    change = given[group] @ (dequantize(study.codes[k, e, group, p]) - weights[group][e]).T
                    if group == "gate_up":
                        change = (activate(module, z + change, e) - h) @ down.T
                    found[group, p] += float((change * c * g).square().sum(dtype=torch.float64))
            for (group, p), value in found.items():
                to = made.setdefault(cost_metric("left_out", group, p), {}).setdefault(k, [])
                to.append(value / len(seen.hidden))
    return made


def scaled(stats: Stats) -> dict[str, dict[int, list[float]]]:
    """Costs of plain rounding times what those of tokens left out sum up to over theirs, by layer, group and option."""
    made: dict[str, dict[int, list[float]]] = {}
    for group in GROUPS:
        for p in OPTIONS:
            ours = stats.metric(cost_metric("left_out", group, p))
            for k, row in stats.metric(cost_metric("rounding", group, p)).items():
                ratio = sum(ours[k]) / sum(row)
                made.setdefault(cost_metric("scaled_rounding", group, p), {})[k] = [ratio * value for value in row]
    return made


def by_tokens(stats: Stats, prepared: Prepared) -> list[dict[str, Any]]:
    """Sums of each cost at 2 and at 4 bits over the experts with so many tokens."""
    tokens = {k: expert_tokens(seen, stats.model.experts[k]) for k, seen in prepared.routed.items()}
    rows = []
    for low, high in zip(EDGES, (*EDGES[1:], float("inf")), strict=True):
        chosen = [(k, e) for k, row in tokens.items() for e, n in enumerate(row) if low <= n < high]
        row: dict[str, Any] = {
            "least": low,
            "experts": len(chosen),
            "tokens": sum(int(tokens[k][e]) for k, e in chosen),
        }
        for way, (cost, *_) in WAYS.items():
            if cost_metric(cost, "gate_up", OPTIONS[0]) in stats.metrics:
                row[way] = {str(p.bits): _summed(stats, cost, p, chosen) for p in (OPTIONS[0], OPTIONS[2])}
        rows.append(row)
    return rows


def _summed(stats: Stats, cost: str, precision: Precision, experts: Sequence[tuple[int, int]]) -> float:
    columns = [stats.metric(cost_metric(cost, group, precision)) for group in GROUPS]
    return short(sum(float(column[k][e]) for column in columns for k, e in experts))


if __name__ == "__main__":
    main()
