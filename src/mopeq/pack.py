"""From a map and a checkpoint to a packed checkpoint, a few experts in memory at a time.

Every MoE layer is a step of its own, and so is every gigabyte of the rest: a run that is killed goes on with the step
it was in (:class:`~mopeq.checkpoint.PackedWriter`).
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.ahead import Ahead
from mopeq.analyze import Routed
from mopeq.analyze.slab import Layer, Map, Slab, here, mapped
from mopeq.checkpoint import PackedWriter, Stored, linear_precisions, packed_config
from mopeq.errors import InputError
from mopeq.evaluate import Evaluation
from mopeq.learned import Learned, learned
from mopeq.measure import Prepared
from mopeq.memory import MOST, trim
from mopeq.precision import FULL, GROUPS, LEFT_OUT, MATRICES, Precision, PrecisionMap, ProjectionGroup
from mopeq.progress import Noting, Track, note, silent
from mopeq.qtensor import Codes, QTensor, dequantize, on_cpu, pack, pack_full, rows_of
from mopeq.quantizers import DATA_FREE, QUANTIZERS, WHOLE, Quantizer, check_codebooks, once
from mopeq.source import Source, close_files, read_kept, read_matrix, stored_bytes
from mopeq.spec import Inventory, KeptRef, LinearRef, MoELayer, MoESpec

__all__ = [
    "Coded",
    "LayerTensors",
    "Linears",
    "Packed",
    "check_method",
    "linear_codes",
    "pack_experts",
    "pack_model",
    "packed_step",
    "round_linear",
    "rounded_group",
    "run_record",
    "write_packed",
]

COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "generation_config.json", "*processor_config.json", "chat_template*", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Files that go with a model and are copied as they are."""
JUDGED_ROWS = 64
"""Rows of a matrix by which progress tells the error: a few per cent of the time that quantizing it takes."""
STEP_BYTES = 1 << 28
"""Bytes of the tensors outside the experts, as they are stored, that one step takes at most, or else one tensor."""
ROWS_BYTES = 1 << 24
"""Bytes in float32 of the rows outside the experts that are rounded at a time: small ones find their memory mapped."""

LayerTensors = Callable[[MoELayer, list[str]], Iterable[Stored]]
"""Makes the packed matrices of one MoE layer and names the units that fell back."""
Coded = Iterator[tuple[ProjectionGroup, list[int], Codes | None]]
"""A group, places in a slab, and their codes (places, rows, in), None at 16 bits. Those left out do not come."""
Coding = Callable[[Slab, Mapping[ProjectionGroup, Sequence[Precision]]], Coded]
"""Makes the codes of a slab at the precisions of its experts."""


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
    note: str = ""
    """Why it was not compared with the original although that was asked for."""
    guard: str = ""
    """What a comparison of the allocated map with a uniform one found, and so which of them this is."""
    aligned: str = ""
    """What came of aligning routers (:mod:`mopeq.align`)."""


@dataclass(frozen=True)
class Linears:
    """How matrices outside the experts are rounded: by which quantizer, with moments (in, in) of inputs by module."""

    method: str = "rtn-mse"
    moments: Mapping[str, Tensor] = field(default_factory=dict)


def pack_model(
    prepared: Prepared,
    precisions: PrecisionMap,
    out: str | Path,
    *,
    method: str = "gptq",
    minimum_tokens: int | None = None,
    linears: Linears | None = None,
    files: Mapping[str, Mapping[str, Any]] | None = None,
    track: Track = silent,
) -> Packed:
    """Quantize a prepared model with a map and write it, or leave nothing behind.

    What the model saw (``prepared.routed``) is used where it is there; without it, weights are read a few experts at a
    time and nothing else is in memory.

    Raises :class:`MapError` for a map of another model, :class:`ModelError` for weights that are not finite,
    :class:`OutputError` where the folder exists or the disk is full.
    """
    prepared.inventory.check(precisions)
    check_method(method, precisions.histogram())

    def tensors(layer: MoELayer, fallbacks: list[str]) -> Iterator[Stored]:
        seen = prepared.routed.get(layer.index)
        module = None if seen is None else prepared.model.get_submodule(layer.module)
        return pack_experts(prepared, layer, precisions, method, fallbacks, seen, module, minimum_tokens, track=track)

    with PackedWriter(Path(out), needed_bytes=prepared.inventory.total_bytes(precisions)) as writer:
        return write_packed(writer, prepared, precisions, tensors, method, files or {}, track, linears)


