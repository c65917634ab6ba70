"""Maps tried before one is packed: on text kept apart, with the candidates on disk, nothing written.

:class:`Trial` is the original with its experts at a map's precisions; all other weights are the original's own.
:func:`guarded` compares a map with the uniform one of the same budget and keeps it only where it is better by more
than the comparison's interval.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mopeq.allocate import predicted, uniform_map
from mopeq.checkpoint import linear_precisions
from mopeq.data.conversations import conversation_batches
from mopeq.data.text import Window, sliding_windows, token_stream, window_batches
from mopeq.errors import BudgetError, DataError
from mopeq.evaluate import Divergence, Evaluation, evaluate, paired_difference
from mopeq.evaluate.answers import evaluate_answers
from mopeq.evaluate.divergence import judging
from mopeq.kernels.layout import GroupLayout
from mopeq.load import load, load_processor, load_source, load_tokenizer
from mopeq.measure import Calibration, Prepared, has_pictures
from mopeq.outside import shared_out
from mopeq.pack import round_linear
from mopeq.precision import GROUPS, LEFT_OUT, Precision, PrecisionMap
from mopeq.progress import Track, silent
from mopeq.refine import refined
from mopeq.runtime.experts import MixedExperts, Units, fill_experts, pack_experts
from mopeq.runtime.packed import prepare
from mopeq.spec import LinearRef
from mopeq.stats import Stats

__all__ = [
    "JUDGED_WINDOWS",
    "Choice",
    "Judge",
    "Trial",
    "Verdict",
    "compared",
    "guarded",
    "judged",
    "settled",
    "spare_batches",
    "spare_windows",
    "tried",
]

JUDGED_WINDOWS = 32
"""Windows of held-out text on which a new checkpoint is compared with its original, and as many to try maps on."""
LEAST_WINDOWS = 8
"""Fewer windows than this decide nothing."""
SAME_BYTES = 0.98
"""Share of a map's bytes from which on another one counts as equally large."""

Judge = Callable[[PrecisionMap], Divergence]
"""How far a map takes the model from its original."""


class Trial:
    """The original with packed experts in it: ``take`` gives it those of a map, and changes only what differs.

    units: for each MoE layer, its packed candidates. outside: round matrices outside the experts too, as packing does;
    else they are the original's. Memory: the packed experts of one map, and what is rounded outside them.
    """

    def __init__(
        self, original: nn.Module, opened: Prepared, units: Mapping[int, Units], outside: bool = False
    ) -> None:
        shared: dict[int, Any] = {id(t): t for t in chain(original.parameters(), original.buffers())}
        self.model = copy.deepcopy(original, shared)
        self.opened, self.units, self.outside = opened, units, outside
        self._rounded: dict[LinearRef, Precision] = {}

    def take(self, precisions: PrecisionMap) -> nn.Module:
        """The model with its experts at these precisions."""
        if self.outside:
            self._round(precisions)
        for layer in self.opened.spec.layers:
            module: Any = self.model.get_submodule(layer.module)
            shapes = self.opened.inventory.layers[layer.index]
            layouts = {g: GroupLayout(precisions.experts[g][layer.index], shapes.matrices(g)) for g in GROUPS}
            before = module.mopeq_layouts if isinstance(module, MixedExperts) else {}
            changed = [g for g in GROUPS if g not in before or before[g].precisions != layouts[g].precisions]
            if not before:
                pack_experts(module, layer.index, layouts)
            elif changed:
                module.convert("plain")
                module.mopeq_layouts = layouts
            for group in changed:
                fill_experts(module, group, self.units[layer.index])
        prepare(self.model)
        return self.model

    def _round(self, precisions: PrecisionMap) -> None:
        for ref, precision in linear_precisions(self.opened.spec, precisions).items():
            if self._rounded.get(ref) == precision:
                continue
            round_linear(self.model, self.opened.source, ref, precision)
            self._rounded[ref] = precision


