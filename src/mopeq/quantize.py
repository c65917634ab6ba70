"""From a checkpoint and a map, or a budget, to a packed checkpoint that is compared with the original.

``quantize`` is the verb. Every step of it is noted in the journal of the unfinished folder, so that a run that was
killed can go on: layers measured, the map, layers packed. No step holds more of the model than one decoder layer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mopeq.align import ALIGNED, Alignment, align_folder, check_routers
from mopeq.allocate import COSTS, allocate, parse_budget
from mopeq.allocate.budget import check_budget, expert_budget, least_bytes
from mopeq.analyze import Map, check_request, here
from mopeq.autoload import callable_module
from mopeq.candidates import Stock, candidate_bytes, chosen
from mopeq.checkpoint import PackedWriter, Stored, read_manifest, restored
from mopeq.compensate import COMPENSATING, compensating, gain_of
from mopeq.data.text import text_windows
from mopeq.errors import DataError, InputError, OutputError
from mopeq.job import hashed, job_of
from mopeq.journal import Journal, difference, read_journal
from mopeq.layerwise import layerwise
from mopeq.load import load_source, load_tokenizer
from mopeq.measure import (
    Calibration,
    Prepared,
    calibrated,
    has_pictures,
    measure_streamed,
    measured_step,
    open_model,
    split_texts,
)
from mopeq.memory import Footprint, both_in_memory, footprint, slab_bytes, spilled_bytes
from mopeq.pack import (
    LayerTensors,
    Packed,
    check_method,
    pack_experts,
    pack_model,
    packed_step,
    run_record,
    write_packed,
)
from mopeq.precision import DEFAULT_REST, Precision, PrecisionMap
from mopeq.progress import Clock, Track, silent
from mopeq.quantizers import DATA_FREE, WHOLE
from mopeq.source import stored_bytes
from mopeq.spec import MoELayer
from mopeq.stats import Stats, read_json, write_json
from mopeq.stream import Shell, stored_dtype
from mopeq.trial import JUDGED_WINDOWS, Choice, compared, settled, tried

__all__ = ["Packed", "pack_model", "quantize", "require_new"]

TRIED = "try the map"
"""The step of the journal in which a map was tried on held-out text."""


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
    uniform_layers: bool = False,
    protect: bool = True,
    rest: Mapping[str, Precision] | None = None,
    outside: bool = False,
    dtype: torch.dtype | None = None,
    evaluated: bool = True,
    guard: bool | None = None,
    refine: int = 0,
    compensate: bool = False,
    align: Alignment | None = None,
    resume: bool = False,
    max_memory: int | None = None,
    command: str = "",
    recipe: str = "",
    across: Map = here,
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
        uniform_layers: allocate one precision for all experts of a layer, as other runtimes need (mopeq export).
        protect: give super-experts the most bits among the options (:mod:`mopeq.allocate.protect`).
        rest: precisions of the groups outside the experts, over the defaults.
        outside: with a budget, choose those that ``rest`` does not name too, in the same bytes (:mod:`mopeq.outside`).
        dtype: compute type of the original model.
        evaluated: compare the result with the original, if both fit in memory together; ``Packed.note`` says if not.
        guard: with a budget, pack the uniform map instead where the allocated one is not better on held-out text; None
            does it where the result is ``evaluated``. ``Packed.guard`` says what was found.
        refine: with a budget, exchanges of precisions to try on held-out text (:mod:`mopeq.refine`).
        compensate: quantize each layer on what the packed layers before it give, so that its experts make up for their
            errors (:mod:`mopeq.compensate`); for the methods of ``COMPENSATING``.
        align: fit routers to the original's after packing, kept where that helps on held-out text (:mod:`mopeq.align`);
            ``Packed.aligned`` says what came of it.
        resume: go on with what the same call left unfinished; the result is the same as without the interruption.
        max_memory: bytes that this process may have resident; None for what the machine has. Less than the least
            possible is an :class:`InputError` with the number needed.
        command: command line to record.
        recipe: named set of choices to record.
        across: works on the experts of a layer: here, or on a cluster (``mopeq.integrations.ray``).
        track: progress.
    """
    if sum(way is not None for way in (precisions, uniform, budget)) != 1:
        raise InputError("give one of a precision map, a uniform precision and a budget")
    if precisions is not None and rest:
        raise InputError('a map has its own precisions for the rest; edit "rest" in it, or leave out --rest')
    if outside and budget is None:
        raise InputError("precisions outside the experts are chosen within a budget, found none; leave out auto")
    if refine < 0 or (refine and uniform_layers) or ((guard or refine) and budget is None):
        raise InputError("guard and exchanges (not with uniform layers) are for a budget, 0 or more; leave them out")
    if compensate and method not in COMPENSATING:
        raise InputError(
            f"{method} cannot make up for errors of earlier layers, {' and '.join(COMPENSATING)} can; use that, or "
            f"--no-compensate"
        )
    check_method(method, [*(options or ()), *filter(None, [uniform]), *(precisions.histogram() if precisions else ())])
    if not resume:
        require_new(Path(out))
    elif align is not None:
        restored(out)
    calibration = calibration or Calibration()
    clock = Clock()
    free = set(DEFAULT_REST) - set(rest or {}) if outside else set()
    rest = {**DEFAULT_REST, **(rest or {})}
    opened = open_model(model)
    if align is not None:
        check_routers(opened.spec)
    training, heldout = split_texts(calibration, opened.source.path)
    options = options or opened.inventory.precisions()
    if budget is not None:
        check_budget(parse_budget(budget), opened.inventory, rest, least_bytes(opened.inventory, options))
        if cost not in COSTS:
            raise InputError(f"no cost {cost!r}; there are {', '.join(COSTS)}")
        check_request(opened.inventory, (cost,), options, method)
    if uniform is not None:
        precisions = PrecisionMap.uniform(opened.inventory.experts, uniform, rest)
    if precisions is not None:
        opened.inventory.check(precisions)
    guard = budget is not None and (evaluated if guard is None else guard)
    judged = evaluated or guard or refine > 0 or outside or align is not None
    if judged and not has_pictures(calibration):  # text that cannot be scored is found before hours of work
        try:
            text_windows(heldout, load_tokenizer(opened.source.path), calibration.length, limit=JUDGED_WINDOWS)
        except DataError as error:
            raise DataError(f"of the tenth of the data kept apart for comparing, {error}, or use --no-eval") from error
    if (calibration.modality_weight != 1 or calibration.balance) and budget is None and method in DATA_FREE:
        raise InputError(
            f"a modality weight or a balance does not enter {method} with a map; use gptq or a budget, or leave it out"
        )
    if budget is not None or method not in DATA_FREE or align is not None:
        opened = calibrated(opened, calibration, texts=training, track=track)
    plan = _Plan(
        opened, method, budget, precisions, tuple(options), cost, granularity, uniform_layers, protect, rest,
        calibration, dtype, max_memory, heldout, guard, refine, align, free,
        compensate,
    )  # fmt: skip
    slab_bytes(max_memory, plan.footprint)
    job = _job(plan, calibration, training)
    packed = _finished(Path(out), plan, job) if resume else None
    if packed is None:
        with PackedWriter(out, needed_bytes=plan.disk_bytes, job=job, resume=resume) as writer, writer.disk():
            packed = plan.carry_out(writer, clock, across, track)
        clock("quantize")
    packed = _aligned(packed, plan, clock, track)
    run = packed.path / "mopeq" / "run.json"
    if not run.exists():
        write_json(run, run_record(opened, packed, method, [command], clock.seconds, recipe))
    if evaluated and not (packed.path / "mopeq" / "evaluation.json").exists():
        if why := plan.too_large(packed.bytes):
            again = f"where there is more, mopeq eval {packed.path} --against {model} compares them"
            return replace(packed, note=f"not compared with the original: {why}; {again}")
        try:
            found = compared(opened, packed.path, heldout, calibration, dtype, track)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(
                f"interrupted while comparing; {out} is complete, mopeq eval {out} --against {model} compares it"
            ) from stop
        clock("evaluate")
        write_json(packed.path / "mopeq" / "evaluation.json", found.to_json())
        packed = replace(packed, evaluation=found)
        write_json(run, run_record(opened, packed, method, [command], clock.seconds, recipe))
    return packed


