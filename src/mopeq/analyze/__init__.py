"""Measures of every routed expert: how it is used, how sensitive it is, and what each precision would cost it."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from mopeq.adapters import inventory_of
from mopeq.analyze.activation import USAGE, expert_tokens, frequency, gate_mass, gradient_norm, usage
from mopeq.analyze.cost import COSTS, Keep, layer_costs
from mopeq.analyze.fisher import fisher
from mopeq.analyze.forward import Batch, check_batches, experts_module, token_mask, vision_mask
from mopeq.analyze.hessian import hessian_trace
from mopeq.analyze.left_out import left_out_costs, outputs
from mopeq.analyze.moments import Moments, moment_traces, moments
from mopeq.analyze.observe import Routed, expert_rows, observe
from mopeq.analyze.part import measured_batches, observed_in_part, standing_for, token_marks
from mopeq.analyze.peak import output_peaks
from mopeq.analyze.slab import Layer, Map, Slab, here, mapped, on, slabs
from mopeq.analyze.weight_norm import hutchinson_norm_trace, inverse_norm, norm_trace
from mopeq.errors import DataError, MapError
from mopeq.memory import MOST
from mopeq.precision import GROUPS, LEFT_OUT, Precision, ProjectionGroup
from mopeq.progress import Track, note, silent
from mopeq.quantizers import QUANTIZERS, check_codebooks
from mopeq.source import Source
from mopeq.spec import ExpertId, Inventory, MoELayer, MoESpec
from mopeq.stats import Stats, cost_metric

__all__ = [
    "COSTS",
    "GRADIENTS",
    "METRICS",
    "WEIGHTED",
    "Batch",
    "Keep",
    "Map",
    "Moments",
    "Routed",
    "Slab",
    "analyze",
    "check_request",
    "data_facts",
    "expert_rows",
    "expert_tokens",
    "fisher",
    "frequency",
    "gate_mass",
    "gradient_norm",
    "here",
    "hessian_trace",
    "hutchinson_norm_trace",
    "inverse_norm",
    "layer_costs",
    "layer_metrics",
    "measured_batches",
    "moments",
    "norm_trace",
    "observe",
    "observed_in_part",
    "slabs",
    "token_marks",
]

T = TypeVar("T")

METRICS = {
    "frequency": "share of the layer's routed slots; also tokens, the counts; apart for image and text tokens",
    "gate_mass": "sum of the routing weights; apart for image and text tokens",
    "gradient_norm": "mean length of the loss gradient at the layer's output; apart for image and text tokens",
    "moment_trace": "traces of the quantizer's second moments, per token; apart for image and text tokens",
    "output_peak": "largest magnitude in the expert's output; super-experts stand out",
    "inverse_norm": "MoPEQ's score from the weights alone: 1/||W||_F summed over gate, up and down",
    "hessian_trace": "trace of the Hessian of the calibration loss, by Hutchinson's estimator, with its standard error",
    "fisher": "trace of the true Fisher information per token, labels drawn from the model, with its standard error; "
    "apart for image and text tokens",
    "output_error": "squared change of the layer's output per token, for each unit and option; apart likewise",
    "fisher_error": "the same weighted by squared gradients, a diagonal estimate of the KL divergence it causes",
}
"""What :func:`analyze` can measure."""

GRADIENTS = ("fisher_error", "gradient_norm")
"""Metrics for which the model runs backward."""
WEIGHTED = (*COSTS, "moment_trace")
"""Metrics that a weight of tokens enters."""
DATA_FREE = ("inverse_norm",)
WITHOUT_MOMENTS = ("rtn", "hqq")
"""Quantizers that take no calibration inputs."""


def analyze(
    model: nn.Module | None,
    source: Source,
    spec: MoESpec,
    batches: Sequence[Batch],
    metrics: Sequence[str],
    *,
    options: Sequence[Precision] = (),
    quantizer: str = "gptq",
    seed: int = 0,
    minimum_tokens: int | None = None,
    probes: int = 8,
    routed: Mapping[int, Routed] | None = None,
    info: Mapping[str, Any] | None = None,
    track: Track = silent,
) -> Stats:
    """Measure the named metrics and nothing else; the model runs over the data at most once for all that can share it.

    Args:
        model: the loaded original; None where only ``inverse_norm`` is asked for.
        source: its checkpoint, from which weights are read in float32 layer by layer.
        spec: its specification.
        batches: calibration data (:func:`observe`).
        metrics: names in :data:`METRICS`.
        options: precisions at which ``output_error`` and ``fisher_error`` are measured.
        quantizer: name of the quantizer they are measured with.
        seed: of sampled labels and probes.
        minimum_tokens: experts with fewer tokens are listed, and quantized with moments filled up from their layer's
            mean; None for a quarter of a matrix's inputs.
        probes: of ``hessian_trace``.
        routed: what :func:`observe` returned for these batches, if it was called already.
        info: facts about the data to keep.
        track: progress.

    Returns:
        Stats, whose ``info`` has ``seconds`` by metric, ``tokens``, ``sequences``, ``seed``, ``quantizer``,
        ``options``, ``minimum_tokens`` and ``starved``: ``{"3.17": tokens}`` of the experts below it, fewest first.

    Raises:
        MapError: an unknown metric or quantizer, no options for a cost, or options that do not fit the model's shapes.
        DataError: no calibration tokens.
        ModelError: weights or activations that are not finite.
    """
    metrics = tuple(dict.fromkeys(metrics))
    inventory = inventory_of(source, spec)
    options = tuple(sorted(set(options)))
    check_request(inventory, metrics, options, quantizer)
    costs = [name for name in COSTS if name in metrics]
    seconds: dict[str, float] = {}
    found: dict[str, dict[int, list[float]]] = {}
    facts: dict[str, Any] = {"seed": seed, **(info or {})}

    if "inverse_norm" in metrics:
        with _timed(seconds, "inverse_norm"):
            found["inverse_norm"] = inverse_norm(source, spec, track)
    with_data = [name for name in metrics if name not in DATA_FREE]
    if with_data:
        if model is None:
            raise DataError(f"{with_data[0]} runs the model over calibration data, found none; load the model")
        check_batches(model, batches)
        routed = dict(routed or {})
        if _lacks(routed, spec, with_data):
            with _timed(seconds, "observe"):
                routed = observe(
                    model, spec, batches, gradients=bool(set(GRADIENTS) & set(metrics)), seed=seed, track=track
                )
    if with_data and model is not None and routed:
        names = ("tokens", *(name for name in with_data if name not in _ESTIMATORS))
        with _timed(seconds, ", ".join(costs) or "usage"):
            for layer in track(spec.layers, f"costs with {quantizer}" if costs else "usage", len(spec.layers)):
                module = experts_module(model, layer)
                device = next(module.parameters()).device
                rows, _ = layer_metrics(
                    source, layer, routed[layer.index], module, names,
                    options=options, quantizer=quantizer, minimum_tokens=minimum_tokens, across=on(device), track=track,
                )  # fmt: skip
                for name, row in rows.items():
                    found.setdefault(name, {})[layer.index] = row
        facts |= data_facts(batches, found["tokens"], spec, minimum_tokens)
        facts |= {"quantizer": quantizer, "options": [str(p) for p in options]} if costs else {}
    for name, measure in _ESTIMATORS.items():
        if name in metrics and model is not None:
            with _timed(seconds, name):
                extra: dict[str, Any] = {"probes": probes} if name == "hessian_trace" else {}
                found[name], found[f"{name}.stderr"] = measure(model, spec, batches, seed=seed, track=track, **extra)
                facts |= {f"{name}_probes": probes} if extra else {}
                apart = name == "fisher" and any(vision_mask(batch) is not None for batch in batches)
                for kind in ("vision", "text") if apart else ():
                    part = fisher(model, spec, batches, seed=seed, kind=kind, track=track)
                    found[f"{name}.{kind}"], found[f"{name}.{kind}.stderr"] = part
    return Stats(inventory, {}, facts).with_metrics(found, seconds=seconds)


def check_request(inventory: Inventory, metrics: Sequence[str], options: Sequence[Precision], quantizer: str) -> None:
    """What :func:`analyze` refuses before it needs a model or data; raises :class:`MapError`."""
    _check_names(metrics, METRICS, "metric")
    _check_names((quantizer,), QUANTIZERS, "quantizer")
    check_codebooks(quantizer, options)
    costs = [name for name in COSTS if name in metrics]
    if costs and not options:
        raise MapError(f"{costs[0]} without precisions to measure it at; give options such as 2, 3 and 4 bits")
    for precision in options if costs else ():
        for layer in inventory.layers:
            for group in GROUPS:
                inventory.unit_bytes(layer, group, precision)


_ESTIMATORS: dict[str, Callable[..., tuple[dict[int, list[float]], dict[int, list[float]]]]] = {
    "fisher": fisher,
    "hessian_trace": hessian_trace,
}


def layer_metrics(
    source: Source,
    layer: MoELayer,
    seen: Routed,
    module: nn.Module,
    metrics: Sequence[str],
    *,
    options: Sequence[Precision] = (),
    quantizer: str = "gptq",
    minimum_tokens: int | None = None,
    memory: int = MOST,
    keep: Keep[T] | None = None,
    take: Callable[[T], None] | None = None,
    across: Map = here,
    track: Track = silent,
) -> tuple[dict[str, list[float]], list[str]]:
    """What one layer saw, and what each option would cost it, a few experts at a time.

    Args:
        source: the checkpoint, from which weights are read.
        layer: which.
        seen: what it saw; costs are measured on the tokens that it marks (:mod:`~mopeq.analyze.part`).
        module: its experts module, asked for the gate function.
        metrics: of ``tokens``, ``frequency``, ``gate_mass``, ``gradient_norm``, ``moment_trace``, ``output_peak``,
            ``output_error`` and ``fisher_error``; others are left to :func:`analyze`.
        options: precisions at which costs are measured.
        quantizer: name of the quantizer they are measured with.
        minimum_tokens: experts with fewer are quantized with moments filled up from their layer's mean; None for a
            quarter of a matrix's inputs.
        memory: bytes of weights and moments, and of dequantized weights, at a time.
        keep: as for :func:`layer_costs`, called where the work is done.
        take: is given, here and in order, what ``keep`` made.
        across: does the work.
        track: is told what is done.

    Returns:
        ``{metric: [one value per expert]}``, and the units whose moments were filled up, such as ``3.17.down``.
    """
    count = len(layer.experts)
    used = usage({layer.index: seen}, {layer.index: count}, tuple(name for name in USAGE if name in metrics))
    found = {name: rows[layer.index] for name, rows in used.items()}
    costs = [name for name in COSTS if name in metrics]
    wanted = tuple(name for name in ("moment_trace", "output_peak") if name in metrics)
    if not costs and not wanted:
        return found, []
    short: list[str] = []
    done = 0
    given = None if quantizer in WITHOUT_MOMENTS or not costs else seen
    together = None
    part, factors = standing_for(seen, count) if costs else (seen, [1.0] * count)
    if costs and LEFT_OUT in options:
        parts_of = mapped(
            across, Layer(source, layer, None, None, memory=memory), partial(outputs, seen=part, module=module)
        )
        together = sum(parts_of, torch.zeros(()))
    slab_costs = partial(
        _slab_costs,
        seen=seen,
        part=part,
        factors=factors,
        module=module,
        options=[p for p in options if p != LEFT_OUT],
        whole=together,
        quantizer=quantizer,
        costs=costs,
        wanted=wanted,
        memory=memory,
        keep=keep,
    )
    parts = mapped(across, Layer(source, layer, given, module, minimum_tokens, memory), slab_costs)
    for experts, filled, values, made in parts:
        short += [f"{layer.index}.{expert}.{group}" for group in GROUPS for expert in filled[group]]
        for one in made:
            if take is not None:
                take(one)
        for name, row in values.items():
            whole = found.setdefault(name, [0.0] * count)
            for expert, value in zip(experts, row, strict=True):
                whole[expert] = value
        done += len(experts)
        if costs:
            shown = min(options, key=lambda p: abs(p.bits - 3))
            lost = sum(sum(values[cost_metric(costs[-1], group, shown)]) for group in GROUPS)
            note(track, layer=layer.index, expert=done, experts=count, lost=lost, error_of=f"{costs[-1]} at {shown}")
    return found, short


def _slab_costs(
    slab: Slab,
    *,
    seen: Routed,
    part: Routed,
    factors: Sequence[float],
    module: nn.Module,
    options: Sequence[Precision],
    whole: torch.Tensor | None,
    quantizer: str,
    costs: Sequence[str],
    wanted: Sequence[str],
    memory: int,
    keep: Keep[T] | None,
) -> tuple[tuple[int, ...], Mapping[ProjectionGroup, tuple[int, ...]], dict[str, list[float]], list[T]]:
    """Experts, those filled up, their costs, traces and peaks, and what ``keep`` made of each unit at each option."""
    made: list[T] = []
    values: dict[str, list[float]] = {}
    if costs:
        values = layer_costs(
            part,
            module,
            slab.weights,
            slab.moments,
            options,
            QUANTIZERS[quantizer],
            costs=costs,
            minimum_tokens=0,
            memory=memory,
            experts=slab.experts,
            keep=None if keep is None else lambda *unit: made.append(keep(*unit)),
        )
    if whole is not None:
        values |= left_out_costs(slab, whole, seen=part, module=module, costs=costs)
    for name, row in values.items():
        values[name] = [factors[expert] * value for expert, value in zip(slab.experts, row, strict=True)]
    if "output_peak" in wanted:
        values["output_peak"] = output_peaks(seen, module, slab.weights["gate_up"], slab.weights["down"], slab.experts)
    if "moment_trace" in wanted:
        kinds = {kind: replace(seen.only(rows), token_weight=None) for kind, rows in seen.kinds().items()}
        for kind, tokens in {"": seen, **kinds}.items():
            traces = moment_traces(tokens, module, slab.weights["gate_up"], slab.experts)
            values |= {name + kind: row for name, row in traces.items()}
    return slab.experts, slab.short, values, made


def data_facts(
    batches: Sequence[Batch], tokens: Mapping[int, Sequence[float]], spec: MoESpec, minimum_tokens: int | None = None
) -> dict[str, Any]:
    """What the info of :func:`analyze` says of the data, from the number of tokens that each expert got."""
    minimum = minimum_tokens if minimum_tokens is not None else max(layer.hidden_size for layer in spec.layers) // 4
    few = {str(ExpertId(layer, e)): int(n) for layer, row in tokens.items() for e, n in enumerate(row) if n < minimum}
    starved = dict(sorted(few.items(), key=lambda item: item[1]))  # fewest first
    return {
        "tokens": sum(int(token_mask(batch).sum()) for batch in batches),
        "sequences": sum(len(batch["input_ids"]) for batch in batches),
        "minimum_tokens": minimum,
        "starved": starved,
    }


def _lacks(routed: Mapping[int, Routed], spec: MoESpec, metrics: Sequence[str]) -> bool:
    """Whether a pass over the data is needed for these metrics."""
    if not set(routed) >= {layer.index for layer in spec.layers}:
        return True
    return bool(set(GRADIENTS) & set(metrics)) and any(seen.gradient is None for seen in routed.values())


def _check_names(names: Sequence[str], known: Mapping[str, object], kind: str) -> None:
    if not names:
        raise MapError(f"no {kind} asked for; expected some of {', '.join(known)}")
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise MapError(f"unknown {kind} {name!r}; expected one of {', '.join(known)}{hint}")


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = round(time.perf_counter() - started, 3)
