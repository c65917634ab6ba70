"""The frontier of size and quality: the knapsack beside every control and every peer, at equal bytes, window by window.

For every calibration seed the model is observed once and every unit quantized once at every precision. Each map is
judged with those codes, dequantized, in the experts of the original, all else as it was; one map is
also packed, loaded and judged, to show that this is the same. Controls have the bytes of the knapsack's map and the
same codes. Peers run, for the last seed, in environments of their own on the same calibration tokens
(``peers_quality.py``), and their matrices, dequantized, take the same places.

Rows are stored one by one; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import controls
import peers_quality
from cloze import cloze_task
from common import START, store, study_arguments
from fidelity import short
from mopeq.allocate import allocate, inverted_map, predicted, random_map, ranked_map, uniform_map
from mopeq.analyze import analyze, layer_metrics, moments
from mopeq.analyze.forward import experts_module
from mopeq.data.text import Window, read_texts, text_windows
from mopeq.evaluate import Comparison, run_tasks
from mopeq.evaluate.divergence import judging
from mopeq.load import load, load_source
from mopeq.measure import Calibration, Prepared, calibrated, observed, open_model
from mopeq.pack import pack_model
from mopeq.precision import FULL, GROUPS, MATRICES, Precision, PrecisionMap
from mopeq.qtensor import Codes, dequantize, on_cpu
from mopeq.quantizers import DATA_FREE, QUANTIZERS, fallback_moments
from mopeq.source import read_group
from mopeq.stats import Stats, cost_metric

COST = "fisher_error"
KEPT = {"attention": FULL, "lm_head": FULL}
"""All else is as it was, so that only what happens to the experts is compared."""
LEVELS = (2, 3, 4, 5, 6)
FULL_CONTROLS = (2.5, 3.0)
BITS = (2.5, 3.0, 2.25, 3.5, 4.0)
"""Bits per expert weight, everything counted; the first two with every control, the others with the strongest."""
QUANTIZED = {"rtn": (2, 3, 4), "rtn-mse": (2, 3), "hqq": (2, 3), "signround": (2,)}
"""Other quantizers of mopeq's and the uniform bits at which they stand beside GPTQ, for the last seed."""
LAST_CONTROL = "ours, whole experts"
"""The control that is judged last."""
DRAWS = 2
"""Random maps of one histogram for every seed."""
SAMENESS = 0.005
"""Relative difference of the KL that packing and loading may make: other kernels, other sums."""
TASKS = ("original", "uniform 2", "uniform 3", "ours 2.25", "ours 2.5", "ours 3.0")
"""What is asked questions."""

Judge = Callable[[nn.Module, str], Comparison]


@dataclass(frozen=True)
class Job:
    """One map to judge; ``like`` is the map whose bytes it may not exceed."""

    name: str
    kind: str
    precisions: PrecisionMap
    like: str | None = None


@dataclass
class Study:
    """One seed: what was measured, the codes of every unit, and a copy of the model to put them in."""

    seed: int
    prepared: Prepared
    stats: Stats
    codes: Mapping[tuple[int, int, str, Precision], Codes]
    model: nn.Module
    seconds: Mapping[str, float]
    filled: dict[tuple[int, int, str], Precision] = field(default_factory=dict)

    def take(self, precisions: PrecisionMap) -> nn.Module:
        """The model with its experts at these precisions."""
        for layer in self.prepared.spec.layers:
            module = experts_module(self.model, layer)
            for group in GROUPS:
                for expert, p in enumerate(precisions.experts[group][layer.index]):
                    unit = layer.index, expert, group
                    if self.filled.get(unit) != p:
                        _place(module, group, expert, dequantize(self.codes[(*unit, p)]))
                        self.filled[unit] = p
        return self.model


def _take_matrices(model: nn.Module, opened: Prepared, found: Mapping[str, Tensor]) -> nn.Module:
    """The model with these matrices, by their names in the checkpoint, as its experts."""
    for layer in opened.spec.layers:
        module = experts_module(model, layer)
        for number, expert in enumerate(layer.experts):
            for group in GROUPS:
                matrices = [found[f"{expert.names[matrix]}.weight"] for matrix in MATRICES[group]]
                _place(module, group, number, torch.cat(matrices).float())
    return model


