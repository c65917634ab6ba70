"""The main job on the bundled model: measure once, pack at several sizes, load each back, compare, report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mopeq.allocate import allocate, predicted
from mopeq.data.samples import bundled_model, bundled_text
from mopeq.data.text import text_windows
from mopeq.errors import OutputError
from mopeq.evaluate import Comparison, Evaluation, evaluate_many, paired_difference, resident_bytes
from mopeq.load import load, load_original
from mopeq.measure import Calibration, Prepared, measure_prepared, observed, open_model
from mopeq.pack import Packed, pack_model, run_record
from mopeq.precision import PrecisionMap
from mopeq.progress import Track, silent
from mopeq.report import render
from mopeq.stats import Stats, write_json

__all__ = ["Point", "Quickstart", "fresh_folder", "quickstart"]

MARK = "mopeq-quickstart.json"
CALIBRATION = Calibration(samples=64, length=256, batch_size=8, cost_share=1.0)
WINDOWS = 64
BITS = (2, 3, 4)
WIDE = (2, 3, 4, 5, 6)
COST = "fisher_error"


@dataclass(frozen=True)
class Point:
    """One model of the comparison: the original, a uniform one, or a mixed one."""

    name: str
    kind: str
    expert_bits: float
    bytes: int
    resident_bytes: int
    perplexity: float
    kl: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None
    top1: float | None = None
    predicted_loss: float | None = None


@dataclass(frozen=True)
class Quickstart:
    """What the quickstart found, and where it left it."""

    points: tuple[Point, ...]
    sentences: tuple[str, ...]
    tokens: int
    model: Path
    report: Path

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {**asdict(self), "model": str(self.model), "report": str(self.report)}


def quickstart(out: str | Path = "mopeq-quickstart", *, command: str = "", track: Track = silent) -> Quickstart:
    """Measure the bundled model once, pack it uniformly and mixed, load each back, and compare all with the original.

    Mixed models choose from 2, 3 and 4 bits, wide ones from 2 to 6; each has no more bytes than the uniform model of
    its number, or than halfway between two. ``out`` gets one folder for each model and a report; an earlier quickstart
    there is replaced, anything else is refused with :class:`OutputError`.
    """
    folder = fresh_folder(Path(out))
    prepared = observed(open_model(bundled_model()), CALIBRATION, dtype=torch.float32, track=track)
    metrics = ("frequency", "gate_mass", "inverse_norm", COST)
    inventory = prepared.inventory
    stats = measure_prepared(prepared, metrics, options=inventory.precisions(WIDE), track=track)
    packed = {}

    def pack(name: str, made: PrecisionMap) -> Packed:
        files = {"stats.json": stats.to_json()}
        packed[name] = pack_model(prepared, made, folder / name.replace(" ", "-"), files=files, track=track)
        return packed[name]

    narrow, wide = inventory.precisions(BITS), inventory.precisions(WIDE)
    uniform = [pack(f"uniform {p.bits}", PrecisionMap.uniform(inventory.experts, p)) for p in narrow]
    two, three, four = (made.bytes for made in uniform)
    sizes = {"mixed 2.5": (two + three) // 2, "mixed 3": three, "wide 3.5": (three + four) // 2, "wide 4": four}
    for name, budget in sizes.items():
        options = narrow if name.startswith("mixed") else wide
        pack(name, allocate(stats, budget=f"{budget}B", cost=COST, options=options))
    texts = [bundled_text(name).read_text(encoding="utf-8") for name in ("heldout_code.txt", "heldout_docs.txt")]
    windows = text_windows(texts, prepared.tokenizer, CALIBRATION.length, limit=WINDOWS)
    candidates = {name: partial(load, made.path, dtype=torch.float32) for name, made in packed.items()}
    judged = evaluate_many(prepared.model, candidates, windows, cache=folder, batch_size=8, track=track)
    resident = {name: resident_bytes(load(made.path)) for name, made in packed.items()}
    points = [_original(prepared, next(iter(judged.values())))]
    points += [_point(name, packed[name], judged[name], resident[name], stats) for name in packed]
    best = "mixed 3"
    home = packed[best].path
    _describe_home(home, prepared, packed[best], judged[best], resident[best], points, command)
    page = render(home, folder / "report.html")
    return Quickstart(tuple(points), _sentences(points, judged), judged[best].divergence.tokens, home, page)


def fresh_folder(folder: Path) -> Path:
    """An empty folder; what an earlier quickstart left in it is removed."""
    mark = folder / MARK
    if folder.exists() and any(folder.iterdir()) and not mark.is_file():
        raise OutputError(f"{folder} exists and was not made by mopeq quickstart; give another folder with -o")
    if mark.is_file():
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {folder}: {error.strerror}; give another folder with -o") from error
    write_json(mark, {"made_by": "mopeq quickstart", "note": "this folder is replaced by the next quickstart"})
    return folder


def _original(prepared: Prepared, seen: Comparison) -> Point:
    size = sum(path.stat().st_size for path in prepared.source.path.glob("*.safetensors"))
    resident = resident_bytes(load_original(prepared.source.path))
    return Point("original", "original", 16.0, size, resident, seen.reference.perplexity.value)


def _point(name: str, packed: Packed, seen: Comparison, resident: int, stats: Stats) -> Point:
    kl = seen.divergence.kl
    return Point(
        name=name,
        kind="uniform" if name.startswith("uniform") else "mixed",
        expert_bits=packed.inventory.expert_bits(packed.precisions),
        bytes=packed.bytes,
        resident_bytes=resident,
        perplexity=seen.candidate.perplexity.value,
        kl=kl.value,
        kl_low=kl.low,
        kl_high=kl.high,
        top1=seen.divergence.agreement.value,
        predicted_loss=predicted(stats, COST, packed.precisions),
    )


def _sentences(points: list[Point], judged: Mapping[str, Comparison]) -> tuple[str, ...]:
    """What the table says, in words that are true of its numbers."""
    by_name = {point.name: point for point in points}
    made = []
    for ours, theirs, levels in (("mixed 3", "uniform 3", BITS), ("wide 4", "uniform 4", WIDE)):
        mine, other = by_name[ours], by_name[theirs]
        difference = paired_difference(judged[theirs].divergence, judged[ours].divergence)
        sure = "beyond" if difference.excludes_zero else "within"
        made.append(
            f"{ours} ({levels[0]} to {levels[-1]} bits, {mine.bytes} bytes) has KL {mine.kl:.4f}; "
            f"{theirs} ({other.bytes} bytes) has {other.kl:.4f}; the difference is {sure} its 95 % interval."
        )
    return tuple(made)


def _describe_home(
    home: Path,
    prepared: Prepared,
    packed: Packed,
    seen: Comparison,
    resident: int,
    points: list[Point],
    command: str,
) -> None:
    """Leave in ``home/mopeq`` what the report reads."""
    evaluation = Evaluation(
        resident_bytes=resident,
        perplexity=seen.candidate,
        reference_perplexity=seen.reference,
        divergence=seen.divergence,
        info={"text": "bundled held-out text", "length": CALIBRATION.length, "command": command},
    )
    record = run_record(prepared, packed, "gptq", [command or "mopeq quickstart"], {"quantize": packed.seconds})
    frontier = {"format": "mopeq-frontier", "version": 1, "points": [asdict(point) for point in points]}
    write_json(home / "mopeq" / "evaluation.json", evaluation.to_json())
    write_json(home / "mopeq" / "run.json", record)
    write_json(home / "mopeq" / "frontier.json", frontier)