def write_packed(
    writer: PackedWriter,
    opened: Prepared,
    precisions: PrecisionMap,
    tensors: LayerTensors,
    method: str,
    files: Mapping[str, Mapping[str, Any]],
    track: Track = silent,
    linears: Linears | None = None,
    release: Callable[[], None] | None = None,
) -> Packed:
    """Everything that goes into a packed checkpoint, step by step; steps that an earlier run finished are taken over.

    ``tensors(layer, fallbacks)`` is called in the order of the layers, for those that are still to be made;
    ``release()``, when all layers are.
    """
    started = time.perf_counter()
    source, spec, inventory = opened.source, opened.spec, opened.inventory
    fallbacks: list[str] = []
    steps = list(_steps(opened, [*spec.linears, *spec.kept]))
    keys = [*(sorted(_expert_keys(layer)) for layer in spec.layers), *([ref.key for ref in refs] for refs in steps), []]
    keys[1] += keys[0]  # the first is read ahead of its own experts, too
    following, ahead = iter(keys[1:]), Ahead(source)
    writer.behind = method in DATA_FREE  # with others there may be no room for one more shard
    for layer in track(spec.layers, f"quantize with {method}", len(spec.layers)):
        after = next(following)
        if method in DATA_FREE:  # others have run the model up to this layer
            ahead.begin(after)
        short: list[str] = []
        facts = writer.part(packed_step(layer), partial(tensors, layer, short), {"fallbacks": short})
        fallbacks += facts["fallbacks"]
        close_files()
    if release is not None:
        release()
    trim()
    rest = partial(_rest, opened, linear_precisions(spec, precisions), linears or Linears())
    for number, refs in enumerate(track(steps, "everything else", len(steps)), 1):
        ahead.begin(next(following))
        writer.part(f"pack the rest, {number} of {len(steps)}", partial(rest, refs), {})
        close_files()
        trim()
    ahead.end()
    for pattern in COMPANIONS:
        for path in sorted(source.path.glob(pattern)):
            writer.copy_file(path)
    config = packed_config(_with_type(source, spec), spec, precisions, inventory)
    size = writer.finish(config, {**files, "precision.json": precisions.to_json()})
    original = sum(stored_bytes(source, key) for key in source.shapes)
    return Packed(writer.out, precisions, size, original, time.perf_counter() - started, tuple(fallbacks), inventory)


def _with_type(source: Source, spec: MoESpec) -> dict[str, Any]:
    """The original's configuration; where it names no type (MolmoE's), that of its embedding.

    transformers takes the first tensor's otherwise, which in a packed checkpoint is a scale's.
    """
    config = dict(source.config)
    if config.get("dtype") is None and config.get("torch_dtype") is None:
        embedding = next(ref.key for ref in spec.kept if ref.group == "embedding")
        config["dtype"] = {"F16": "float16", "BF16": "bfloat16"}.get(source.dtypes[embedding], "float32")
    return config


def _expert_keys(layer: MoELayer) -> set[str]:
    return {ref.key for expert in layer.experts for group in GROUPS for ref in expert.refs(group)}


def _steps(opened: Prepared, refs: Sequence[LinearRef | KeptRef]) -> Iterator[list[LinearRef | KeptRef]]:
    """Tensors in runs of at most ``STEP_BYTES``."""
    run: list[LinearRef | KeptRef] = []
    total = 0
    for ref in refs:
        nbytes = stored_bytes(opened.source, ref.key)
        if run and total + nbytes > STEP_BYTES:
            yield run
            run, total = [], 0
        run.append(ref)
        total += nbytes
    if run:
        yield run


def _rest(
    opened: Prepared, precisions: Mapping[LinearRef, Precision], how: Linears, refs: Sequence[LinearRef | KeptRef]
) -> Iterator[Stored]:
    """Matrices outside the experts at their precision, and what is kept as it is."""
    for ref in refs:
        if isinstance(ref, KeptRef):
            yield ref.key, read_kept(opened.source, ref)
            continue
        weight = read_matrix(opened.source, ref.weight)
        if precisions[ref] == FULL:
            yield f"{ref.name}.weight", weight if weight.element_size() == 2 else weight.to(torch.bfloat16)
        else:
            seen = how.moments.get(ref.module)
            moments = None if seen is None else seen[None]
            yield ref.name, pack(linear_codes(weight, precisions[ref], QUANTIZERS[how.method], moments))


