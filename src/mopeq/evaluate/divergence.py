"""How far a quantized model is from its original, token by token on the same text.

``KL(original || quantized)`` is the expected extra nats of a token drawn from the original and coded with the quantized
model; agreement is the share of positions where both rank the same token first. Both use full logits: the two models
run on the same window, and each position is computed in float32 and forgotten.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.data.text import Window, fingerprint
from mopeq.errors import DataError, ModelError, OutputError
from mopeq.evaluate.bootstrap import RESAMPLES, Estimate, difference_estimate, ratio_estimate
from mopeq.evaluate.perplexity import Perplexity, batched, finite, logits_of, position_chunks, summarize
from mopeq.progress import Track, silent

__all__ = [
    "Comparison",
    "Divergence",
    "Loader",
    "compare",
    "divergence",
    "evaluate_many",
    "judging",
    "paired_difference",
]

Loader = Callable[[], nn.Module]


@dataclass(frozen=True)
class Divergence:
    """Distance of one model from another on one text.

    kl: nats per token; agreement: share of tokens, 0 to 1; each with its interval over windows.
    windows: hash of the windows; window_tokens, window_kl, window_agreed: tokens of each window, the sum of their KL,
    and how many agree.
    """

    kl: Estimate
    agreement: Estimate
    tokens: int
    windows: str
    window_tokens: tuple[int, ...]
    window_kl: tuple[float, ...]
    window_agreed: tuple[int, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Divergence:
        """Inverse of ``dataclasses.asdict``."""
        return cls(
            kl=Estimate.from_json(data["kl"]),
            agreement=Estimate.from_json(data["agreement"]),
            tokens=int(data["tokens"]),
            windows=str(data["windows"]),
            window_tokens=tuple(map(int, data["window_tokens"])),
            window_kl=tuple(map(float, data["window_kl"])),
            window_agreed=tuple(map(int, data["window_agreed"])),
        )


@dataclass(frozen=True)
class Comparison:
    """Two models on the same windows."""

    reference: Perplexity
    candidate: Perplexity
    divergence: Divergence


def divergence(reference: nn.Module, model: nn.Module, windows: Sequence[Window], **options: Any) -> Divergence:
    """KL(reference || model) and top-1 agreement; options as :func:`compare`."""
    return compare(reference, model, windows, **options).divergence


def compare(
    reference: nn.Module,
    model: nn.Module,
    windows: Sequence[Window],
    *,
    size: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    resamples: int = RESAMPLES,
    track: Track = silent,
) -> Comparison:
    """Perplexity of both models and the divergence between them, in one pass.

    Args:
        reference: the original model.
        model: the quantized one; of the same vocabulary.
        windows: what :func:`mopeq.data.text.text_windows` gives.
        size: bytes of the scored text, for bits per byte.
        batch_size: windows that are run together.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        track: progress.
    """
    batches = batched(windows, batch_size)

    def original(number: int) -> Tensor:
        return logits_of(reference, [windows[i] for i in batches[number]])[0]

    return _compare(original, model, windows, batches, size, seed, resamples, track, "compare")


def evaluate_many(
    reference: nn.Module | Loader,
    candidates: Mapping[str, Loader],
    windows: Sequence[Window],
    *,
    cache: str | Path | None = None,
    size: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    resamples: int = RESAMPLES,
    track: Track = silent,
) -> dict[str, Comparison]:
    """Compare several models with one original, holding one candidate in memory at a time.

    Args:
        reference: the original, or a function that loads it.
        candidates: functions that load the models.
        windows: what :func:`mopeq.data.text.text_windows` gives.
        cache: None keeps the reference in memory and runs it again for every candidate. A folder runs it once and keeps
            its logits there, in a temporary folder, in its own type (2 bytes x vocabulary x tokens in bfloat16):
            results are the same to the last bit, and a reference loaded here leaves memory before a candidate comes.
        size: bytes of the scored text, for bits per byte.
        batch_size: windows that are run together.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        track: progress.
    """
    options: dict[str, Any] = {"size": size, "batch_size": batch_size, "seed": seed, "resamples": resamples}
    with judging(reference, windows, cache=cache, track=track, **options) as judge:
        return {name: judge(load(), name) for name, load in candidates.items()}


@contextmanager
def judging(
    reference: nn.Module | Loader,
    windows: Sequence[Window],
    *,
    cache: str | Path | None = None,
    size: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    resamples: int = RESAMPLES,
    track: Track = silent,
) -> Iterator[Callable[[nn.Module, str], Comparison]]:
    """A function that compares one model after the other with one original; arguments as :func:`evaluate_many`.

    It takes a model and what to call it while it is judged.
    """
    batches = batched(windows, batch_size)
    with ExitStack() as stack:
        original = _original(reference, windows, batches, cache, stack, track)
        yield lambda model, name: _compare(original, model, windows, batches, size, seed, resamples, track, name)


def _original(
    reference: nn.Module | Loader,
    windows: Sequence[Window],
    batches: Sequence[Sequence[int]],
    cache: str | Path | None,
    stack: ExitStack,
    track: Track,
) -> Callable[[int], Tensor]:
    """A function that gives the reference's logits (batch, scored, vocabulary) of the batch of a number."""
    model = reference if isinstance(reference, nn.Module) else reference()

    def run(number: int) -> Tensor:
        return logits_of(model, [windows[i] for i in batches[number]])[0]

    if cache is None:
        return run
    folder = Path(stack.enter_context(_temporary(Path(cache))))
    for number in track(range(len(batches)), "original", len(batches)):
        _keep(folder, number, run(number))
    return lambda number: _kept(folder, number)