def _place(module: nn.Module, group: str, expert: int, weight: Tensor) -> None:
    """Put the weight (rows, in) of a unit in an experts module that keeps matrices as (out, in), gate before up."""
    stacked: Tensor = getattr(module, f"{group}_proj").data
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        raise RuntimeError(f"{type(module).__name__} lays its experts out in another way than this benchmark knows")
    stacked[expert].copy_(weight)


def main() -> None:
    asked = _parser().parse_args()
    torch.set_num_threads(asked.threads)
    opened = open_model(asked.model)
    results = _resumed(asked, opened)
    with tempfile.TemporaryDirectory() as temporary:
        for seed in asked.seeds:
            run = next((r for r in results["runs"] if r["seed"] == seed), None)
            if run is None:
                run = {"seed": seed, "rows": []}
                results["runs"].append(run)
            proved = any("packed" in other for other in results["runs"])
            save = partial(store, asked.out, results)
            _run(asked, opened, run, Path(temporary), seed == asked.seeds[-1], proved, save)
            store(asked.out, results)


def _run(
    asked: argparse.Namespace,
    opened: Prepared,
    run: dict[str, Any],
    folder: Path,
    last: bool,
    proved: bool,
    save: Callable[[], None],
) -> None:
    """Every row of one seed that is not there yet; peers first, as they need nothing measured."""
    rows = {row["name"]: row for row in run["rows"]}
    ready = calibrated(opened, Calibration(asked.data, asked.samples, asked.length, 8, run["seed"]))
    windows, domains = _windows(asked, ready.tokenizer)
    full = [bits for bits in asked.bits if bits in FULL_CONTROLS]
    left = any(f"{LAST_CONTROL} = {bits}" not in rows for bits in full)
    methods = {f"mopeq {m} {bits}": (m, bits) for m in asked.methods for bits in QUANTIZED[m]} if last else {}
    with_data = {name for name, (method, _) in methods.items() if method not in DATA_FREE}
    questions = asked.questions if last else 0
    measured = left or any(f"frequency = {bits}" not in rows for bits in asked.bits) or not with_data <= set(rows)
    measured = measured or (questions and len(run.get("questions", ())) < len(TASKS))

    def add(name: str, row: Mapping[str, Any], found: Comparison) -> None:
        rows[name] = {"name": name, **row, **_facts(found, domains)}
        run["rows"] = list(rows.values())
        save()
        print(time.strftime("%H:%M:%S"), run["seed"], name, rows[name]["kl"], flush=True)

    original = load_source(opened.source, torch.float32)
    changed = copy.deepcopy(original)
    with judging(original, windows, cache=folder, batch_size=8) as judge:
        for name, work in peers_quality.runs(asked, ready, run["seed"]) if last else ():
            if name in rows or name in run.setdefault("failed", {}):
                continue
            if "error" in (told := work()):
                run["failed"][name] = told["error"]
                print(name, told["error"], flush=True)
                continue
            _take_matrices(changed, opened, peers_quality.read(told.pop("matrices")))
            add(name, {**told, "kind": "peer", "bytes": _size(opened, told["bits"])}, judge(changed, name))
        for name in [n for n in methods if n not in with_data and n not in rows]:
            add(name, *_by_method(opened, changed, judge, *methods[name]))
        if not measured:
            return
        study = _studied(asked, opened, run["seed"], left, changed)
        run["seconds"] = {**run.get("seconds", {}), **study.seconds}
        for job in (*_jobs(study, full, left), *_jobs(study, asked.bits, left)):
            if job.name not in rows:
                row = _described(study, job)
                if job.like is not None and row["bytes"] > rows[job.like]["bytes"]:
                    raise RuntimeError(f"{job.name} takes {row['bytes']} bytes, {job.like} {rows[job.like]['bytes']}")
                add(job.name, row, judge(study.take(job.precisions), job.name))
        if not proved and "ours 2.5" in rows:
            run["packed"] = _packed(study, rows["ours 2.5"], judge, folder)
        for name in [n for n in methods if n not in rows]:
            study.filled.clear()
            add(name, *_by_method(study.prepared, changed, judge, *methods[name]))
    if questions:
        _asked_questions(asked, study, run, folder, save)