def linear_codes(weight: Tensor, precision: Precision, quantizer: Quantizer, moments: Tensor | None) -> Codes:
    """Codes (out, in) of one matrix, whose rows do not depend on each other, with buffers of ``ROWS_BYTES``."""
    inputs = once(quantizer, moments)
    made = [
        quantizer(rows.float()[None], precision, inputs)[0]
        for rows in torch.split(weight, max(1, ROWS_BYTES // (4 * weight.shape[1])))
    ]
    zeros = [part.zeros for part in made if part.zeros is not None]
    codes, scales = torch.cat([part.codes for part in made]), torch.cat([part.scales for part in made])
    return replace(made[0], codes=codes, scales=scales, zeros=torch.cat(zeros) if zeros else None)


def round_linear(model: nn.Module, source: Source, ref: LinearRef, precision: Precision) -> None:
    """Give a module the weight that it has when it is packed at a precision, in the type it is of."""
    weight = read_matrix(source, ref.weight).float()
    if precision != FULL:
        weight = dequantize(linear_codes(weight, precision, QUANTIZERS[Linears().method], None))
    module: Any = model.get_submodule(ref.module)
    module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)


def pack_experts(
    opened: Prepared,
    layer: MoELayer,
    precisions: PrecisionMap,
    method: str,
    fallbacks: list[str],
    seen: Routed | None = None,
    module: nn.Module | None = None,
    minimum_tokens: int | None = None,
    memory: int = MOST,
    across: Map = here,
    coded: Coding | None = None,
    track: Track = silent,
) -> Iterator[Stored]:
    """Packed matrices of one MoE layer, in the order experts, then gate, up, down.

    seen, module: what the layer saw and its experts module; without, no moments. Units whose moments were filled up
    are added to ``fallbacks``. memory: bytes of experts at a time. across: does the work. coded: makes the codes, in
    the place of the method. track: is told what is done and, if it shows that and no ``coded`` is given, the share of
    the squared output (without moments, of the squared weights) that is lost.
    """
    made: dict[tuple[int, str], QTensor] = {}
    done, count = 0, len(layer.experts)
    share = "share of squared weights lost" if seen is None else "share of squared output lost"
    rows = {group: precisions.experts[group][layer.index] for group in GROUPS}
    together = Layer(opened.source, layer, seen, module, minimum_tokens, memory)
    told = isinstance(track, Noting) and coded is None  # weights that are moved on purpose lose nothing by it
    if coded is None and method in WHOLE and seen is not None and module is not None:
        coded = partial(_by_expert, learn=partial(learned, seen, module, minimum=max(together.enough.values())))
    work = partial(_packed_slab, rows=rows, coded=coded or partial(_by_group, method=method), judged=told)
    for slab in mapped(across, together, work):
        short = ((e, g) for g in GROUPS for e in slab.short[g] if rows[g][e] != LEFT_OUT)
        fallbacks += [f"{layer.index}.{expert}.{group}" for expert, group in short]
        made |= slab.made
        done += len(slab.experts)
        note(track, layer=layer.index, expert=done, experts=count, lost=slab.lost, whole=slab.whole, error_of=share)
    for expert in layer.experts:
        for matrix, name in expert.names.items():
            if (expert.id.expert, matrix) in made:  # it is not left out
                yield name, made[expert.id.expert, matrix]


@dataclass(frozen=True)
class PackedSlab:
    """Some experts packed, and what was ``lost`` of ``whole``, squared and summed over some rows."""

    experts: tuple[int, ...]
    made: Mapping[tuple[int, str], QTensor]
    short: Mapping[ProjectionGroup, tuple[int, ...]]
    lost: float
    whole: float


def _packed_slab(
    slab: Slab,
    *,
    rows: Mapping[ProjectionGroup, Sequence[Precision]],
    coded: Coding,
    judged: bool,
) -> PackedSlab:
    """Some experts, with the codes that ``coded`` makes of them."""
    made: dict[tuple[int, str], QTensor] = {}
    lost = whole = 0.0
    wanted = {group: [rows[group][expert] for expert in slab.experts] for group in GROUPS}
    for group, at, codes in coded(slab, wanted):
        weights, parts = slab.weights[group], len(MATRICES[group])
        some = at if len(at) < len(weights) else slice(None)  # which copies nothing
        if codes is None:
            packed = {i: [pack_full(m.cpu()) for m in weights[i].chunk(parts)] for i in at}
        else:
            if judged:
                moments = None if slab.moments is None else getattr(slab.moments, group)[some]
                one, all_of_it = _loss(weights[some], codes, moments)
                lost, whole = lost + one, whole + all_of_it
            codes = on_cpu(codes)
            packed = {i: [pack(c) for c in rows_of(codes[n], parts)] for n, i in enumerate(at)}
        for i, matrices in packed.items():
            made.update(((slab.experts[i], m), q) for m, q in zip(MATRICES[group], matrices, strict=True))
    return PackedSlab(slab.experts, made, slab.short, lost, whole)


def _by_group(slab: Slab, wanted: Mapping[ProjectionGroup, Sequence[Precision]], method: str) -> Coded:
    """Each group for itself."""
    for group, row in wanted.items():
        moments = None if slab.moments is None else getattr(slab.moments, group)
        for at, codes in rounded_group(slab.weights[group], moments, row, method):
            yield group, at, codes


def rounded_group(
    weights: Tensor, moments: Tensor | None, row: Sequence[Precision], method: str
) -> Iterator[tuple[list[int], Codes | None]]:
    """Places and codes of weights (n, rows, in), those of equal precision together; moments are factorized once."""
    quantizer = QUANTIZERS[method]
    inputs = {kind: once(quantizer, moments, kind) for kind in {p.hadamard for p in row if p.bits < 16}}
    for precision in dict.fromkeys(p for p in row if p != LEFT_OUT):
        at = [i for i, p in enumerate(row) if p == precision]
        some = at if len(at) < len(row) else slice(None)
        if precision.bits == 16:
            yield at, None
        else:
            seen = inputs[precision.hadamard]
            yield at, quantizer(weights[some], precision, None if seen is None else seen[some])


def _by_expert(
    slab: Slab, wanted: Mapping[ProjectionGroup, Sequence[Precision]], learn: Callable[..., Learned]
) -> Coded:
    """One expert after the other."""
    for i, expert in enumerate(slab.experts):
        precisions = {group: row[i] for group, row in wanted.items() if row[i] != LEFT_OUT}
        if precisions:
            found = learn(expert, {group: weights[i] for group, weights in slab.weights.items()}, precisions)
            yield from ((group, [i], found.get(group)) for group in precisions)


def _loss(weight: Tensor, codes: Codes, moments: Tensor | None) -> tuple[float, float]:
    """tr(D M D^T) of the error D, and tr(W M W^T), over the first rows of each matrix; M is 1 without moments."""
    some = slice(JUDGED_ROWS)
    zeros = None if codes.zeros is None else codes.zeros[:, some]
    kept = weight[:, some]
    error = kept - dequantize(Codes(codes.codes[:, some], codes.scales[:, some], zeros, codes.precision))
    squares = [float(((m if moments is None else m @ moments) * m).sum()) for m in (error, kept)]
    return squares[0], squares[1]


def packed_step(layer: MoELayer) -> str:
    """The step of a journal in which a layer was packed."""
    return f"pack layer {layer.index}"


def check_method(method: str, precisions: Iterable[Precision] = ()) -> None:
    """Raise :class:`InputError` unless there is such a quantizer and it can make the precisions."""
    if method not in QUANTIZERS:
        raise InputError(f"no quantizer {method!r}; there are {', '.join(QUANTIZERS)}")
    check_codebooks(method, precisions)


def run_record(
    prepared: Prepared,
    packed: Packed,
    method: str,
    commands: Sequence[str],
    seconds: Mapping[str, float],
    recipe: str = "",
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
        **{
            name: said
            for name, said in (("guard", packed.guard), ("recipe", recipe), ("aligned", packed.aligned))
            if said
        },
        "seconds": dict(seconds),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in names}},
    }
