"""What a map of precisions is worth: size, memory, KL, perplexity and agreement of really packed checkpoints.

For every calibration seed the model is run and measured once; then every map is quantized with the same quantizer and
the same calibration, packed, loaded back, compared with the original on held-out text, and removed.

Studies: ``maps`` (uniform, MoPEQ's k-means, knapsack, controls), ``groups`` (group sizes at equal bits per weight),
``levels`` (which bits to choose from, in groups of 128), ``quantizers`` (all of them, at uniform bits),
``grids`` (what grids GPTQ may choose), ``damping`` (of GPTQ). All but ``maps`` use the first seed only.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import store, study_arguments
from mopeq.allocate import allocate, inverted_map, predicted, random_map, ranked_map
from mopeq.allocate.baselines import uniform_map
from mopeq.analyze import hessian_trace
from mopeq.data.text import Window, read_texts, text_windows
from mopeq.errors import BudgetError
from mopeq.evaluate import evaluate_many, resident_bytes
from mopeq.load import load
from mopeq.measure import Calibration, Prepared, measure_prepared, observed, open_model
from mopeq.precision import GROUPS, Precision, PrecisionMap
from mopeq.quantize import pack_model
from mopeq.quantizers import QUANTIZERS, gptq
from mopeq.quantizers.gptq import FACTORS
from mopeq.quantizers.grid import FACTORS as WIDE
from mopeq.stats import Stats, cost_metric

STUDIES = ("maps", "groups", "levels", "quantizers", "grids", "damping")
DAMPING = (0.01, 0.05, 0.1, 0.2, 0.5)
LEVELS = ((2, 3, 4), (2, 4), (2, 3, 4, 8), (2, 3, 4, 5, 6), (2, 3, 4, 5, 6, 8))
COST = "fisher_error"
COSTS = ("fisher_error", "output_error")
SCORES = ("frequency", "inverse_norm", "hessian_trace")
BITS = (2, 3, 4)
GRIDS = {"gptq": FACTORS, "gptq-minmax": (), "gptq-wide": WIDE}
"""Multiples of the min-max scale that ``grids`` lets GPTQ choose from, and the names it registers them under."""
DRAWS = 2
"""Random maps of one histogram for every calibration seed."""
HEADER = 2048
"""Bytes by which the headers of two checkpoints of equal tensors may differ."""


@dataclass(frozen=True)
class Job:
    """One map to pack and judge. ``like``: the map whose bytes it may not exceed."""

    name: str
    precisions: PrecisionMap
    method: str = "gptq"
    like: str | None = None


def main() -> None:
    asked = _parser().parse_args()
    torch.set_num_threads(asked.threads)
    opened = open_model(asked.model)
    results: dict[str, Any] = {
        "model": asked.label or Path(asked.model).name,
        "expert_parameters": opened.inventory.expert_parameters,
        "parameters": opened.inventory.parameters,
        "original_bytes": sum(path.stat().st_size for path in opened.source.path.glob("*.safetensors")),
        "calibration": {"samples": asked.samples, "length": asked.length, "seeds": asked.seeds},
        "held_out": {"files": [Path(p).name for p in asked.text], "windows": asked.windows, "length": asked.length},
        "group_size": asked.group_size,
        "quantizer": "gptq",
        "runs": [],
    }
    hessian: dict[str, Mapping[int, Sequence[float]]] = {}
    for number, seed in enumerate(asked.seeds):
        started = time.perf_counter()
        calibration = Calibration(asked.data, asked.samples, asked.length, 8, seed, cost_share=1.0)
        prepared = observed(opened, calibration, dtype=torch.float32)
        studies = asked.studies if number == 0 else [s for s in asked.studies if s == "maps"]
        stats, seconds = _measured(prepared, studies, seed, asked.group_size)
        if "maps" in studies and asked.probes:
            if not hessian:
                begun = time.perf_counter()
                hessian = _hessian(prepared, asked.hessian_samples, asked.probes, seed)
                results["hessian_trace"] = {
                    "sequences": asked.hessian_samples, "probes": asked.probes, "seed": seed,
                    "seconds": round(time.perf_counter() - begun, 1), "relative_stderr": noise(hessian),
                }  # fmt: skip
            stats = stats.with_metrics(hessian)
        windows = windows_of(asked, prepared)
        jobs = [job for study in studies for job in STUDY[study](stats, seed, asked.group_size)]
        rows = _judged(prepared, stats, jobs, windows)
        results["runs"].append({
            "seed": seed, "measure_seconds": seconds, "seconds": round(time.perf_counter() - started, 1),
            "tokens": stats.info["tokens"], "starved": stats.info["starved"], "rows": rows,
        })  # fmt: skip
        results["load_distribution"] = _load(stats)
        store(asked.out, results)
        del prepared
        gc.collect()


def _parser() -> argparse.ArgumentParser:
    parser = study_arguments(__doc__ or "", "fidelity")
    parser.add_argument("--group-size", type=int, default=64, help="of the study maps")
    parser.add_argument("--probes", type=int, default=4, help="of hessian_trace; 0 leaves it out")
    parser.add_argument("--hessian-samples", type=int, default=16, help="sequences for hessian_trace, first seed only")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    return parser


def _measured(prepared: Prepared, studies: Sequence[str], seed: int, size: int) -> tuple[Stats, dict[str, float]]:
    """Statistics with costs at every option that the studies need."""
    sizes = {size}
    sizes |= {128} if "maps" in studies else set()
    sizes |= {32, 64, 128} if "groups" in studies else set()
    sizes |= {128} if "levels" in studies or "grids" in studies else set()
    options = {Precision(bits, s) for bits in BITS for s in sizes}
    if "levels" in studies:
        options |= {Precision(bits, 128) for offered in LEVELS for bits in offered}
    stats = measure_prepared(prepared, ("frequency", "inverse_norm", *COSTS), options=sorted(options), seed=seed)
    return stats, dict(stats.info["seconds"])


def _hessian(prepared: Prepared, samples: int, probes: int, seed: int) -> dict[str, Mapping[int, Sequence[float]]]:
    """``hessian_trace`` on the first sequences of the calibration, two at a time."""
    ids = torch.cat([batch["input_ids"] for batch in prepared.batches])[:samples]
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.split(ids, 2)]
    mean, error = hessian_trace(prepared.model, prepared.spec, batches, probes=probes, seed=seed)
    return {"hessian_trace": mean, "hessian_trace.stderr": error}


def noise(hessian: Mapping[str, Mapping[int, Sequence[float]]]) -> float:
    """Median over experts of standard error by magnitude."""
    pairs = [
        (error, abs(value))
        for layer, row in hessian["hessian_trace"].items()
        for value, error in zip(row, hessian["hessian_trace.stderr"][layer], strict=True)
    ]
    return round(sorted(error / max(value, 1e-12) for error, value in pairs)[len(pairs) // 2], 3)


def windows_of(asked: argparse.Namespace, prepared: Prepared) -> list[Window]:
    """The same number of windows of every file."""
    each, left = divmod(asked.windows, len(asked.text))
    made: list[Window] = []
    for i, path in enumerate(asked.text):
        texts = read_texts(path)
        made += text_windows(texts, prepared.tokenizer, asked.length, limit=each + (i < left))
    return made


def _options(size: int) -> list[Precision]:
    return [Precision(bits, size) for bits in BITS]


def _loss(stats: Stats, size: int) -> dict[int, list[float]]:
    """Predicted loss of each expert at 2 bits."""
    names = [cost_metric(COST, group, Precision(2, size)) for group in GROUPS]
    return {
        layer: [sum(v) for v in zip(*(stats.metrics[n][layer] for n in names), strict=True)]
        for layer in stats.model.experts
    }


def paper_maps(stats: Stats, seed: int, size: int, budgets: tuple[float, float] = (2.5, 3.0)) -> Iterator[Job]:
    """The main study: uniform, k-means, knapsack at given bits and at the bytes of the others, and controls.

    budgets: bits a weight; controls are of the first. Rows that have no groups of 128 leave maps of such groups out.
    """
    options, model = _options(size), stats.model
    made = {f"uniform {p.bits}": uniform_map(model, [p]) for p in options}
    for score in SCORES:
        for scope in ("layer", "model") if score in stats.metrics else ():
            name = f"k-means {score} {scope}"
            made[name] = allocate(stats, method="kmeans", score=score, scope=scope, options=options)
    for name, precisions in made.items():
        yield Job(name, precisions)
    for name in list(made):
        if name not in ("uniform 2", "uniform 4"):
            same = allocate(stats, budget=f"{model.total_bytes(made[name])}B", cost=COST, options=options)
            yield Job(f"knapsack = {name}", same, like=name)
    for bits in budgets:
        for cost, granularity in ((COST, "group"), (COST, "expert"), ("output_error", "group")):
            try:
                found = allocate(stats, budget=f"{bits}bpw", cost=cost, granularity=granularity, options=options)
            except BudgetError:
                continue
            name = f"knapsack {bits}"
            name += {"group": "", "expert": " whole experts"}[granularity] + ("" if cost == COST else f" {cost}")
            made[name] = found
            yield Job(name, found)
    if all(inp % 128 == 0 for layer in model.layers.values() for inp in (layer.hidden_size, layer.intermediate_size)):
        fine = [Precision(bits, 128) for bits in BITS]
        for p in fine[:2] if size != 128 else ():
            yield Job(f"uniform {p}", uniform_map(model, [p]))
        yield Job("knapsack 2.25 g128", allocate(stats, budget="2.25bpw", cost=COST, options=fine))
    yield from _controls(stats, made, seed, size, budgets[0])


def _controls(stats: Stats, made: Mapping[str, PrecisionMap], seed: int, size: int, budget: float) -> Iterator[Job]:
    """Maps with the histogram of another one, hence its bytes, and less or opposite knowledge."""
    model, best = stats.model, f"knapsack {budget}"
    for name in (best, "k-means inverse_norm layer", "k-means frequency layer"):
        for draw in range(DRAWS if name in made else 0):
            number = DRAWS * seed + draw
            yield Job(f"random {number} = {name}", random_map(model, made[name], number), like=name)
    if best in made:
        name, like = best, made[best]
        yield Job(f"inverted = {name}", inverted_map(model, _loss(stats, size), like), like=name)
        yield Job(f"by frequency = {name}", ranked_map(model, stats.metric("frequency"), like), like=name)
        yield Job(f"by inverse_norm = {name}", ranked_map(model, stats.metric("inverse_norm"), like), like=name)
    name = "k-means inverse_norm layer"
    yield Job(f"inverted = {name}", inverted_map(model, stats.metric("inverse_norm"), made[name]), like=name)


def _groups(stats: Stats, seed: int, size: int) -> Iterator[Job]:
    """Group sizes at equal bits per weight, alone and offered together."""
    sizes: dict[str, list[int]] = {"g32": [32], "g64": [64], "g128": [128], "g64 and g128": [64, 128],
                                   "g32, g64 and g128": [32, 64, 128]}  # fmt: skip
    for bits in (2.25, 2.5, 2.75, 3.0, 3.5):
        for name, offered in sizes.items():
            options = [p for one in offered for p in _options(one)]
            try:
                yield Job(f"{name} at {bits}", allocate(stats, budget=f"{bits}bpw", cost=COST, options=options))
            except BudgetError:
                continue


def _levels(stats: Stats, seed: int, size: int) -> Iterator[Job]:
    """Which bits the knapsack may choose from."""
    for bits in (2.25, 2.5, 3.0, 3.5, 4.0):
        for offered in LEVELS:
            options = [Precision(b, 128) for b in offered]
            made = allocate(stats, budget=f"{bits}bpw", cost=COST, options=options)
            yield Job(f"{', '.join(map(str, offered))} at {bits}", made)


def _quantizers(stats: Stats, seed: int, size: int) -> Iterator[Job]:
    """Quantizers at uniform bits."""
    for p in _options(size):
        for method in ("rtn", "rtn-mse", "hqq", "signround", "gptq"):
            yield Job(f"{method} {p.bits}", uniform_map(stats.model, [p]), method)


def _grids(stats: Stats, seed: int, size: int) -> Iterator[Job]:
    """GPTQ on its grids, on min-max grids and on those of clipped rounding, at uniform bits and two group sizes."""
    for p in [*_options(64), *_options(128)]:
        for method, factors in GRIDS.items():
            QUANTIZERS[method] = partial(gptq, factors=factors)
            yield Job(f"{method} {p}", uniform_map(stats.model, [p]), method)


def _damping(stats: Stats, seed: int, size: int) -> Iterator[Job]:
    """GPTQ with more damping, at uniform bits."""
    for p in _options(size):
        for damping in DAMPING:
            method = f"damping {damping:g}"
            QUANTIZERS[method] = partial(gptq, damping=damping)
            yield Job(f"{method} {p.bits}", uniform_map(stats.model, [p]), method)


STUDY = {
    "maps": paper_maps,
    "groups": _groups,
    "levels": _levels,
    "quantizers": _quantizers,
    "grids": _grids,
    "damping": _damping,
}


def _judged(prepared: Prepared, stats: Stats, jobs: Sequence[Job], windows: Sequence[Window]) -> list[dict[str, Any]]:
    """Pack, load, compare and remove every map."""
    facts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        loaders = {
            job.name: partial(packed, prepared, stats, job, folder / str(i), facts) for i, job in enumerate(jobs)
        }
        if len(loaders) != len(jobs):
            raise RuntimeError("two maps have one name")
        seen = evaluate_many(prepared.model, loaders, windows, cache=folder, batch_size=8, track=_said)
    for name, found in seen.items():
        kl, agreement, nats = found.divergence.kl, found.divergence.agreement, found.candidate
        facts[name] |= {
            "kl": short(kl.value), "kl_low": short(kl.low), "kl_high": short(kl.high),
            "top1": short(agreement.value), "perplexity": short(nats.perplexity.value),
            "perplexity_original": short(found.reference.perplexity.value), "tokens": found.divergence.tokens,
            "windows": found.divergence.windows,
            "window_kl": [short(v / n) for v, n in zip(found.divergence.window_kl, found.divergence.window_tokens,
                                                        strict=True)],
        }  # fmt: skip
    return list(facts.values())


def packed(prepared: Prepared, stats: Stats, job: Job, at: Path, facts: dict[str, dict[str, Any]]) -> Any:
    """One map packed at ``at`` and loaded back; what is known of it is added to ``facts``."""
    done = pack_model(prepared, job.precisions, at, method=job.method)
    model = load(at, dtype=torch.float32)
    limit = facts[job.like]["bytes"] if job.like is not None else done.bytes
    if done.bytes > limit + HEADER:  # headers of equal maps differ by the digits of their offsets
        raise RuntimeError(f"{job.name} takes {done.bytes} bytes, {job.like} {limit}")
    facts[job.name] = {
        "name": job.name, "method": job.method, "like": job.like, "bytes": done.bytes,
        "expert_bits": round(prepared.inventory.expert_bits(job.precisions), 4),
        "resident_bytes": resident_bytes(load(at)),
        "units": {str(p): n for p, n in job.precisions.histogram().items()},
        "predicted": {cost: _predicted(stats, cost, job.precisions) for cost in COSTS},
    }  # fmt: skip
    return model


def _said(items: Any, description: str, total: int | None = None) -> Any:
    print(time.strftime("%H:%M:%S"), description, flush=True)
    return items


def _predicted(stats: Stats, cost: str, precisions: PrecisionMap) -> float | None:
    return short(predicted(stats, cost, precisions))


def _load(stats: Stats) -> dict[str, Any]:
    """How unevenly tokens fall on experts: by layer, share of the busiest and of the busiest quarter."""
    rows = {layer: sorted(row, reverse=True) for layer, row in stats.metric("frequency").items()}
    return {
        "largest_share": {str(k): round(r[0] / sum(r), 3) for k, r in rows.items()},
        "busiest_quarter": {str(k): round(sum(r[: len(r) // 4]) / sum(r), 3) for k, r in rows.items()},
    }


def short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


if __name__ == "__main__":
    main()
