"""The main job on the bundled vision-language model: calibrate with images, pack at several sizes, ask questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mopeq.allocate import allocate, predicted
from mopeq.data.conversations import question_batches
from mopeq.data.samples import bundled_images, bundled_vlm
from mopeq.evaluate import Evaluation, TaskScore, resident_bytes
from mopeq.evaluate.answers import Answers, answer_logits, judge_answers
from mopeq.evaluate.bootstrap import Estimate
from mopeq.evaluate.vqa import read_table, scores
from mopeq.load import load, load_original, load_processor
from mopeq.measure import Calibration, Prepared, measure_prepared, observed, open_model
from mopeq.pack import Packed, pack_model, run_record
from mopeq.precision import PrecisionMap
from mopeq.progress import Track, silent
from mopeq.quickstart import COST, fresh_folder
from mopeq.report import render
from mopeq.stats import write_json

__all__ = ["VisionPoint", "VisionQuickstart", "quickstart_vlm"]

BITS = (2, 3, 4)
WIDE = (2, 3, 4, 5, 6)
CONVERSATIONS = 256
BATCH = 16
BEST = "mixed 3"


@dataclass(frozen=True)
class VisionPoint:
    """One model of the comparison; ``accuracy`` over all questions, ``categories`` of each kind, shares from 0 to 1."""

    name: str
    kind: str
    expert_bits: float
    bytes: int
    resident_bytes: int
    accuracy: Estimate
    categories: Mapping[str, Estimate]
    kl: Estimate | None = None
    predicted_loss: float | None = None


@dataclass(frozen=True)
class VisionQuickstart:
    """What the quickstart found, and where it left it."""

    points: tuple[VisionPoint, ...]
    sentences: tuple[str, ...]
    questions: int
    model: Path
    report: Path

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {**asdict(self), "model": str(self.model), "report": str(self.report)}


def quickstart_vlm(
    out: str | Path = "mopeq-quickstart", *, command: str = "", track: Track = silent
) -> VisionQuickstart:
    """Measure the bundled vision-language model once, on conversations with images, pack it uniformly and mixed, load
    each back, and put the held-out questions to all of them.

    Tower and projector stay in 16 bits. Mixed models choose from 2, 3 and 4 bits, the wide one from 2 to 6; each has no
    more bytes than the uniform model of its number, or than halfway between two. ``out`` is treated as by
    :func:`mopeq.quickstart.quickstart`.
    """
    folder = fresh_folder(Path(out))
    calibration = Calibration(
        str(bundled_images("calibration.jsonl")), samples=CONVERSATIONS, batch_size=BATCH, cost_share=1.0
    )
    prepared = observed(open_model(bundled_vlm()), calibration, dtype=torch.float32, track=track)
    inventory = prepared.inventory
    narrow, wide = inventory.precisions(BITS), inventory.precisions(WIDE)
    stats = measure_prepared(prepared, ("frequency", "gate_mass", COST), options=wide, track=track)
    packed: dict[str, Packed] = {}

    def pack(name: str, made: PrecisionMap) -> Packed:
        files = {"stats.json": stats.to_json()}
        packed[name] = pack_model(prepared, made, folder / name.replace(" ", "-"), files=files, track=track)
        return packed[name]

    two, three, four = (pack(f"uniform {p.bits}", PrecisionMap.uniform(inventory.experts, p)).bytes for p in narrow)
    for name, budget, options in (
        ("mixed 2.5", (two + three) // 2, narrow),
        (BEST, three, narrow),
        ("wide 4", four, wide),
    ):
        pack(name, allocate(stats, budget=f"{budget}B", cost=COST, options=options))

    table = read_table(bundled_images("heldout.tsv"))
    batches = question_batches(table.questions, load_processor(prepared.source.path), 50)
    categories = [question.category for question in table.questions]
    expected = answer_logits(prepared.model, batches, track)
    judged = {"original": judge_answers(expected, batches, categories)}
    for name, made in packed.items():
        found = answer_logits(load(made.path, dtype=torch.float32), batches, track)
        judged[name] = judge_answers(found, batches, categories, expected)
    resident = {name: resident_bytes(load(made.path)) for name, made in packed.items()}
    points = [_original(prepared, judged["original"])]
    for name, made in packed.items():
        loss = predicted(stats, COST, made.precisions)
        points.append(_point(name, made, judged[name], resident[name], loss))
    home = packed[BEST].path
    _describe_home(home, prepared, packed[BEST], scores(table, judged[BEST], judged["original"]), points, command)
    page = render(home, folder / "report.html")
    return VisionQuickstart(tuple(points), _sentences(packed, judged), len(table.questions), home, page)


def _original(prepared: Prepared, seen: Answers) -> VisionPoint:
    size = sum(path.stat().st_size for path in prepared.source.path.glob("*.safetensors"))
    resident = resident_bytes(load_original(prepared.source.path))
    return VisionPoint("original", "original", 16.0, size, resident, seen.accuracy(), seen.by_category())


def _point(name: str, packed: Packed, seen: Answers, resident: int, loss: float) -> VisionPoint:
    return VisionPoint(
        name=name,
        kind="uniform" if name.startswith("uniform") else "mixed",
        expert_bits=packed.inventory.expert_bits(packed.precisions),
        bytes=packed.bytes,
        resident_bytes=resident,
        accuracy=seen.accuracy(),
        categories=seen.by_category(),
        kl=seen.divergence(),
        predicted_loss=loss,
    )


def _sentences(packed: Mapping[str, Packed], judged: Mapping[str, Answers]) -> tuple[str, ...]:
    """What the table says, in words that are true of its numbers."""
    made = []
    for ours, theirs in ((BEST, "uniform 3"), ("wide 4", "uniform 4")):
        mine, other = judged[ours].divergence(), judged[theirs].divergence()
        sure = "beyond" if judged[theirs].kl_above(judged[ours]).excludes_zero else "within"
        made.append(
            f"{ours} ({packed[ours].bytes} bytes) has KL {mine.value:.2e} on the answers; {theirs} "
            f"({packed[theirs].bytes} bytes) has {other.value:.2e}; the difference is {sure} its 95 % interval."
        )
    return tuple(made)


def _describe_home(
    home: Path,
    prepared: Prepared,
    packed: Packed,
    tasks: tuple[TaskScore, ...],
    points: list[VisionPoint],
    command: str,
) -> None:
    """Leave in ``home/mopeq`` what the report reads."""
    resident = next(point.resident_bytes for point in points if point.name == BEST)
    info = {"text": "bundled held-out questions", "command": command}
    frontier = [
        {
            "name": point.name,
            "kind": point.kind,
            "expert_bits": point.expert_bits,
            "bytes": point.bytes,
            "resident_bytes": point.resident_bytes,
            "predicted_loss": point.predicted_loss,
            **({} if point.kl is None else {"kl": point.kl.value, "kl_low": point.kl.low, "kl_high": point.kl.high}),
        }
        for point in points
    ]
    record = run_record(prepared, packed, "gptq", [command or "mopeq quickstart --vlm"], {"quantize": packed.seconds})
    write_json(home / "mopeq" / "evaluation.json", Evaluation(resident, tasks=tasks, info=info).to_json())
    write_json(home / "mopeq" / "run.json", record)
    write_json(home / "mopeq" / "frontier.json", {"format": "mopeq-frontier", "version": 1, "points": frontier})
