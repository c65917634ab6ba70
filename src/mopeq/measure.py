"""From a model and text to statistics: open, run once, measure.

``open_model`` reads headers, ``observed`` runs the model once over the calibration text, ``measure_prepared`` computes
metrics from what was seen; ``measure`` is the verb ``analyze``, made of these.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.adapters import describe, inventory_of
from mopeq.analyze import Routed, analyze, check_request, observe
from mopeq.data.conversations import conversation_batches, has_images, read_conversations
from mopeq.data.samples import bundled_text
from mopeq.data.text import check_length, read_texts, token_batches
from mopeq.errors import DataError
from mopeq.load import load_original, load_processor, load_tokenizer
from mopeq.precision import Precision
from mopeq.progress import Track, silent
from mopeq.source import Source, open_source
from mopeq.spec import Inventory, MoESpec
from mopeq.stats import Stats

__all__ = [
    "Calibration",
    "Prepared",
    "has_pictures",
    "measure",
    "measure_prepared",
    "observed",
    "open_model",
    "split_texts",
]


@dataclass(frozen=True)
class Calibration:
    """Which text is run through the model. ``data`` None is the text that comes with mopeq.

    Of JSONL with images (data/conversations.py), ``samples`` conversations are taken whole and ``length`` says nothing.
    """

    data: str | None = None
    samples: int = 64
    length: int = 512
    batch_size: int = 4
    seed: int = 0


def has_pictures(calibration: Calibration) -> bool:
    """Whether the calibration data are conversations with images."""
    return calibration.data is not None and has_images(calibration.data)


@dataclass(frozen=True)
class Prepared:
    """An opened model and, where it was run, what it saw."""

    source: Source
    spec: MoESpec
    inventory: Inventory
    model: Any = None
    tokenizer: Any = None
    batches: Sequence[Mapping[str, Tensor]] = ()
    routed: Mapping[int, Routed] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


def open_model(model: str | Path) -> Prepared:
    """Open a model without loading or running it."""
    source = open_source(model)
    spec = describe(source)
    return Prepared(source, spec, inventory_of(source, spec))


def observed(
    opened: Prepared,
    calibration: Calibration,
    *,
    texts: Sequence[Any] | None = None,
    gradients: bool = True,
    dtype: torch.dtype | None = None,
    track: Track = silent,
) -> Prepared:
    """An opened model, loaded and run once over the calibration text.

    Args:
        opened: from :func:`open_model`.
        calibration: which text.
        texts: documents, or conversations where it has images, to take instead of reading ``calibration.data``.
        gradients: record the gradients that ``fisher_error`` needs.
        dtype: compute type of the model; None takes the checkpoint's.
        track: progress.
    """
    source, spec = opened.source, opened.spec
    tokenizer: Any
    sizes = {"samples": calibration.samples, "batch_size": calibration.batch_size, "seed": calibration.seed}
    if has_pictures(calibration):
        processor = load_processor(source.path)
        tokenizer = processor.tokenizer
        batches = conversation_batches(texts or read_conversations(str(calibration.data)), processor, **sizes)
        length = max(batch["input_ids"].shape[1] for batch in batches)
    else:
        tokenizer, length = load_tokenizer(source.path), calibration.length
        texts = texts or read_texts(calibration.data or bundled_text("calibration.jsonl"))
        batches = token_batches(texts, tokenizer, length=length, **sizes)
    loaded = load_original(source.path, dtype=dtype)
    check_length(loaded, length)
    started = time.perf_counter()
    routed = observe(loaded, spec, batches, gradients=gradients, seed=calibration.seed, track=track)
    info = {
        "data": calibration.data or "bundled calibration text",
        "samples": calibration.samples,
        "length": length,
        "seed": calibration.seed,
        "observe_seconds": round(time.perf_counter() - started, 2),
    }
    return replace(opened, model=loaded, tokenizer=tokenizer, batches=batches, routed=routed, info=info)


def measure(
    model: str | Path,
    metrics: Sequence[str],
    *,
    calibration: Calibration | None = None,
    options: Sequence[Precision] | None = None,
    quantizer: str = "gptq",
    dtype: torch.dtype | None = None,
    track: Track = silent,
) -> Stats:
    """The ``analyze`` verb: the named metrics of one model; costs are measured at the precisions ``options``."""
    calibration = calibration or Calibration()
    prepared = open_model(model)
    check_request(prepared.inventory, metrics, options or prepared.inventory.precisions(), quantizer)
    if set(metrics) - {"inverse_norm"}:
        gradients = "fisher_error" in metrics
        prepared = observed(prepared, calibration, gradients=gradients, dtype=dtype, track=track)
    return measure_prepared(prepared, metrics, options=options, quantizer=quantizer, seed=calibration.seed, track=track)


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


def split_texts(calibration: Calibration) -> tuple[list[Any], list[Any]]:
    """What to calibrate on, and what is kept apart to judge by (a tenth; the bundled held-out text for bundled data).

    Texts, or conversations where the data has images; of fewer than ten texts the last tenth of all is cut off.
    """
    if has_pictures(calibration):
        conversations = read_conversations(str(calibration.data))
        if len(conversations) < 10:
            raise DataError(
                f"{calibration.data} has {len(conversations)} conversations; expected at least 10, of which a tenth is "
                "kept apart for comparing; give more"
            )
        return [c for i, c in enumerate(conversations) if i % 10 != 9], conversations[9::10]
    texts = read_texts(calibration.data or bundled_text("calibration.jsonl"))
    if calibration.data is None:
        names = ("heldout_code.txt", "heldout_docs.txt")
        return texts, [text for name in names for text in read_texts(bundled_text(name))]
    if len(texts) >= 10:
        return [t for i, t in enumerate(texts) if i % 10 != 9], texts[9::10]
    whole = "\n\n".join(texts)
    cut = len(whole) * 9 // 10
    return [whole[:cut]], [whole[cut:]]
