"""What routing is worth: each variant, the router, chance, oracles, the ensemble and the original on the same inputs.

Everything is a mean loss over inputs with a 95 % interval that resamples them; differences are paired. ``random`` is
the exact mean over variants, no draw. ``oracle`` takes the least loss of each input after seeing it: part of what it
gains is noise that no router can know. ``best per domain`` takes the best variant of each domain, also in hindsight:
what a router that recognizes domains, and nothing finer, could reach. The ensemble averages the logits of all variants
and costs as much as running them all.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.data.text import Window, check_length
from mopeq.errors import DataError
from mopeq.evaluate import Estimate
from mopeq.evaluate.bootstrap import difference_estimate, ratio_estimate
from mopeq.evaluate.perplexity import batched, logits_of, score_windows
from mopeq.moqe.language import check_unseen, prompted_windows, prompts_of, variant_losses
from mopeq.moqe.model import Moqe
from mopeq.moqe.pool import load_variant
from mopeq.moqe.store import weight_bytes
from mopeq.progress import Track, silent

__all__ = ["Judged", "Latency", "Row", "Scores", "compare", "judge", "measure_latency"]

ALL = "all"


@dataclass(frozen=True)
class Scores:
    """Mean losses of inputs: ``variants`` (n, variants), ``routes`` int64 (n,), and others (n,) by name.

    ``weights`` (n,): scored tokens of each input, or ones; ``domains``: where each input is from.
    """

    names: tuple[str, ...]
    variants: Tensor
    routes: Tensor
    weights: Tensor
    domains: tuple[str, ...]
    others: Mapping[str, Tensor]

    def rows(self) -> dict[str, Tensor]:
        """The loss of every input by every way of choosing."""
        every = torch.arange(len(self.routes))
        made = {name: self.variants[:, i] for i, name in enumerate(self.names)}
        made["routed"] = self.variants[every, self.routes]
        made["random"] = self.variants.mean(1)
        made["oracle"] = self.variants.amin(1)
        if len(set(self.domains)) > 1:
            made["best per domain"] = self.variants[every, self._best_of_domain()]
        return made | dict(self.others)

    def _best_of_domain(self) -> Tensor:
        best = torch.zeros(len(self.routes), dtype=torch.int64)
        for domain in set(self.domains):
            inside = torch.tensor([found == domain for found in self.domains])
            weight = self.weights[inside].unsqueeze(1)
            best[inside] = int((self.variants[inside] * weight).sum(0).argmin())
        return best


@dataclass(frozen=True)
class Row:
    """One way of choosing in one domain: mean loss, and its exponential (perplexity, of text)."""

    name: str
    loss: Estimate
    perplexity: Estimate


@dataclass(frozen=True)
class Latency:
    """Median over pairs of runs, one after the other, of one prompt: with the router, and its variant alone."""

    prompt_tokens: int
    new_tokens: int
    pairs: int
    alone_seconds: float
    routed_seconds: float
    overhead: float
    """Median of ``routed / alone - 1`` of the pairs."""
    router_seconds: float
    """Median time of the choice alone."""


@dataclass(frozen=True)
class Judged:
    """``rows`` and ``differences`` by domain, ``all`` the first; ``usage``: share of inputs that each variant got."""

    best: Mapping[str, str]
    """The best single variant of each domain, in hindsight."""
    rows: Mapping[str, tuple[Row, ...]]
    differences: Mapping[str, Mapping[str, Estimate]]
    usage: Mapping[str, tuple[float, ...]]
    inputs: Mapping[str, int]
    bytes: Mapping[str, int]
    latency: tuple[Latency, ...] = ()
    info: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {"format": "mopeq-moqe-evaluation", "version": 1, **asdict(self)}

    @property
    def sentence(self) -> str:
        """Whether routing beats the best single variant on all inputs, in words that are true of the numbers."""
        gap, room = (self.differences[ALL][f"{name} - best single"] for name in ("routed", "oracle"))
        best = self.best[ALL]
        numbers = f"{gap.value:+.4f} nats [{gap.low:+.4f}, {gap.high:+.4f}]"
        if gap.excludes_zero and gap.value < 0:
            return f"Routing beats {best}, the best single variant, by {numbers}; the oracle by {room.value:+.4f}."
        if gap.excludes_zero:
            return f"Routing is worse than {best} alone, by {numbers}: use {best}."
        return (
            f"Routing does not differ from {best} alone beyond chance ({numbers}); the oracle, which sees the answer, "
            f"gains {room.value:+.4f}: use {best} unless more text says otherwise."
        )


def compare(scores: Scores, sizes: Mapping[str, int], *, seed: int = 0, **facts: Any) -> Judged:
    """The tables of one set of scores. ``sizes``: bytes of each way; ``facts``: further fields of :class:`Judged`."""
    rows, differences, usage, inputs, bests = {}, {}, {}, {}, {}
    found = scores.rows()
    domains = list(dict.fromkeys(scores.domains))
    for domain in [ALL, *(domains if len(domains) > 1 else [])]:
        inside = torch.tensor([domain in (ALL, name) for name in scores.domains])
        counts = [int(w) for w in scores.weights[inside].tolist()]
        totals = {name: (loss[inside] * scores.weights[inside]).tolist() for name, loss in found.items()}
        best = min(scores.names, key=lambda name: math.fsum(totals[name]))
        estimates = {name: ratio_estimate(total, counts, seed=seed) for name, total in totals.items()}
        rows[domain] = tuple(Row(name, made, made.through(math.exp)) for name, made in estimates.items())
        pairs = [(name, best, "best single") for name in found if name not in scores.names]
        pairs += [("routed", other, other) for other in ("random", *scores.others)]
        differences[domain] = {
            f"{name} - {label}": difference_estimate(totals[name], totals[other], counts, seed=seed)
            for name, other, label in pairs
        }
        bests[domain] = best
        inputs[domain] = len(counts)
        usage[domain] = tuple((scores.routes[inside] == i).double().mean().item() for i in range(len(scores.names)))
    return Judged(bests, rows, differences, usage, inputs, dict(sizes), **facts)


def judge(
    opened: Moqe,
    texts: Mapping[str, Sequence[str]],
    *,
    prompt: int = 64,
    length: int = 192,
    limit: int | None = None,
    beside: Mapping[str, str | Path] | None = None,
    ensemble: bool = True,
    pairs: int = 15,
    new_tokens: int = 32,
    batch_size: int = 8,
    seed: int = 0,
    track: Track = silent,
) -> Judged:
    """Judge a set on documents by domain, none of which calibrated a variant.

    Args:
        opened: the set with its router.
        texts: documents of each domain.
        prompt: tokens that the router reads of each window.
        length: tokens of a window; those after the prompt are scored.
        limit: windows of each domain, evenly spread; None takes all.
        beside: other models of the same tokenizer to score, by name: the original, a variant of the set's bytes ...
        ensemble: score the mean of all variants' logits; holds them all in memory.
        pairs: of runs that time the router; 0 leaves that out.
        new_tokens: decoded in such a run.
        batch_size: windows that are run together.
        seed: of the bootstrap.
        track: progress.
    """
    windows: list[Window] = []
    domains: list[str] = []
    for domain, documents in texts.items():
        if domain == ALL:
            raise DataError(f"a domain is named {ALL!r}, as the table's first part; rename its file")
        check_unseen(opened.made, documents)
        found = prompted_windows(documents, opened.tokenizer, prompt, length)
        if limit is not None and limit < len(found):
            found = [found[i * len(found) // limit] for i in range(limit)]
        windows += found
        domains += [domain] * len(found)
    check_length(opened.pool(opened.made.names[0]), length)
    routes = [opened.made.names.index(name) for w in windows for name in opened.route(prompts_of([w]))]
    weights = torch.tensor([window.scored for window in windows], dtype=torch.float64)
    losses = variant_losses(opened, windows, batch_size=batch_size, track=track)
    others = {}
    sizes = {variant.name: variant.bytes for variant in opened.made.variants}
    router_bytes = (opened.made.path / "router" / "router.safetensors").stat().st_size
    sizes |= dict.fromkeys(("routed", "random", "oracle", "best per domain"), opened.made.bytes + router_bytes)
    if ensemble:
        others["ensemble"] = ensemble_losses(opened, windows, batch_size=batch_size, track=track)
        sizes["ensemble"] = opened.made.bytes
    for name, folder in (beside or {}).items():
        other = load_variant(Path(folder), opened.dtype)
        nats = score_windows(other, windows, batch_size=batch_size, track=track)
        others[name] = torch.tensor(nats, dtype=torch.float64) / weights
        sizes[name] = weight_bytes(Path(folder))
    latency: tuple[Latency, ...] = ()
    if pairs:
        latency = tuple(
            measure_latency(opened, prompts_of(windows), new, pairs=pairs, track=track) for new in (1, new_tokens)
        )
    scores = Scores(opened.made.names, losses, torch.tensor(routes), weights, tuple(domains), others)
    return compare(scores, sizes, seed=seed, latency=latency, info={"prompt": prompt, "length": length})


def ensemble_losses(opened: Moqe, windows: Sequence[Window], *, batch_size: int = 8, track: Track = silent) -> Tensor:
    """Mean nats of each window by the mean of all variants' logits: float64 (windows,)."""
    made = torch.zeros(len(windows), dtype=torch.float64)
    batches = batched(windows, batch_size)
    for batch in track(batches, "ensemble", len(batches)):
        part = [windows[i] for i in batch]
        mean: Tensor | None = None
        for name in opened.made.names:
            logits, targets = logits_of(opened.pool(name), part)
            scaled = logits.float() / len(opened.made.names)
            mean = scaled if mean is None else mean.add_(scaled)
        assert mean is not None
        picked = mean.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        made[batch] = -picked.double().mean(-1).cpu()
    return made


