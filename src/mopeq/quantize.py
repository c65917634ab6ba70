"""From a checkpoint and a map, or a budget, to a packed checkpoint.

``pack_model`` quantizes a model with a map and writes the packed folder; ``quantize`` is the verb: it measures and
allocates first where a budget is given, and compares the result with the original.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.allocate import COSTS, allocate, parse_budget, uniform_map
from mopeq.allocate.budget import check_budget
from mopeq.analyze import check_request, moments
from mopeq.autoload import callable_module
from mopeq.checkpoint import PackedWriter, linear_precisions, packed_config
from mopeq.data.conversations import conversation_batches
from mopeq.data.text import text_windows
from mopeq.errors import DataError, InputError, OutputError
from mopeq.evaluate import Evaluation, evaluate
from mopeq.evaluate.answers import evaluate_answers
from mopeq.load import load, load_original, load_processor, load_tokenizer
from mopeq.measure import Calibration, Prepared, has_pictures, measure_prepared, observed, open_model, split_texts
from mopeq.precision import DEFAULT_REST, FULL, GROUPS, MATRICES, Precision, PrecisionMap, ProjectionGroup
from mopeq.progress import Track, silent
from mopeq.qtensor import Codes, QTensor, pack, pack_full
from mopeq.quantizers import QUANTIZERS, fallback_moments
from mopeq.source import Source, read_group, read_kept, read_matrix, stored_bytes
from mopeq.spec import Inventory, MoELayer, MoESpec
from mopeq.stats import write_json

__all__ = ["Packed", "pack_model", "quantize", "require_new", "run_record"]

DATA_FREE = ("rtn", "rtn-mse")
"""Quantizers that run without calibration inputs."""
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "generation_config.json", "*processor_config.json", "chat_template*", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Files that go with a model and are copied as they are."""
JUDGED_WINDOWS = 32
"""Windows of held-out text on which a new checkpoint is compared with its original."""


@dataclass(frozen=True)
class Packed:
    """A packed checkpoint on disk."""

    path: Path
    precisions: PrecisionMap
    bytes: int
    """Bytes of its safetensors files."""
    original_bytes: int
    seconds: float
    fallbacks: tuple[str, ...]
    """Units quantized with moments filled up from their layer's, because few or no calibration tokens reached them."""
    inventory: Inventory
    evaluation: Evaluation | None = None


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    precisions: PrecisionMap | None = None,
    uniform: Precision | None = None,
    budget: str | None = None,
    method: str = "gptq",
    calibration: Calibration | None = None,
    options: Sequence[Precision] | None = None,
    cost: str = "fisher_error",
    granularity: str = "group",
    rest: Mapping[str, Precision] | None = None,
    dtype: torch.dtype | None = None,
    evaluated: bool = True,
    command: str = "",
    track: Track = silent,
) -> Packed:
    """The ``quantize`` verb: with a map, quantize and pack; with a budget, measure and allocate first.

    Everything found on the way is left in ``out/mopeq/``: ``stats.json``, ``precision.json``, ``run.json`` and, unless
    ``evaluated`` is False, ``evaluation.json``, measured on calibration text that was kept apart.

    Args:
        model: folder or hub id of the original checkpoint.
        out: folder to make; it must not exist.
        precisions: a map for this model.
        uniform: instead of a map, one precision for every expert.
        budget: instead of a map, ``"3.0bpw"`` (bits per routed-expert weight, scales counted) or ``"1.4GB"``
            (the whole checkpoint).
        method: a name in ``quantizers.QUANTIZERS``; ``rtn`` needs no data if a map is given.
        calibration: text for measuring and for the quantizer.
        options: precisions that the allocator may choose from; None for ``Inventory.precisions()``.
        cost: cost metric that it reads.
        granularity: ``group`` or ``expert``.
        rest: precisions of the groups outside the experts, over the defaults.
        dtype: compute type of the original model.
        evaluated: compare the result with the original.
        command: command line to record.
        track: progress.
    """
    if sum(way is not None for way in (precisions, uniform, budget)) != 1:
        raise InputError("give one of a precision map, a uniform precision and a budget")
    if precisions is not None and rest:
        raise InputError('a map has its own precisions for the rest; edit "rest" in it, or leave out --rest')
    check_method(method)
    require_new(Path(out))
    calibration = calibration or Calibration()
    clock = _Clock()
    training, heldout = split_texts(calibration)
    rest = {**DEFAULT_REST, **(rest or {})}
    prepared = open_model(model)
    options = options or prepared.inventory.precisions()
    if budget is not None:
        sizes = (prepared.inventory.expert_bytes(uniform_map(prepared.inventory, [p], None, rest)) for p in options)
        check_budget(parse_budget(budget), prepared.inventory, rest, min(sizes))
        if cost not in COSTS:
            raise InputError(f"no cost {cost!r}; there are {', '.join(COSTS)}")
        check_request(prepared.inventory, (cost,), options, method)
    if precisions is not None:
        prepared.inventory.check(precisions)
    if evaluated and not has_pictures(calibration):  # text that cannot be scored is found before hours of work
        try:
            text_windows(heldout, load_tokenizer(prepared.source.path), calibration.length, limit=JUDGED_WINDOWS)
        except DataError as error:
            raise DataError(f"of the tenth of the data kept apart for comparing, {error}, or use --no-eval") from error
    if budget is not None or method not in DATA_FREE:
        prepared = observed(
            prepared,
            calibration,
            texts=training,
            gradients=budget is not None and cost == "fisher_error",
            dtype=dtype,
            track=track,
        )
    files: dict[str, Mapping[str, Any]] = {}
    clock("observe")
    if uniform is not None:
        precisions = PrecisionMap.uniform(prepared.inventory.experts, uniform, rest)
    elif precisions is None:
        wanted = ("frequency", "gate_mass", cost)
        stats = measure_prepared(
            prepared, wanted, options=options, quantizer=method, seed=calibration.seed, track=track
        )
        clock("measure")
        precisions = allocate(
            stats, method="knapsack", budget=budget, cost=cost, options=options, granularity=granularity, rest=rest
        )
        clock("allocate")
        files["stats.json"] = stats.to_json()
        seen = {layer: replace(routed, gradient=None) for layer, routed in prepared.routed.items()}
        prepared = replace(prepared, routed=seen)  # the gradients take half the memory and are done with
    packed = pack_model(prepared, precisions, out, method=method, files=files, track=track)
    clock("quantize")
    run = packed.path / "mopeq" / "run.json"
    write_json(run, run_record(prepared, packed, method, [command], clock.seconds))
    if evaluated:
        try:
            judged = _judge(prepared, packed, heldout, calibration, dtype, track)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(
                f"interrupted while comparing; {out} is complete, mopeq eval {out} --against {model} compares it"
            ) from stop
        clock("evaluate")
        write_json(packed.path / "mopeq" / "evaluation.json", judged.to_json())
        packed = replace(packed, evaluation=judged)
        write_json(run, run_record(prepared, packed, method, [command], clock.seconds))
    return packed