@contextmanager
def tried(
    original: nn.Module,
    opened: Prepared,
    units: Mapping[int, Units],
    heldout: Sequence[Any],
    calibration: Calibration,
    *,
    outside: bool = False,
    cache: Path | None = None,
    track: Track = silent,
) -> Iterator[Judge]:
    """A function that judges maps on what :func:`spare_windows` leaves of the held-out data; ``outside``: see Trial.

    Raises :class:`DataError` where that is less than ``LEAST_WINDOWS`` windows or conversations.
    """
    trial = Trial(original, opened, units, outside)
    with judged(original, opened, heldout, calibration, cache=cache, track=track) as judge:
        yield lambda precisions: judge(trial.take(precisions))


@contextmanager
def judged(
    original: nn.Module,
    opened: Prepared,
    heldout: Sequence[Any],
    calibration: Calibration,
    *,
    cache: Path | None = None,
    track: Track = silent,
) -> Iterator[Callable[[nn.Module], Divergence]]:
    """A function that judges models on what :func:`spare_batches` has of the held-out data. Raises as that does."""
    if has_pictures(calibration):
        batches = spare_batches(opened, heldout, calibration)
        yield lambda model: _known(evaluate_answers(original, model, batches, track=track))
        return
    windows = spare_windows(heldout, opened.tokenizer, calibration.length)
    with judging(original, windows, cache=cache, batch_size=calibration.batch_size, track=track) as judge:
        yield lambda model: judge(model, "try a map").divergence


def spare_batches(
    opened: Prepared, heldout: Sequence[Any], calibration: Calibration
) -> Sequence[Mapping[str, torch.Tensor]]:
    """What is left of the held-out data beside the final comparison, as a model takes it.

    Raises :class:`DataError` where that is less than ``LEAST_WINDOWS`` windows or conversations.
    """
    if not has_pictures(calibration):
        windows = spare_windows(heldout, opened.tokenizer, calibration.length)
        return window_batches(windows, calibration.batch_size)
    spare = heldout[JUDGED_WINDOWS:][:JUDGED_WINDOWS]
    _check(len(spare), "conversations")
    processor = load_processor(opened.source.path)
    return conversation_batches(spare, processor, samples=len(spare), batch_size=calibration.batch_size, seed=0)


def _known(found: Any) -> Divergence:
    divergence: Divergence = found.divergence
    return divergence