@dataclass(frozen=True)
class _Plan:
    """What is to be done, all of it known before any of it is."""

    opened: Prepared
    method: str
    budget: str | None
    precisions: PrecisionMap | None
    options: tuple[Precision, ...]
    cost: str
    granularity: str
    uniform_layers: bool
    protect: bool
    rest: Mapping[str, Precision]
    calibration: Calibration
    dtype: torch.dtype | None
    max_memory: int | None
    heldout: Sequence[Any]
    guard: bool
    refine: int
    align: Alignment | None
    free: Set[str]
    compensate: bool

    @property
    def footprint(self) -> Footprint:
        """What it takes of memory."""
        opened = self.opened
        need = footprint(
            opened.source, opened.spec, opened.batches,
            itemsize=self.itemsize, gradients=self._gradients, compensate=self.compensate,
        )  # fmt: skip
        return replace(need, expert=2 * need.expert) if self.method in WHOLE else need  # the one that is learned, too

    @property
    def _gradients(self) -> bool:
        return self.budget is not None and self.cost == "fisher_error"

    @property
    def itemsize(self) -> int:
        """Bytes of a value in the type that the model runs in."""
        return self.dtype.itemsize if self.dtype is not None else stored_dtype(self.opened.source).itemsize

    @property
    def disk_bytes(self) -> int:
        """What the checkpoint takes, and what is needed until it is finished: candidates and activations."""
        inventory = self.opened.inventory
        spilled = partial(spilled_bytes, self.opened.spec, self.opened.batches)
        stored = max(spilled(gradients=self._gradients), (1 + self.compensate) * spilled(gradients=False))
        if self.precisions is not None:
            return inventory.total_bytes(self.precisions) + stored
        most = expert_budget(parse_budget(self.budget or ""), inventory, self.rest)
        fixed = inventory.rest_bytes(self.rest) + inventory.kept_bytes + inventory.header_bytes
        return most + fixed + candidate_bytes(inventory, self.options) + stored

    def carry_out(self, writer: PackedWriter, clock: Clock, across: Map, track: Track) -> Packed:
        """All steps that are not done yet."""
        opened, journal = self.opened, writer.journal
        assert journal is not None
        if self.precisions is not None:
            tensors, release = self._tensors(self.precisions, journal, across, track)
            return write_packed(writer, opened, self.precisions, tensors, self.method, {}, track, release=release)
        if self.compensate:  # a model that cannot is refused before it is measured
            gain_of(Shell(opened.source, opened.spec, self.dtype), opened.batches[0])
        stats, fallbacks = measure_streamed(
            opened,
            ("frequency", "gate_mass", "output_peak", self.cost),
            options=self.options,
            quantizer=self.method,
            seed=self.calibration.seed,
            dtype=self.dtype,
            journal=journal,
            memory=slab_bytes(self.max_memory, self.footprint),
            across=across,
            track=track,
        )
        clock("measure")
        known = journal.done("allocate")
        if known is None:
            known = {"map": self._allocated(stats, self.budget or "", self.rest).to_json()}
            journal.record("allocate", known)
        clock("allocate")
        precisions = PrecisionMap.from_json(known["map"])
        if self.guard or self.refine or self.free:
            if (known := journal.done(TRIED)) is None:
                known = self._tried(journal, precisions, stats, track)
                journal.record(TRIED, known)
            precisions = PrecisionMap.from_json(known["map"])
            clock("try")

        def taken(layer: MoELayer, short: list[str]) -> Iterator[Stored]:
            short += [unit for unit in fallbacks if unit.rsplit(".", 2)[0] == str(layer.index)]
            return chosen(Stock(journal, measured_step(layer), opened.source, layer), precisions)

        # what is learned of whole experts, or of packed layers, is no candidate: those were made for costs
        again = self.compensate or self.method in WHOLE
        codes, release = self._tensors(precisions, journal, across, track) if again else (taken, None)
        files = {"stats.json": stats.to_json()}
        packed = write_packed(writer, opened, precisions, codes, self.method, files, track, release=release)
        return replace(packed, guard=known.get("sentence", ""))

    def _allocated(self, stats: Stats, budget: str, rest: Mapping[str, Precision]) -> PrecisionMap:
        return allocate(
            stats, method="knapsack", budget=budget, cost=self.cost, options=self.options, granularity=self.granularity,
            uniform_layers=self.uniform_layers, protect=self.protect, rest=rest,
        )  # fmt: skip

    def _tried(self, journal: Journal, made: PrecisionMap, stats: Stats, track: Track) -> dict[str, Any]:
        """The map to pack, tried out where there is memory and text for it, and a sentence that says why it is it."""
        outside = bool(self.free)
        what = " and ".join(["given other precisions outside the experts"] * outside + ["refined"] * bool(self.refine)
                            + ["compared with uniform precision"] * self.guard)  # fmt: skip
        rounded = self.opened.inventory.rest_bytes({}) if outside else 0
        if why := self.too_large(self.opened.inventory.total_bytes(made) + rounded):
            return {"map": made.to_json(), "sentence": f"the map was not {what}: {why}"}
        layers, source = self.opened.spec.layers, self.opened.source
        units = {layer.index: Stock(journal, measured_step(layer), source, layer).unit for layer in layers}
        original, cache = load_source(source, self.dtype), journal.folder if self.refine or outside else None
        try:
            with tried(
                original, self.opened, units, self.heldout, self.calibration, outside=outside, cache=cache, track=track
            ) as judge:
                choice = Choice(stats, self.cost, self.options, self.granularity, self.budget or "", self.free,
                                partial(self._allocated, stats) if outside else None)  # fmt: skip
                found = settled(made, self.opened, choice, judge, self.refine, self.guard, track)
        except DataError as error:
            return {"map": made.to_json(), "sentence": f"the map was not {what}: {error}"}
        return {"map": found.precisions.to_json(), "sentence": found.sentence}

    def too_large(self, packed_bytes: int) -> str:
        """Why the original and a packed model of that size cannot be compared here; empty if they can."""
        return both_in_memory(self.opened.inventory, self.itemsize, packed_bytes, self.max_memory)

    def _tensors(
        self, precisions: PrecisionMap, journal: Journal, across: Map, track: Track
    ) -> tuple[LayerTensors, Callable[[], None] | None]:
        """What packs a layer with a map, and lets go of what was needed for that."""
        opened, memory = self.opened, slab_bytes(self.max_memory, self.footprint)
        pack = partial(pack_experts, opened, memory=memory, across=across, track=track)
        make = compensating if self.compensate else layerwise
        return make(opened, precisions, journal, self.dtype, self.method, pack, track)


