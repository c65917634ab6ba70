"""From a model and text to statistics: open, run once, measure.

``open_model`` reads headers and ``calibrated`` cuts text into batches; ``measure_streamed`` runs the model layer by
layer and measures each while it is in memory. ``observed`` loads the whole model and records all layers at once, for
several maps of one observation; ``measure_prepared`` measures those. ``measure`` is the verb ``analyze``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.adapters import describe, inventory_of
from mopeq.analyze import (
    COSTS,
    GRADIENTS,
    WEIGHTED,
    Map,
    Routed,
    analyze,
    check_request,
    data_facts,
    here,
    layer_metrics,
    measured_batches,
    observed_in_part,
    token_marks,
)
from mopeq.balance import POOL, balanced
from mopeq.candidates import Candidates, packed_codes
from mopeq.data.conversations import conversation_batches, has_images, read_conversations, token_weights
from mopeq.data.mixture import SELF, read_data
from mopeq.data.mixture import written as written_by
from mopeq.data.samples import bundled_text
from mopeq.data.text import check_length, read_texts, token_batches
from mopeq.errors import DataError, InputError
from mopeq.job import hashed, hashed_batches, job_of, spilled, written, written_before
from mopeq.journal import Journal
from mopeq.load import load_processor, load_source, load_tokenizer, model_config
from mopeq.memory import MOST, footprint, slab_bytes, spilled_bytes
from mopeq.precision import Precision
from mopeq.progress import Track, silent
from mopeq.source import Source, close_files, open_source
from mopeq.spec import Inventory, MoELayer, MoESpec
from mopeq.stats import Stats
from mopeq.stream import Shell, Store, backward, forward, stored_dtype

__all__ = [
    "Calibration",
    "Prepared",
    "calibrated",
    "has_pictures",
    "measure",
    "measure_prepared",
    "measure_streamed",
    "measured_step",
    "observed",
    "open_model",
    "split_texts",
    "token_weights",
]

WRITTEN_APART = 48
"""Texts that a model writes to be judged by: enough to try maps on and to compare."""
WRITTEN_TOGETHER = 32
"""Texts that it writes at a time."""
WHOLE = ("fisher", "hessian_trace")
"""Metrics for which the model must be in memory whole."""


@dataclass(frozen=True)
class Calibration:
    """Which text is run through the model. ``data`` None is the text that comes with mopeq (:mod:`mopeq.data.mixture`).

    Of JSONL with images (data/conversations.py), ``samples`` conversations are taken whole and ``length`` says nothing.

    modality_weight: what a text token counts in moments and costs where an image token counts 1; scaled so that tokens
    count 1 on average. ``gradient_norm`` measures how much more the loss depends on one kind.
    balance: above 0, sequences are chosen so that each expert gets this times an even share (:mod:`mopeq.balance`).
    cost_share: of the text on which costs are measured, at least 4,096 tokens (:mod:`mopeq.analyze.part`); 1 for all.
    Moments, and so what a quantizer does, are of all of it.
    """

    data: str | None = None
    samples: int = 64
    length: int = 512
    batch_size: int = 4
    seed: int = 0
    modality_weight: float = 1.0
    balance: float = 0.0
    cost_share: float = 0.25


def has_pictures(calibration: Calibration) -> bool:
    """Whether the calibration data are conversations with images."""
    return calibration.data is not None and has_images(calibration.data)


@dataclass(frozen=True)
class Prepared:
    """An opened model and, where it was run, what it saw. ``cost_share`` is that of its calibration."""

    source: Source
    spec: MoESpec
    inventory: Inventory
    model: Any = None
    tokenizer: Any = None
    batches: Sequence[Mapping[str, Tensor]] = ()
    routed: Mapping[int, Routed] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    cost_share: float = 1.0


def open_model(model: str | Path) -> Prepared:
    """Open a model without loading or running it."""
    source = open_source(model)
    spec = describe(source)
    return Prepared(source, spec, inventory_of(source, spec))


def calibrated(
    opened: Prepared, calibration: Calibration, *, texts: Sequence[Any] | None = None, track: Track = silent
) -> Prepared:
    """An opened model with its tokenizer and batches of the calibration data; the model is not loaded.

    With ``balance`` a pool of text is run through it layer by layer, to choose among its sequences.

    texts: documents, or conversations where it has images, to take instead of reading ``calibration.data``. Raises
    :class:`DataError` for data that give no batches, and for sequences longer than the model takes.
    """
    path = opened.source.path
    sizes = {"samples": calibration.samples, "batch_size": calibration.batch_size, "seed": calibration.seed}
    check_shares(calibration)
    if has_pictures(calibration):
        processor = load_processor(path)
        tokenizer = processor.tokenizer
        batches = conversation_batches(texts or read_conversations(str(calibration.data)), processor, **sizes)
        length = max(batch["input_ids"].shape[1] for batch in batches)
    else:
        tokenizer, length = load_tokenizer(path), calibration.length
        texts = texts or _texts(calibration, path)
        sizes["samples"] *= POOL if calibration.balance else 1
        batches = token_batches(texts, tokenizer, length=length, **sizes)
    check_length(model_config(path), length)
    chosen: dict[str, Any] = {}
    if calibration.balance:
        batches, found = balanced(opened.source, opened.spec, batches, calibration.samples, calibration.balance, track)
        chosen["balance"] = found.to_json()
    info: dict[str, Any] = {
        "data": calibration.data or "bundled calibration text",
        "samples": calibration.samples,
        "length": length,
        "seed": calibration.seed,
        **chosen,
    }
    if calibration.modality_weight != 1:
        batches = token_weights(batches, calibration.modality_weight)
        info["modality_weight"] = calibration.modality_weight
    return replace(opened, tokenizer=tokenizer, batches=batches, info=info, cost_share=calibration.cost_share)


def check_shares(calibration: Calibration) -> None:
    """Raise :class:`DataError` for shares that are none, and for a balance asked of conversations with images."""
    if not 0 < calibration.cost_share <= 1:
        raise DataError(
            f"cost share {calibration.cost_share}; expected a share of the calibration text above 0, or 1 for all of it"
        )
    if not 0 <= calibration.balance < math.inf:
        raise DataError(f"balance {calibration.balance}; expected a share of an even share such as 0.5, or 0 for none")
    if calibration.balance and has_pictures(calibration):
        raise DataError("balance chooses among windows of text, and these are conversations with images; leave it out")


def observed(
    opened: Prepared,
    calibration: Calibration,
    *,
    texts: Sequence[Any] | None = None,
    gradients: bool = True,
    dtype: torch.dtype | None = None,
    track: Track = silent,
) -> Prepared:
    """An opened model, loaded whole and run once over the calibration text: for several maps of one observation.

    Args:
        opened: from :func:`open_model`.
        calibration: which text.
        texts: documents, or conversations where it has images, to take instead of reading ``calibration.data``.
        gradients: record the gradients that ``fisher_error`` needs, of the part that costs are measured on.
        dtype: compute type of the model; None takes the checkpoint's.
        track: progress.
    """
    ready = calibrated(opened, calibration, texts=texts, track=track)
    loaded = load_source(opened.source, dtype)
    started = time.perf_counter()
    measured = measured_batches(ready.batches, ready.cost_share)
    routed = observed_in_part(
        loaded, opened.spec, ready.batches, measured, gradients=gradients, seed=calibration.seed, track=track
    )
    seconds = round(time.perf_counter() - started, 2)
    info = {**ready.info, **_facts(token_marks(ready.batches, measured)), "observe_seconds": seconds}
    return replace(ready, model=loaded, routed=routed, info=info)


def measure(
    model: str | Path,
    metrics: Sequence[str],
    *,
    calibration: Calibration | None = None,
    options: Sequence[Precision] | None = None,
    quantizer: str = "gptq",
    dtype: torch.dtype | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    max_memory: int | None = None,
    command: str = "",
    across: Map = here,
    track: Track = silent,
) -> Stats:
    """The ``analyze`` verb: the named metrics of one model; costs are measured at the precisions ``options``.

    Args:
        model: folder or hub id of the original checkpoint.
        metrics: names in :data:`~mopeq.analyze.METRICS`.
        calibration: which text.
        options: precisions; None for ``Inventory.precisions()``.
        quantizer: name of the quantizer that costs are measured with.
        dtype: compute type of the model; None takes the checkpoint's.
        out: file to write. Activations are spilled to a folder beside it, which goes when the file is there; None keeps
            them in memory and writes nothing.
        resume: go on with what the same call with the same ``out`` left unfinished, or read what it finished.
        max_memory: bytes that this process may have resident; None for what the machine has. Less than the least
            possible is an :class:`InputError` with the number needed, and so is a limit for a metric that takes the
            whole model.
        command: command line to record.
        across: works on the experts of a layer, here or on a cluster; not for metrics that take the whole model.
        track: progress.
    """
    calibration = calibration or Calibration()
    opened = open_model(model)
    options = options or opened.inventory.precisions()
    check_request(opened.inventory, metrics, options, quantizer)
    if calibration.modality_weight != 1 and not set(metrics) & set(WEIGHTED):
        raise InputError(
            f"a modality weight enters {', '.join(WEIGHTED)}, and none of them is asked for; ask for one, or leave it "
            "out"
        )
    if whole := sorted(set(metrics) & set(WHOLE)):
        if across is not here:
            raise InputError(
                f"{whole[0]} takes the whole model in one process; leave it out, or measure it without --ray"
            )
        if max_memory is not None or resume:
            raise InputError(f"{whole[0]} takes the whole model in memory at once; no --max-memory or --resume with it")
        prepared = observed(
            opened, calibration, gradients=bool(set(GRADIENTS) & set(metrics)), dtype=dtype, track=track
        )
        seed = calibration.seed
        stats = measure_prepared(prepared, metrics, options=options, quantizer=quantizer, seed=seed, track=track)
        return written(out, stats, command=command)
    streamed = [name for name in metrics if name != "inverse_norm"]
    stats = Stats(opened.inventory, {}, {"seed": calibration.seed})
    if "inverse_norm" in metrics:
        stats = analyze(None, opened.source, opened.spec, [], ["inverse_norm"], seed=calibration.seed, track=track)
    if not streamed:
        return written(out, stats, command=command)
    ready, started = calibrated(opened, calibration, track=track), time.perf_counter()
    gradients = bool(set(GRADIENTS) & set(streamed))
    itemsize = (dtype or stored_dtype(opened.source)).itemsize
    need = footprint(opened.source, opened.spec, ready.batches, itemsize=itemsize, gradients=gradients)
    job = job_of(
        opened.source, metrics=list(metrics), options=[str(p) for p in options], quantizer=quantizer, dtype=str(dtype),
        calibration={**asdict(calibration), "batches": hashed_batches(ready.batches)},
    )  # fmt: skip
    with spilled(out, spilled_bytes(opened.spec, ready.batches, gradients=gradients), job, resume) as journal:
        if resume and (known := written_before(out, job)) is not None:
            return known
        found, _ = measure_streamed(
            ready, streamed, options=options, quantizer=quantizer, seed=calibration.seed, dtype=dtype,
            journal=journal, keep=False, memory=slab_bytes(max_memory, need), across=across, track=track,
        )  # fmt: skip
        seconds = {**stats.info.get("seconds", {}), ", ".join(streamed): round(time.perf_counter() - started, 3)}
        stats = found.with_metrics(stats.metrics, seconds=seconds)
        return written(out, stats, command=command, job=hashed(job))  # before what it was made of goes


def measure_streamed(
    ready: Prepared,
    metrics: Sequence[str],
    *,
    options: Sequence[Precision],
    quantizer: str,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    journal: Journal | None = None,
    keep: bool = True,
    memory: int = MOST,
    across: Map = here,
    track: Track = silent,
) -> tuple[Stats, tuple[str, ...]]:
    """Metrics of a model of which one decoder layer at a time is in memory, and the units that fell back.

    Args:
        ready: from :func:`calibrated`.
        metrics: names that :func:`~mopeq.analyze.layer_metrics` knows.
        options: precisions at which costs are measured.
        quantizer: name of the quantizer they are measured with.
        seed: of sampled labels.
        dtype: compute type of the model; None takes the checkpoint's.
        journal: of the folder that activations are spilled to; what the run that it tells of has measured is taken
            over, :func:`measured_step`.
        keep: leave every unit at every option there, packed (``mopeq.candidates``).
        memory: bytes of experts at a time (:func:`~mopeq.memory.slab_bytes`).
        across: works on them.
        track: progress.
    """
    spec, source = ready.spec, ready.source
    names = ("tokens", *metrics)
    found: dict[int, Mapping[str, Any]] = {}
    for layer in spec.layers:
        facts = None if journal is None else journal.done(measured_step(layer))
        if facts is not None:
            found[layer.index] = facts
    measured = measured_batches(ready.batches, ready.cost_share) if {*COSTS, *GRADIENTS} & set(metrics) else None
    marks = token_marks(ready.batches, measured)
    left = [layer.decoder for layer in spec.layers if layer.index not in found]
    if left:
        shell, store = Shell(source, spec, dtype), Store(journal)
        if set(GRADIENTS) & set(names):
            sweep = backward(
                shell, ready.batches, store, measured=measured, seed=seed, until=max(left) + 1, track=track
            )
        else:
            sweep = forward(shell, ready.batches, store, until=min(left), track=track)
        for layer, module, seen in sweep:
            if layer.index in found:
                continue
            kept = Candidates(journal.folder, store.scratch, layer) if journal is not None and keep else None
            seen = replace(seen, measured=marks)
            rows, short = layer_metrics(
                source, layer, seen, module, names, options=options, quantizer=quantizer, memory=memory,
                keep=None if kept is None else packed_codes, take=kept, across=across, track=track,
            )  # fmt: skip
            facts = {"metrics": rows, "fallbacks": short}
            if journal is not None:
                journal.record(measured_step(layer), facts, {} if kept is None else kept.finish())
            found[layer.index] = facts
            close_files()
        store.clear()
    ordered = {layer.index: found[layer.index] for layer in spec.layers}
    by_name = {
        name: {index: facts["metrics"][name] for index, facts in ordered.items()}
        for name in next(iter(ordered.values()))["metrics"]
    }
    info = {**ready.info, **_facts(marks), "seed": seed, **data_facts(ready.batches, by_name["tokens"], spec)}
    if set(metrics) & set(COSTS):
        info |= {"quantizer": quantizer, "options": [str(p) for p in options]}
    fallbacks = tuple(unit for facts in ordered.values() for unit in facts["fallbacks"])
    return Stats(ready.inventory, {}, info).with_metrics(by_name), fallbacks


def _facts(marks: Tensor | None) -> dict[str, int]:
    """On how many tokens costs are measured, where these are not all."""
    return {} if marks is None else {"cost_tokens": int(marks.sum())}


def measured_step(layer: MoELayer) -> str:
    """The step of a journal in which a layer was measured and its candidates were written."""
    return f"measure layer {layer.index}"


def measure_prepared(
    prepared: Prepared,
    metrics: Sequence[str],
    *,
    options: Sequence[Precision] | None = None,
    quantizer: str = "gptq",
    seed: int = 0,
    track: Track = silent,
) -> Stats:
    """Metrics of a model that :func:`observed` has run."""
    stats = analyze(
        prepared.model,
        prepared.source,
        prepared.spec,
        prepared.batches,
        metrics,
        routed=prepared.routed,
        options=options or prepared.inventory.precisions(),
        quantizer=quantizer,
        seed=seed,
        track=track,
    )
    return replace(stats, info={**prepared.info, **stats.info})


def _texts(calibration: Calibration, model: str | Path, more: int = 0) -> list[str]:
    """All calibration texts; where the model writes them, ``more`` than are asked for."""
    if calibration.data is None:
        return read_texts(bundled_text("calibration.jsonl"))
    if calibration.data != SELF:
        return read_data(calibration.data)
    return written_by(
        load_source(open_source(model)),
        load_tokenizer(model),
        samples=calibration.samples * (POOL if calibration.balance else 1) + more,
        length=calibration.length,
        batch_size=WRITTEN_TOGETHER,
        seed=calibration.seed,
    )


def split_texts(calibration: Calibration, model: str | Path) -> tuple[list[Any], list[Any]]:
    """What to calibrate on, and what is kept apart to judge by (a tenth; the bundled held-out text for bundled data).

    Texts, or conversations where the data has images; of fewer than ten texts the last tenth of all is cut off. Where
    the model writes them itself, it writes ``WRITTEN_APART`` more to judge by.
    """
    if has_pictures(calibration):
        conversations = read_conversations(str(calibration.data))
        if len(conversations) < 10:
            raise DataError(
                f"{calibration.data} has {len(conversations)} conversations; expected at least 10, of which a tenth is "
                "kept apart for comparing; give more"
            )
        return [c for i, c in enumerate(conversations) if i % 10 != 9], conversations[9::10]
    if calibration.data is None:
        names = ("heldout_code.txt", "heldout_docs.txt")
        judging = [text for name in names for text in read_texts(bundled_text(name))]
        return _texts(calibration, model), judging
    if calibration.data == SELF:
        texts = _texts(calibration, model, WRITTEN_APART)
        return texts[WRITTEN_APART:], texts[:WRITTEN_APART]
    texts = _texts(calibration, model)
    if len(texts) >= 10:
        return [t for i, t in enumerate(texts) if i % 10 != 9], texts[9::10]
    whole = "\n\n".join(texts)
    cut = len(whole) * 9 // 10
    return [whole[:cut]], [whole[cut:]]