def spare_windows(texts: Sequence[str], tokenizer: Any, length: int, limit: int = JUDGED_WINDOWS) -> list[Window]:
    """Windows of held-out text beside those that the final comparison takes, evenly spread."""
    windows = sliding_windows(token_stream(texts, tokenizer), length)
    judged = {i * len(windows) // limit for i in range(limit)} if limit < len(windows) else range(len(windows))
    spare = [window for i, window in enumerate(windows) if i not in judged]
    _check(len(spare), f"windows of {length} tokens")
    count = min(limit, len(spare))
    return [spare[i * len(spare) // count] for i in range(count)]


def _check(count: int, what: str) -> None:
    if count < LEAST_WINDOWS:
        raise DataError(
            f"the data kept apart have {count} {what} beside those of the final comparison; expected at least "
            f"{LEAST_WINDOWS} to judge by; give more data, or use --no-guard, no --align and no --rest auto"
        )


def compared(
    opened: Prepared,
    packed: Path,
    heldout: Sequence[Any],
    calibration: Calibration,
    dtype: torch.dtype | None,
    track: Track,
) -> Evaluation:
    """The packed model, as a user will load it, beside the original on text that neither was calibrated on."""
    path = opened.source.path
    original = opened.model if opened.model is not None else load_source(opened.source, dtype)
    small = load(packed, dtype=original.dtype)
    if has_pictures(calibration):
        batches = conversation_batches(
            heldout[:JUDGED_WINDOWS],
            load_processor(path),
            samples=JUDGED_WINDOWS,
            batch_size=calibration.batch_size,
            seed=0,
        )
        return evaluate_answers(original, small, batches, track=track)
    tokenizer = opened.tokenizer or load_tokenizer(path)
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


@dataclass(frozen=True)
class Verdict:
    """The map to pack, and a sentence that says why it is that one."""

    precisions: PrecisionMap
    sentence: str


def guarded(made: PrecisionMap, opened: Prepared, options: Sequence[Precision], budget: str, judge: Judge) -> Verdict:
    """``made``, or the uniform map of most bytes within its budget where ``made`` is not better beyond the interval.

    A uniform map may be smaller than the budget: then ``made`` has to be worth its bytes, and the sentence says so.
    """
    inventory = opened.inventory
    try:
        uniform = uniform_map(inventory, [p for p in options if p != LEFT_OUT], budget, made.rest)
    except BudgetError:
        return Verdict(made, f"the map was not compared: no uniform precision fits {budget}")
    (level,) = uniform.histogram()
    if made.experts == uniform.experts:
        return Verdict(made, f"the map is uniform, {level} for every expert")
    sizes = [inventory.total_bytes(precisions) for precisions in (made, uniform)]
    mixed, plain = judge(made), judge(uniform)
    gain = paired_difference(mixed, plain)
    share = sizes[1] / sizes[0]
    size = "of the same size" if share >= SAME_BYTES else f"the largest that fits, {100 * (1 - share):.0f} % smaller"
    interval = "" if gain.low is None or gain.high is None else f" ({gain.low:+.4g} to {gain.high:+.4g})"
    seen = (
        f"on {len(mixed.window_tokens)} windows kept apart, KL {mixed.kl.value:.4g} against {plain.kl.value:.4g} of "
        f"uniform {level}, {size}; difference {gain.value:+.4g}{interval}"
    )
    if gain.excludes_zero and gain.value < 0:
        return Verdict(made, f"the map is better than uniform precision: {seen}")
    note = {**uniform.note, "in_place_of": {k: made.note[k] for k in ("method", "cost") if k in made.note}}
    sentence = f"uniform {level} in place of the map, which is not better: {seen}; --no-guard keeps the map"
    return Verdict(replace(uniform, note=note), sentence)


@dataclass(frozen=True)
class Choice:
    """What a map was chosen from, and within what.

    free: groups outside the experts whose precision is to be chosen, too, and again, what makes the map of a budget and
    of precisions outside the experts; None where these stand.
    """

    stats: Stats
    cost: str
    options: Sequence[Precision]
    granularity: str
    budget: str
    free: Collection[str] = ()
    again: Callable[[str, Mapping[str, Precision]], PrecisionMap] | None = None


def settled(
    made: PrecisionMap,
    opened: Prepared,
    choice: Choice,
    judge: Judge,
    exchanges: int,
    guard: bool,
    track: Track = silent,
) -> Verdict:
    """``made`` with what is outside the experts chosen (:func:`~mopeq.outside.shared_out`), if it is to be, after
    exchanges (:func:`~mopeq.refine.refined`), if any, and past the guard, if it is to be.
    """
    said = []
    if (again := choice.again) is not None:
        choice = replace(choice, budget=f"{opened.inventory.total_bytes(made)}B")
        loss, of_these_bytes = partial(predicted, choice.stats, choice.cost), partial(again, choice.budget)
        shared = shared_out(made, opened.inventory, choice.free, loss, of_these_bytes, judge, track)
        made = shared.precisions
        said.append(shared.sentence)
    if exchanges:
        found = refined(
            made,
            choice.stats,
            choice.cost,
            choice.options,
            judge,
            exchanges,
            granularity=choice.granularity,
            track=track,
        )
        made = found.precisions
        said.append(f"{found.taken} of {found.tried} exchanges taken, KL {found.before:.4g} to {found.after:.4g}")
    if guard:
        verdict = guarded(made, opened, choice.options, choice.budget, judge)
        made = verdict.precisions
        said.append(verdict.sentence)
    return Verdict(made, "; ".join(said))