def _judge(
    prepared: Prepared,
    packed: Packed,
    heldout: Sequence[Any],
    calibration: Calibration,
    dtype: torch.dtype | None,
    track: Track,
) -> Evaluation:
    """The packed model, as a user will load it, beside the original on text that neither was calibrated on."""
    path = prepared.source.path
    original = prepared.model if prepared.model is not None else load_original(path, dtype=dtype)
    small = load(packed.path, dtype=original.dtype)
    if has_pictures(calibration):
        batches = conversation_batches(
            heldout[:JUDGED_WINDOWS],
            load_processor(path),
            samples=JUDGED_WINDOWS,
            batch_size=calibration.batch_size,
            seed=0,
        )
        return evaluate_answers(original, small, batches, track=track)
    tokenizer = prepared.tokenizer or load_tokenizer(path)
    return evaluate(
        small,
        tokenizer,
        reference=original,
        text=heldout,
        length=calibration.length,
        limit=JUDGED_WINDOWS,
        batch_size=calibration.batch_size,
        track=track,
    )


class _Clock:
    """Seconds of each stage since the last call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 2)
        self._last = now


def run_record(
    prepared: Prepared, packed: Packed, method: str, commands: Sequence[str], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """What ``run.json`` says: how the folder was made, with which versions, and which experts fell back."""
    names = ("mopeq", "torch", "transformers", "safetensors", "numpy", "scipy")
    return {
        "format": "mopeq-run",
        "version": 1,
        "commands": [command for command in commands if command],
        "model": str(prepared.source.path.name),
        "method": method,
        "calibration": dict(prepared.info),
        "bytes": packed.bytes,
        "original_bytes": packed.original_bytes,
        "expert_bits": prepared.inventory.expert_bits(packed.precisions),
        "inventory": prepared.inventory.to_json(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "fallbacks": list(packed.fallbacks),
        "seconds": dict(seconds),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in names}},
    }


def pack_model(
    prepared: Prepared,
    precisions: PrecisionMap,
    out: str | Path,
    *,
    method: str = "gptq",
    minimum_tokens: int | None = None,
    files: Mapping[str, Mapping[str, Any]] | None = None,
    track: Track = silent,
) -> Packed:
    """Quantize a prepared model with a map and write it, or leave nothing behind.

    Raises :class:`MapError` for a map of another model, :class:`ModelError` for weights that are not finite,
    :class:`OutputError` where the folder exists or the disk is full.
    """
    started = time.perf_counter()
    source, spec, inventory = prepared.source, prepared.spec, prepared.inventory
    inventory.check(precisions)
    check_method(method)
    needed = inventory.total_bytes(precisions)
    fallbacks: list[str] = []
    with PackedWriter(Path(out), needed_bytes=needed) as writer:
        for layer in track(spec.layers, f"quantize with {method}", len(spec.layers)):
            for name, tensor in _quantized_layer(prepared, layer, precisions, method, minimum_tokens, fallbacks):
                writer.add(name, tensor)
        for ref, precision in linear_precisions(spec, precisions).items():
            weight = read_matrix(source, ref.weight)
            if precision == FULL:
                writer.add_tensor(
                    f"{ref.name}.weight", weight if weight.element_size() == 2 else weight.to(torch.bfloat16)
                )
            else:
                writer.add(ref.name, pack(QUANTIZERS["rtn-mse"](weight.float()[None], precision, None)[0]))
        for kept in spec.kept:
            writer.add_tensor(kept.key, read_kept(source, kept))
        for pattern in COMPANIONS:
            for path in sorted(source.path.glob(pattern)):
                writer.copy_file(path)
        config = packed_config(_with_type(source, spec), spec, precisions, inventory)
        size = writer.finish(config, {**(files or {}), "precision.json": precisions.to_json()})
    original = sum(stored_bytes(source, key) for key in source.shapes)
    return Packed(Path(out), precisions, size, original, time.perf_counter() - started, tuple(fallbacks), inventory)


def _with_type(source: Source, spec: MoESpec) -> dict[str, Any]:
    """The original's configuration; where it names no type (MolmoE's), that of its embedding.

    transformers takes the first tensor's otherwise, which in a packed checkpoint is a scale's.
    """
    config = dict(source.config)
    if not {"dtype", "torch_dtype"} & {key for key in config if config[key] is not None}:
        embedding = next(ref.key for ref in spec.kept if ref.group == "embedding")
        config["dtype"] = {"F16": "float16", "BF16": "bfloat16"}.get(source.dtypes[embedding], "float32")
    return config


def _quantized_layer(
    prepared: Prepared,
    layer: MoELayer,
    precisions: PrecisionMap,
    method: str,
    minimum_tokens: int | None,
    fallbacks: list[str],
) -> Iterator[tuple[str, QTensor]]:
    """Packed matrices of one MoE layer, in the order experts, then gate, up, down."""
    weights = {group: read_group(prepared.source, layer, group) for group in GROUPS}
    inputs: dict[ProjectionGroup, Tensor | None] = dict.fromkeys(GROUPS)
    if prepared.routed and prepared.model is not None:
        module = prepared.model.get_submodule(layer.module)
        found = moments(prepared.routed[layer.index], module, weights["gate_up"])
        for group in GROUPS:
            summed: Tensor = getattr(found, group)
            enough = minimum_tokens if minimum_tokens is not None else summed.shape[-1] // 4
            inputs[group], short = fallback_moments(summed, found.tokens, enough)
            fallbacks.extend(f"{layer.index}.{expert}.{group}" for expert in short)
    made: dict[tuple[int, str], QTensor] = {}
    for group in GROUPS:
        buckets: dict[Precision, list[int]] = {}
        for expert, precision in enumerate(precisions.experts[group][layer.index]):
            buckets.setdefault(precision, []).append(expert)
        for precision, experts in buckets.items():
            weight, seen = weights[group][experts], inputs[group]
            if precision.bits == 16:
                full = {e: weight[i] for i, e in enumerate(experts)}
                parts = {e: [pack_full(m) for m in w.chunk(len(MATRICES[group]))] for e, w in full.items()}
            else:
                codes = QUANTIZERS[method](weight, precision, None if seen is None else seen[experts])
                parts = {e: [pack(c) for c in _rows(codes[i], len(MATRICES[group]))] for i, e in enumerate(experts)}
            for expert, packed in parts.items():
                made.update({(expert, m): q for m, q in zip(MATRICES[group], packed, strict=True)})
    for (expert, matrix), tensor in sorted(made.items()):
        yield layer.experts[expert].names[matrix], tensor


def _rows(codes: Codes, parts: int) -> list[Codes]:
    """The matrices that were stacked along the output axis."""
    zeros = [None] * parts if codes.zeros is None else list(codes.zeros.chunk(parts))
    both = zip(codes.codes.chunk(parts), codes.scales.chunk(parts), zeros, strict=True)
    return [Codes(c, s, z, codes.precision) for c, s, z in both]


def check_method(method: str) -> None:
    """Raise :class:`InputError` unless there is such a quantizer."""
    if method not in QUANTIZERS:
        raise InputError(f"no quantizer {method!r}; there are {', '.join(QUANTIZERS)}")


def require_new(out: Path) -> None:
    """Raise :class:`OutputError` if something is at ``out`` already, or if nothing can be made there."""
    out = Path(os.path.abspath(out.expanduser()))
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise OutputError(f"{out} exists already; give a new folder with -o, or remove it")
    above = next(folder for folder in out.parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise OutputError(f"cannot make {out}: {above} is no folder that can be written to; give another with -o")


callable_module(__name__, quantize)