def _job(plan: _Plan, calibration: Calibration, texts: Sequence[Any]) -> dict[str, Any]:
    """What a run is: two runs of the same job make the same checkpoint."""
    used: dict[str, Any] = {}
    if plan.opened.batches:
        used = {**asdict(calibration), "data": calibration.data or "bundled", "text": _digest(calibration, texts)}
    asked = {
        "budget": plan.budget,
        "map": None if plan.precisions is None else hashed(plan.precisions.to_json()),
        "method": plan.method,
        **({"options": [str(p) for p in plan.options], "cost": plan.cost} if plan.budget is not None else {}),
        **(
            {"granularity": plan.granularity, "guard": plan.guard, "refine": plan.refine}
            if plan.budget is not None
            else {}
        ),
        **({"uniform_layers": True} if plan.uniform_layers and plan.budget is not None else {}),
        **({"compensate": True} if plan.compensate else {}),
        **({} if plan.protect else {"protect": False}),
        **({"outside": sorted(plan.free)} if plan.free else {}),
        **({} if plan.align is None else {"align": asdict(plan.align)}),
        "rest": {group: str(p) for group, p in sorted(plan.rest.items())},
        "calibration": used,
        "dtype": None if plan.dtype is None else str(plan.dtype),
    }
    return job_of(plan.opened.source, **asked)