def paired_difference(
    first: Divergence | Perplexity, second: Divergence | Perplexity, *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """How much larger ``first`` is, in nats per token (KL, or negative log-likelihood), with its interval.

    The windows are resampled together, which takes out how hard each is: far sharper than comparing two intervals.
    Raises :class:`DataError` unless both were measured on the same windows.
    """
    if type(first) is not type(second):
        raise DataError(f"a {type(first).__name__} and a {type(second).__name__}; expected two of a kind")
    if first.windows != second.windows:
        raise DataError(
            f"measured on windows {first.windows} and {second.windows}; expected the same; evaluate both on one text"
        )
    a, b = (m.window_kl if isinstance(m, Divergence) else m.window_nats for m in (first, second))
    return difference_estimate(a, b, first.window_tokens, seed=seed, resamples=resamples)


def _compare(
    original: Callable[[int], Tensor],
    model: nn.Module,
    windows: Sequence[Window],
    batches: Sequence[Sequence[int]],
    size: int | None,
    seed: int,
    resamples: int,
    track: Track,
    description: str,
) -> Comparison:
    """``original`` gives the reference's logits (batch, scored, vocabulary) of the batch of that number."""
    nats, reference_nats, kl = ([0.0] * len(windows) for _ in range(3))
    agreed = [0] * len(windows)
    for number in track(range(len(batches)), description, len(batches)):
        batch = batches[number]
        logits, targets = logits_of(model, [windows[i] for i in batch])
        expected = original(number).to(logits.device)
        if expected.shape != logits.shape:
            raise ModelError(
                f"the model predicts {logits.shape[-1]} tokens and its original {expected.shape[-1]}; expected one "
                "vocabulary; compare a model with the one it was made from"
            )
        for row, index in enumerate(batch):
            for part in position_chunks(logits[row]):
                p, q = (x[row, part].float().log_softmax(-1) for x in (expected, logits))
                target = targets[row, part, None]
                reference_nats[index] -= float(p.gather(-1, target).double().sum())
                nats[index] -= float(q.gather(-1, target).double().sum())
                kl[index] += float(_kl(p, q).double().sum())
                agreed[index] += int((p.argmax(-1) == q.argmax(-1)).sum())
        for sums in (reference_nats, nats, kl):
            finite(sums, batch)
    tokens = tuple(w.scored for w in windows)
    options: dict[str, int] = {"seed": seed, "resamples": resamples}
    return Comparison(
        reference=summarize(reference_nats, windows, size, **options),
        candidate=summarize(nats, windows, size, **options),
        divergence=Divergence(
            kl=ratio_estimate(kl, tokens, **options),
            agreement=ratio_estimate(agreed, tokens, **options),
            tokens=sum(tokens),
            windows=fingerprint(windows),
            window_tokens=tokens,
            window_kl=tuple(kl),
            window_agreed=tuple(agreed),
        ),
    )


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of log-probabilities (positions, vocabulary) to (positions,); tokens of probability zero add nothing."""
    weight = p.exp()
    return torch.where(weight > 0, weight * (p - q), 0.0).sum(-1)


def _temporary(folder: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="mopeq-logits-", dir=folder)
    except OSError as error:
        raise OutputError(f"cannot keep logits in {folder}: {error.strerror}; expected a folder to write to") from error


def _keep(folder: Path, number: int, logits: Tensor) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({"logits": logits.cpu().contiguous()}, folder / f"{number}.safetensors")
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot keep the original's logits in {folder}: {error}; expected free space; free some or give none"
        ) from error


def _kept(folder: Path, number: int) -> Tensor:
    from safetensors.torch import load_file

    return load_file(folder / f"{number}.safetensors")["logits"]
