"""The frontier of size and quality: the knapsack beside every control and every peer, at equal bytes, window by window.

For every calibration seed the model is observed once and every unit quantized once at every precision. Each map is
judged with those codes, dequantized, in the experts of the original, all else as it was; two maps are also packed,
loaded and judged, to show that this is the same. Controls have the bytes of the knapsack's map and the same codes.
``--draws`` judges random maps, of one size and of many, beside what is predicted of them. Peers run, for the last seed,
in environments of their own on the same calibration tokens (``peers_quality.py``), and their matrices, dequantized,
take the same places.

Rows are stored one by one; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cloze
import controls
import peers_quality
from common import START, store, study_arguments
from fidelity import short
from mopeq.allocate import allocate, inverted_map, predicted, random_map, ranked_map, uniform_map
from mopeq.analyze import analyze, layer_metrics, moments
from mopeq.analyze.forward import experts_module
from mopeq.data.text import Window, read_texts, text_windows
from mopeq.evaluate import Comparison
from mopeq.evaluate.divergence import judging
from mopeq.load import load, load_source
from mopeq.measure import Calibration, Prepared, calibrated, observed, open_model
from mopeq.pack import pack_model
from mopeq.precision import FULL, GROUPS, LEFT_OUT, MATRICES, Precision, PrecisionMap
from mopeq.qtensor import Codes, dequantize, on_cpu
from mopeq.quantizers import DATA_FREE, QUANTIZERS, fallback_moments
from mopeq.runtime.experts import without
from mopeq.source import read_group
from mopeq.stats import Stats, cost_metric

COST = "fisher_error"
KEPT = {"attention": FULL, "lm_head": FULL}
"""All else is as it was, so that only what happens to the experts is compared."""
LEVELS = (2, 3, 4, 5, 6)
BITS = (2.5, 3.0, 2.25, 3.5, 4.0)
"""Bits per expert weight, everything counted, each with every control."""
PRUNED = (2.0, 2.25, 2.5)
"""Sizes at which the knapsack also has 0 bits, which leaves a whole expert out; only so 2.0 is reached."""
QUANTIZED = {"rtn": (2, 3, 4), "rtn-mse": (2, 3), "hqq": (2, 3), "signround": (2,)}
"""Other quantizers of mopeq's and the uniform bits at which they stand beside GPTQ, for the last seed."""
LAST_CONTROL = "ours, whole experts"
"""The control that is judged last."""
DRAWS = 2
"""Random maps of one histogram for every seed."""
SAMENESS = 0.005
"""Relative difference of the KL that packing and loading may make: other kernels, other sums."""
TASKS = re.compile(r"original|(uniform|ours|ours-0) [\d.]+")
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
    gone: dict[int, Tensor] = field(default_factory=dict)
    """Which experts of a layer are left out, bool (experts,)."""

    def __post_init__(self) -> None:
        for layer in self.prepared.spec.layers:
            experts_module(self.model, layer).register_forward_pre_hook(partial(self._routed, layer.index))

    def _routed(self, layer: int, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Tokens without the experts that are left out, as mopeq runs them; their slots get a weight of zero."""
        if not (layer in self.gone and self.gone[layer].any()):
            return given
        index, weights = without(given[1], given[2], self.gone[layer])
        return given[0], index.clamp_min(0), weights.to(given[2].dtype)

    def clear(self) -> None:
        """Forget what is in the model, as other matrices take the places."""
        self.filled.clear()
        self.gone.clear()

    def take(self, precisions: PrecisionMap) -> nn.Module:
        """The model with its experts at these precisions."""
        for layer in self.prepared.spec.layers:
            module = experts_module(self.model, layer)
            self.gone[layer.index] = torch.tensor([p == LEFT_OUT for p in precisions.experts["down"][layer.index]])
            for group in GROUPS:
                for expert, p in enumerate(precisions.experts[group][layer.index]):
                    unit = layer.index, expert, group
                    if p != LEFT_OUT and self.filled.get(unit) != p:
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
            save = partial(store, asked.out, results)
            _run(asked, opened, run, Path(temporary), seed == asked.seeds[-1], save)
            store(asked.out, results)


def _run(
    asked: argparse.Namespace,
    opened: Prepared,
    run: dict[str, Any],
    folder: Path,
    last: bool,
    save: Callable[[], None],
) -> None:
    """Every row of one seed that is not there yet; peers first, as they need nothing measured."""
    rows = {row["name"]: row for row in run["rows"]}
    ready = calibrated(opened, Calibration(asked.data, asked.samples, asked.length, 8, run["seed"]))
    windows, domains = _windows(asked, ready.tokenizer)
    left = any(f"{LAST_CONTROL} = {bits}" not in rows for bits in asked.bits)
    methods = {f"mopeq {m} {bits}": (m, bits) for m in asked.methods for bits in QUANTIZED[m]} if last else {}
    with_data = {name for name, (method, _) in methods.items() if method not in DATA_FREE}

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
        schemes = {f"AutoScheme = {name.split()[1]}" for name in rows if name.startswith("auto-scheme")}
        measured = left or not with_data | schemes | {f"ours-0 {bits}" for bits in asked.pruned} <= set(rows)
        if not (measured or _unasked(asked, run) or (last and asked.draws > len(run.get("draws", ())))):
            return
        study = studied(asked, opened, run["seed"], left, changed)
        run["seconds"] = {**run.get("seconds", {}), **study.seconds}
        if last:
            _drawn(study, asked.draws, run, judge, save)
        for job in (*_jobs(study, asked.bits, left), *_schemes(study, rows), *_pruned(study, asked.pruned)):
            if job.name not in rows:
                row = _described(study, job)
                if job.like is not None and row["bytes"] > rows[job.like]["bytes"]:
                    raise RuntimeError(f"{job.name} takes {row['bytes']} bytes, {job.like} {rows[job.like]['bytes']}")
                add(job.name, row, judge(study.take(job.precisions), job.name))
        if last:
            for name in ("ours 2.5", "ours-0 2.0"):
                if name in rows and name not in run.setdefault("packed", {}):
                    run["packed"][name] = _packed(study, name, rows[name], judge, folder)
                    save()
        for name in [n for n in methods if n not in rows]:
            study.clear()
            add(name, *_by_method(study.prepared, changed, judge, *methods[name]))
    if _unasked(asked, run):
        _asked_questions(asked, study, run, save)


def _options() -> list[Precision]:
    return [Precision(bits, 128) for bits in LEVELS]


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


def studied(asked: argparse.Namespace, opened: Prepared, seed: int, compared: bool, changed: nn.Module) -> Study:
    """Observe, quantize every unit at every precision, and measure mopeq's costs and, if asked, those of controls."""
    begun = time.process_time()
    calibration = Calibration(asked.data, asked.samples, asked.length, 8, seed, cost_share=1.0)
    prepared = observed(opened, calibration, dtype=torch.float32)
    seconds = {"observe": time.process_time() - begun}
    options = _options()
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
            options=[LEFT_OUT, *options], keep=keep,
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
    for p in _options()[:3]:
        yield _uniform(study, p.bits)
    for bits in budgets:
        name, ours = f"ours {bits}", _ours(study, bits)
        yield Job(name, "ours", ours)
        for what, precisions in _controls(study, ours) if compared else ():
            yield Job(f"{what} = {bits}", "control", precisions, name)


def _ours(study: Study, bits: float, options: Sequence[Precision] = ()) -> PrecisionMap:
    """The knapsack's map of a size."""
    return allocate(study.stats, budget=f"{bits}bpw", cost=COST, options=options or _options(), rest=KEPT)


def _pruned(study: Study, budgets: Sequence[float]) -> Iterator[Job]:
    """The knapsack with 0 bits among its options; the smallest with what else leaves experts out at its bytes."""
    stats, model = study.stats, study.stats.model
    for bits in budgets:
        name, ours = f"ours-0 {bits}", _ours(study, bits, [LEFT_OUT, *_options()])
        yield Job(name, "pruned", ours)
        if bits == min(PRUNED):
            used, two = stats.metric("frequency"), Precision(2, 128)
            unused = stats.with_metrics(controls.unused(used, two))
            made = allocate(
                unused, budget=f"{model.total_bytes(ours)}B", cost="unused", options=[LEFT_OUT, two],
                granularity="expert", rest=KEPT,
            )  # fmt: skip
            yield Job(f"uniform 2 without the least used = {bits}", "control", made, name)
            yield Job(f"frequency = {bits}", "control", ranked_map(model, used, ours), name)
            for draw in range(DRAWS):
                number = DRAWS * study.seed + draw
                keys = controls.random_scores(model, number)
                yield Job(f"random {number} = {bits}", "control", ranked_map(model, keys, ours), name)


def _schemes(study: Study, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[Job]:
    """What AutoScheme gave each layer, with the codes of the others; it has been a peer by now."""
    for name, row in list(rows.items()):
        peer, _, bits = name.partition(" ")
        if peer.startswith("auto-scheme") and f"ours {bits}" in rows:
            model = study.stats.model
            given = {int(layer): Precision(found, 128) for layer, (found,) in row["layer_bits"].items()}
            experts = {group: {k: (given[k],) * n for k, n in model.experts.items()} for group in GROUPS}
            yield Job(f"AutoScheme = {bits}", "control", PrecisionMap(experts, KEPT, {}), f"ours {bits}")


def _controls(study: Study, ours: PrecisionMap) -> Iterator[tuple[str, PrecisionMap]]:
    """Maps of the bytes of ``ours``: its histogram dealt out by less, and what other costs and solvers make."""
    stats, model, options = study.stats, study.stats.model, _options()
    bytes_of = {"budget": f"{model.total_bytes(ours)}B", "options": options, "rest": KEPT}
    norm, used = stats.metric("inverse_norm"), stats.metric("frequency")
    yield "frequency", ranked_map(model, used, ours)
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


def _drawn(study: Study, draws: int, run: dict[str, Any], judge: Judge, save: Callable[[], None]) -> None:
    """Random maps, as many of the knapsack's histogram at 2.5 bits as of sizes spread evenly over 2.2 to 4 bits."""
    done = run.setdefault("draws", [])
    for number in range(len(done) // 2, draws // 2):
        for sizes, bits in (("one", 2.5), ("many", 2.2 + 1.8 * number / max(1, draws // 2 - 1))):
            made = random_map(study.stats.model, _ours(study, bits), 1000 + number)
            found = judge(study.take(made), f"{sizes} {number}")
            told = short(predicted(study.stats, COST, made))
            done.append({"sizes": sizes, "bits": bits, "predicted": told, "kl": short(found.divergence.kl.value)})
        save()
        print(time.strftime("%H:%M:%S"), "drawn", number, done[-2]["kl"], done[-1]["kl"], flush=True)


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


def _packed(study: Study, name: str, row: Mapping[str, Any], judge: Judge, folder: Path) -> dict[str, Any]:
    """A map of the knapsack's packed, loaded and judged: the same KL as from its dequantized codes."""
    kind, _, bits = name.partition(" ")
    made = _ours(study, float(bits), [LEFT_OUT, *_options()] if kind == "ours-0" else ())
    done = pack_model(study.prepared, made, folder / name)
    kl = judge(load(folder / name, dtype=torch.float32), name).divergence.kl.value
    if abs(kl / row["kl"] - 1) > SAMENESS:
        raise RuntimeError(f"packed and loaded {name} has KL {kl}, its codes {row['kl']}")
    return {"kl": short(kl), "bytes": done.bytes, "bytes_said": row["bytes"]}


def _unasked(asked: argparse.Namespace, run: Mapping[str, Any]) -> list[str]:
    """What has not been asked all questions yet."""
    done = run.get("questions", {})
    names = ["original", *(row["name"] for row in run["rows"] if TASKS.fullmatch(row["name"]))]
    return [n for n in names if asked.questions and len(done.get(n, {"right": ""})["right"]) != asked.questions]


def _asked_questions(asked: argparse.Namespace, study: Study, run: dict[str, Any], save: Callable[[], None]) -> None:
    """Which questions about held-out text each model answers right, and by how many nats."""
    asked_about = cloze.questions(asked.text, study.prepared.tokenizer, asked.questions)
    done = run.setdefault("questions", {})
    maps = {job.name: job.precisions for job in (*_jobs(study, asked.bits, False), *_pruned(study, asked.pruned))}
    for name in _unasked(asked, run):
        if name != "original" and name not in maps:
            continue  # of a size that this run is not about
        margins = cloze.margins(study.prepared.model if name == "original" else study.take(maps[name]), asked_about)
        right = [int(margin > 0) for margin in margins]
        done[name] = {"right": "".join(map(str, right)), "margins": [round(margin, 3) for margin in margins]}
        print(time.strftime("%H:%M:%S"), run["seed"], "questions", name, sum(right) / len(right), flush=True)
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
    parser.add_argument(
        "--pruned", type=float, nargs="*", default=list(PRUNED), help="sizes of those that may leave experts out"
    )
    parser.add_argument("--draws", type=int, default=0, help="random maps to judge, for the last seed; an even number")
    parser.add_argument("--questions", type=int, default=0, help="about held-out text")
    parser.add_argument(
        "--methods", nargs="*", choices=list(QUANTIZED), default=list(QUANTIZED), help="of mopeq, judged"
    )
    peers_quality.add_flags(parser)
    return parser


if __name__ == "__main__":
    main()