def _digest(calibration: Calibration, texts: Sequence[Any]) -> str:
    """Of the data: of its text, or of conversations, whose images are files or in the file, with their pixels."""
    if not has_pictures(calibration):
        return hashed(list(texts))
    return hashed([[message["role"], part.get("text") or hashlib.sha256(part["image"].tobytes()).hexdigest()]
                  for said in texts for message in said for part in message["content"]])  # fmt: skip


def _finished(out: Path, plan: _Plan, job: Mapping[str, Any]) -> Packed | None:
    """The checkpoint that the same job has finished, if it has; :class:`OutputError` where another job has."""
    found = read_journal(out)
    if found is None:
        return None
    if other := difference(found[0], json.loads(json.dumps(job))):
        raise OutputError(f"{out} is finished, and was made with {other}; give a new folder with -o, or remove it")
    manifest = read_manifest(out)
    source = plan.opened.source
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    original = sum(stored_bytes(source, key) for key in source.shapes)
    packed = (found[1][packed_step(layer)] for layer in plan.opened.spec.layers)
    fallbacks = tuple(unit for facts in packed for unit in facts["fallbacks"])
    sentence = found[1].get(TRIED, {}).get("sentence", "")
    return Packed(out, manifest.precisions, size, original, 0.0, fallbacks, manifest.inventory, guard=sentence)


def _aligned(packed: Packed, plan: _Plan, clock: Clock, track: Track) -> Packed:
    """The finished checkpoint with its routers aligned, if that was asked for and is not done yet."""
    if plan.align is None:
        return packed
    if (done := packed.path / ALIGNED).is_file():
        return replace(packed, aligned=read_json(done)["sentence"])
    if why := plan.too_large(packed.bytes):
        return replace(packed, aligned=f"routers as they were: {why}")
    try:
        found = align_folder(
            plan.opened, packed.path, plan.heldout, plan.calibration, plan.align, plan.dtype, track
        ).sentence
    except DataError as error:
        found = f"routers as they were: {error}"
    clock("align")
    return replace(packed, aligned=found)


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