def measure_latency(
    opened: Moqe, prompts: Sequence[Tensor], new_tokens: int, *, pairs: int = 15, track: Track = silent
) -> Latency:
    """Time prompts through the router and, beside it, through their variant without; the first pair does not count."""
    alone, routed, choice = [], [], []
    for number in track(range(pairs + 1), f"latency, {new_tokens} new tokens", pairs + 1):
        ids = prompts[number % len(prompts)].unsqueeze(0)
        started = time.perf_counter()
        (name,) = opened.route([ids[0]])
        chosen = time.perf_counter() - started
        opened.pool(name)  # in memory before either is timed

        def with_router(ids: Tensor = ids) -> None:
            _decode(opened.pool(opened.route([ids[0]])[0]), ids, new_tokens)

        def without(name: str = name, ids: Tensor = ids) -> None:
            _decode(opened.pool(name), ids, new_tokens)

        times = {}
        for run in (with_router, without) if number % 2 else (without, with_router):
            started = time.perf_counter()
            run()
            times[run] = time.perf_counter() - started
        if number:
            alone.append(times[without])
            routed.append(times[with_router])
            choice.append(chosen)
    ratios = [r / a - 1 for r, a in zip(routed, alone, strict=True)]
    middle = statistics.median
    length = int(middle(len(prompt) for prompt in prompts))
    return Latency(length, new_tokens, pairs, middle(alone), middle(routed), middle(ratios), middle(choice))


def _decode(model: Any, ids: Tensor, new_tokens: int) -> None:
    """Read a prompt and add tokens greedily, with a cache."""
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True)
        for _ in range(new_tokens - 1):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