def _uniform(study: Study, bits: int) -> Job:
    return Job(f"uniform {bits}", "uniform", uniform_map(study.stats.model, [Precision(bits, 128)], rest=KEPT))


def _by_method(
    opened: Prepared, changed: nn.Module, judge: Judge, method: str, bits: int
) -> tuple[dict[str, Any], Comparison]:
    """Row and comparison of the model with its experts as another quantizer leaves them at uniform bits."""
    precision, begun = Precision(bits, 128), time.process_time()
    for layer in opened.spec.layers:
        module = experts_module(changed, layer)
        weights = {group: read_group(opened.source, layer, group) for group in GROUPS}
        seen = None
        if method not in DATA_FREE:
            original = experts_module(opened.model, layer)
            seen = moments(opened.routed[layer.index], original, weights["gate_up"])
        for group in GROUPS:
            inputs = None
            if seen is not None:
                summed = getattr(seen, group)
                inputs = fallback_moments(summed, seen.tokens, summed.shape[-1] // 4)[0]
            for expert, weight in enumerate(dequantize(QUANTIZERS[method](weights[group], precision, inputs))):
                _place(module, group, expert, weight)
    seconds = round(time.process_time() - begun, 1)
    size = opened.inventory.total_bytes(uniform_map(opened.inventory, [precision], rest=KEPT))
    taken = round(precision.bits + (16 + precision.bits) / 128, 4)
    row = {"kind": "peer", "bits": taken, "bytes": size, "processor_seconds": seconds}
    return row, judge(changed, f"{method} {bits}")


def _size(opened: Prepared, bits: float) -> int:
    """Bytes of the checkpoint if every expert weight takes ``bits``, the rest as it was, headers included."""
    model = opened.inventory
    uniform = uniform_map(model, [Precision(2, 128)], rest=KEPT)
    return model.total_bytes(uniform) - model.expert_bytes(uniform) + math.ceil(bits * model.expert_parameters / 8)


def _studied(asked: argparse.Namespace, opened: Prepared, seed: int, compared: bool, changed: nn.Module) -> Study:
    """Observe, quantize every unit at every precision, and measure mopeq's costs and, if asked, those of controls."""
    begun = time.process_time()
    calibration = Calibration(asked.data, asked.samples, asked.length, 8, seed)
    prepared = observed(opened, calibration, dtype=torch.float32)
    seconds = {"observe": time.process_time() - begun}
    options = [Precision(bits, 128) for bits in LEVELS]
    codes: dict[tuple[int, int, str, Precision], Codes] = {}
    costs: dict[str, dict[int, Sequence[float]]] = {}
    stats = analyze(
        prepared.model, prepared.source, prepared.spec, prepared.batches, ["frequency", "inverse_norm"],
        routed=prepared.routed, seed=seed,
    )  # fmt: skip
    for layer in prepared.spec.layers:

        def keep(group: str, experts: Sequence[int], made: Codes, at: int = layer.index) -> None:
            kept = on_cpu(made)
            codes.update({(at, e, group, made.precision): kept[i] for i, e in enumerate(experts)})

        found, _ = layer_metrics(
            prepared.source, layer, prepared.routed[layer.index], experts_module(prepared.model, layer), [COST],
            options=options, keep=keep,
        )  # fmt: skip
        for name, row in found.items():
            costs.setdefault(name, {})[layer.index] = row
    stats = stats.with_metrics(costs)
    seconds["costs and codes"] = time.process_time() - begun
    if compared:
        begun = time.process_time()
        stats = stats.with_metrics({**controls.control_costs(prepared, options), **controls.alphaq(prepared, options)})
        seconds["costs of controls"] = time.process_time() - begun
    rounded = {name: round(value, 1) for name, value in seconds.items()}
    return Study(seed, prepared, stats, codes, changed, rounded)


def _jobs(study: Study, budgets: Sequence[float], compared: bool) -> Iterator[Job]:
    """Uniform models, the knapsack at each size, and what else has its bytes and the same codes."""
    stats, options = study.stats, [Precision(bits, 128) for bits in LEVELS]
    for p in options[:3]:
        yield _uniform(study, p.bits)
    for bits in budgets:
        name = f"ours {bits}"
        ours = allocate(stats, budget=f"{bits}bpw", cost=COST, options=options, rest=KEPT)
        yield Job(name, "ours", ours)
        for what, precisions in _controls(study, ours, options, compared and bits in FULL_CONTROLS):
            yield Job(f"{what} = {bits}", "control", precisions, name)


def _controls(
    study: Study, ours: PrecisionMap, options: Sequence[Precision], every: bool
) -> Iterator[tuple[str, PrecisionMap]]:
    """Maps of the bytes of ``ours``: its histogram dealt out by less, and what other costs and solvers make."""
    stats, model = study.stats, study.stats.model
    bytes_of = {"budget": f"{model.total_bytes(ours)}B", "options": options, "rest": KEPT}
    norm, used = stats.metric("inverse_norm"), stats.metric("frequency")
    yield "frequency", ranked_map(model, used, ours)
    if every:
        yield "GEMQ", allocate(stats, cost="gemq", granularity="expert", **bytes_of)
        yield "PMQ", controls.layerwise(stats, "pmq", model.expert_bytes(ours), options, KEPT)
        losses = (stats.metric(cost_metric(COST, group, options[0])) for group in GROUPS)
        loss = {layer: [a + b for a, b in zip(*rows, strict=True)] for layer, *rows in _rows(*losses)}
        for draw in range(DRAWS):
            number = DRAWS * study.seed + draw
            yield f"random {number}", random_map(model, ours, number)
        yield "inverted", inverted_map(model, loss, ours)
        yield "MoPEQ model-wide", ranked_map(model, norm, ours)
        yield "MoPEQ layer-wise", ranked_map(model, controls.layer_ranks(norm), ours)
        yield "MODE", controls.layerwise(stats, "mode", model.expert_bytes(ours), options, KEPT)
        yield "AlphaQ", allocate(stats, cost="alphaq", granularity="expert", **bytes_of)
        yield LAST_CONTROL, allocate(stats, cost=COST, granularity="expert", **bytes_of)


def _rows(first: Mapping[int, Any], second: Mapping[int, Any]) -> Iterator[tuple[Any, ...]]:
    return ((layer, first[layer], second[layer]) for layer in first)


def _described(study: Study, job: Job) -> dict[str, Any]:
    model = study.stats.model
    return {
        "kind": job.kind, "like": job.like, "bytes": model.total_bytes(job.precisions),
        "bits": round(model.expert_bits(job.precisions), 4),
        "units": {str(p): n for p, n in job.precisions.histogram().items()},
        "predicted": short(predicted(study.stats, COST, job.precisions)),
    }  # fmt: skip


def _facts(found: Comparison, domains: Mapping[str, slice]) -> dict[str, Any]:
    kl, agreement, own = found.divergence.kl, found.divergence.agreement, found.candidate
    tokens, nats = own.window_tokens, own.window_nats
    return {
        "kl": short(kl.value), "kl_low": short(kl.low), "kl_high": short(kl.high),
        "top1": short(agreement.value), "top1_low": short(agreement.low), "top1_high": short(agreement.high),
        "perplexity": short(own.perplexity.value), "perplexity_original": short(found.reference.perplexity.value),
        "by_domain": {name: short(math.exp(sum(nats[at]) / sum(tokens[at]))) for name, at in domains.items()},
        "window_kl": [short(v / n) for v, n in zip(found.divergence.window_kl, tokens, strict=True)],
        "window_agreed": [short(v / n) for v, n in zip(found.divergence.window_agreed, tokens, strict=True)],
    }  # fmt: skip


def _windows(asked: argparse.Namespace, tokenizer: Any) -> tuple[list[Window], dict[str, slice]]:
    """The same number of windows of every file, and which are whose."""
    made: list[Window] = []
    domains = {}
    for path in asked.text:
        found = text_windows(read_texts(path), tokenizer, asked.length, limit=asked.windows // len(asked.text))
        domains[Path(path).stem.removeprefix("eval_")] = slice(len(made), len(made) + len(found))
        made += found
    return made, domains


def _packed(study: Study, row: Mapping[str, Any], judge: Judge, folder: Path) -> dict[str, Any]:
    """The knapsack's map at 2.5 bits packed, loaded and judged: the same KL as from its dequantized codes."""
    options = [Precision(bits, 128) for bits in LEVELS]
    made = allocate(study.stats, budget="2.5bpw", cost=COST, options=options, rest=KEPT)
    done = pack_model(study.prepared, made, folder / "packed")
    kl = judge(load(folder / "packed", dtype=torch.float32), "packed").divergence.kl.value
    if abs(kl / row["kl"] - 1) > SAMENESS:
        raise RuntimeError(f"packed and loaded the map has KL {kl}, its codes {row['kl']}")
    return {"name": "ours 2.5", "kl": short(kl), "bytes": done.bytes, "bytes_said": row["bytes"]}


def _asked_questions(
    asked: argparse.Namespace,
    study: Study,
    run: dict[str, Any],
    folder: Path,
    save: Callable[[], None],
) -> None:
    """Share of questions of held-out text answered right, through lm-eval."""
    tasks = cloze_task(asked.text, study.prepared.tokenizer, asked.questions, folder / "cloze")
    done = run.setdefault("questions", {})
    maps = {job.name: job.precisions for job in _jobs(study, asked.bits, False) if job.name in TASKS}
    loaders: dict[str, Callable[[], nn.Module]] = {"original": lambda: study.prepared.model}
    loaders |= {name: partial(study.take, made) for name, made in maps.items()}
    for name, taken in loaders.items():
        if name in done:
            continue
        scores = run_tasks(taken(), study.prepared.tokenizer, ["cloze"], tasks, batch_size=16)
        (score,) = (one for one in scores if one.metric == "acc")
        right = score.score
        done[name] = {
            "right": short(right.value), "low": short(right.low), "high": short(right.high), "of": score.documents,
        }  # fmt: skip
        print(time.strftime("%H:%M:%S"), "questions", name, done[name], flush=True)
        save()


def _resumed(asked: argparse.Namespace, opened: Prepared) -> dict[str, Any]:
    """Results to go on with: those in the file, if it has been made with the same settings."""
    settings = {
        "model": asked.label or Path(asked.model).name,
        "expert_parameters": opened.inventory.expert_parameters,
        "original_bytes": sum(path.stat().st_size for path in opened.source.path.glob("*.safetensors")),
        "calibration": {"samples": asked.samples, "length": asked.length, "file": Path(asked.data).name},
        "held_out": {"files": [Path(p).name for p in asked.text], "windows": asked.windows, "length": asked.length},
        "group_size": 128,
        "quantizer": "gptq",
    }
    results: dict[str, Any] = {**settings, "commits": [], "runs": []}
    if asked.out.exists():
        results = json.loads(asked.out.read_text(encoding="utf-8"))["results"]
        if other := [key for key, value in settings.items() if results[key] != value]:
            raise SystemExit(f"{asked.out} was made with another {other[0]}; name another file, or remove it")
    results["commits"] = list(dict.fromkeys([*results["commits"], START["commit"]]))
    return results


def _parser() -> argparse.ArgumentParser:
    parser = study_arguments(__doc__ or "", "frontier")
    parser.add_argument("--bits", type=float, nargs="+", default=list(BITS), help="sizes of the knapsack's maps")
    parser.add_argument("--questions", type=int, default=0, help="about held-out text, for the last seed")
    parser.add_argument(
        "--methods", nargs="*", choices=list(QUANTIZED), default=list(QUANTIZED), help="of mopeq, judged"
    )
    peers_quality.add_flags(parser)
    return parser


if __name__ == "__main__":
    main()
