"""How well a model predicts a text: nats per token, perplexity, bits per byte.

Every token but the first is scored once, in windows as :func:`mopeq.data.text.sliding_windows` cuts them: by default
windows that share one token, so that the first target of a window has one token of context. The protocol that drops
the first token of every window (GPTQ and others) scores a little fewer; compare only equal ``windows`` hashes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.data.text import Window, check_length, fingerprint, text_windows
from mopeq.errors import ModelError
from mopeq.evaluate.bootstrap import RESAMPLES, Estimate, ratio_estimate
from mopeq.progress import Track, silent

__all__ = [
    "Perplexity",
    "batched",
    "logits_of",
    "perplexity",
    "position_chunks",
    "score_windows",
    "summarize",
    "text_bytes",
]

CHUNK_VALUES = 1 << 24
"""Most logits that are turned into float32 at once: 64 MB."""


@dataclass(frozen=True)
class Perplexity:
    """Prediction of one text by one model.

    nats: mean negative log-likelihood of a token, with its interval; perplexity: its exponential.
    bytes: UTF-8 bytes of the scored tokens' text, and bits_per_byte: comparable between tokenizers; None where unknown.
    windows: hash of the windows; window_tokens, window_nats: scored tokens of each window and the sum of their nats.
    """

    nats: Estimate
    perplexity: Estimate
    tokens: int
    bytes: int | None
    bits_per_byte: float | None
    windows: str
    window_tokens: tuple[int, ...]
    window_nats: tuple[float, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Perplexity:
        """Inverse of ``dataclasses.asdict``."""
        return cls(
            nats=Estimate.from_json(data["nats"]),
            perplexity=Estimate.from_json(data["perplexity"]),
            tokens=int(data["tokens"]),
            bytes=None if data["bytes"] is None else int(data["bytes"]),
            bits_per_byte=None if data["bits_per_byte"] is None else float(data["bits_per_byte"]),
            windows=str(data["windows"]),
            window_tokens=tuple(map(int, data["window_tokens"])),
            window_nats=tuple(map(float, data["window_nats"])),
        )


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str | Path | Sequence[str],
    *,
    length: int = 512,
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    resamples: int = RESAMPLES,
    track: Track = silent,
) -> Perplexity:
    """Perplexity of a causal language model on a text.

    Args:
        model: a transformers causal language model, packed or not.
        tokenizer: its tokenizer.
        text: a ``Path`` is read, a string is the text itself, a sequence of strings are documents.
        length: tokens of a window, context included.
        stride: tokens from one window to the next; None is ``length - 1``, so that every token is read about once.
        limit: number of windows, evenly spread over the text; None scores them all.
        batch_size: windows that are run together.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        track: progress.
    """
    check_length(getattr(model, "config", None), length)
    windows = text_windows(text, tokenizer, length, stride=stride, limit=limit)
    nats = score_windows(model, windows, batch_size=batch_size, track=track)
    return summarize(nats, windows, text_bytes(windows, tokenizer), seed=seed, resamples=resamples)


def score_windows(
    model: nn.Module, windows: Sequence[Window], *, batch_size: int = 1, track: Track = silent
) -> list[float]:
    """Sum of the nats of each window's scored tokens."""
    nats = [0.0] * len(windows)
    batches = batched(windows, batch_size)
    for batch in track(batches, "perplexity", len(batches)):
        logits, targets = logits_of(model, [windows[i] for i in batch])
        for row, index in enumerate(batch):
            for part in position_chunks(logits[row]):
                scores = logits[row, part].float().log_softmax(-1)
                picked = scores.gather(-1, targets[row, part, None])
                nats[index] -= float(picked.double().sum())
        finite(nats, batch)
    return nats


def summarize(
    nats: Sequence[float], windows: Sequence[Window], size: int | None, *, seed: int = 0, resamples: int = RESAMPLES
) -> Perplexity:
    """The record of the nats of each window; ``size`` is the text's bytes."""
    tokens = tuple(w.scored for w in windows)
    mean = ratio_estimate(nats, tokens, seed=seed, resamples=resamples)
    bits = math.fsum(nats) / math.log(2) / size if size else None
    return Perplexity(mean, mean.through(math.exp), sum(tokens), size, bits, fingerprint(windows), tokens, tuple(nats))


def text_bytes(windows: Sequence[Window], tokenizer: Any) -> int:
    """UTF-8 bytes of the scored tokens' text, special tokens left out; a cut character counts as 3."""
    ids = torch.cat([w.ids[len(w.ids) - w.scored :] for w in windows]).tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.encode("utf-8"))


def batched(windows: Sequence[Window], batch_size: int) -> list[list[int]]:
    """Numbers of neighbouring windows of equal length and equal scored part, at most ``batch_size`` together."""
    batches: list[list[int]] = []
    for i, window in enumerate(windows):
        first = windows[batches[-1][0]] if batches else None
        alike = first is not None and (len(first.ids), first.scored) == (len(window.ids), window.scored)
        if alike and len(batches[-1]) < batch_size:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def logits_of(model: nn.Module, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Logits (batch, scored, vocabulary) in the model's own type, and targets (batch, scored), of windows alike."""
    ids = torch.stack([w.ids for w in windows])
    scored = windows[0].scored
    ids = ids.to(next(model.parameters()).device)
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, -scored - 1 : -1], ids[:, -scored:]


def position_chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of the positions of logits (positions, vocabulary), small enough to work on in float32."""
    step = max(1, CHUNK_VALUES // logits.shape[-1])
    for start in range(0, logits.shape[0], step):
        yield slice(start, start + step)


def finite(sums: Sequence[float], batch: Sequence[int]) -> None:
    """Raise :class:`ModelError` where a window's sum is not a number."""
    for i in batch:
        if not math.isfinite(sums[i]):
            raise ModelError(
                f"the model gives no finite likelihood in window {i}; expected finite logits; "
                "check its weights, and compute in bfloat16 or float32 if it ran in float16"
            )
