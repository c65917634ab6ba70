"""The demo with images: the bundled model answers, and its packed forms compare as the package claims."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open

from mopeq.checkpoint import verify
from mopeq.data.conversations import question_batches, read_questions
from mopeq.data.samples import bundled_images, bundled_vlm
from mopeq.evaluate.answers import answer_logits, judge_answers
from mopeq.load import load_original, load_processor
from mopeq.quickstart_vlm import quickstart_vlm
from mopeq.source import open_source


def test_quickstart_vlm(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    found = quickstart_vlm(folder, command="mopeq quickstart --vlm")
    points = {point.name: point for point in found.points}
    original, uniform, mixed = (points[name] for name in ("original", "uniform 3", "mixed 3"))
    questions = read_questions(bundled_images("heldout.tsv"))
    assert found.questions == len(questions)
    for category, share in original.categories.items():
        answers = [question.answer for question in questions if question.category == category]
        guess = max(answers.count(answer) for answer in set(answers)) / len(answers)
        assert share.low is not None
        said = f"{category} is answered by looking, not by the likeliest answer"
        assert share.low > guess + 0.3, said
    assert original.accuracy.value > 0.8
    assert mixed.bytes <= uniform.bytes
    kl = {name: point.kl.value for name, point in points.items() if point.kl is not None}
    assert kl["uniform 4"] < kl["uniform 3"] < kl["uniform 2"]
    tower = {key for key in open_source(bundled_vlm()).shapes if key.startswith(("vision.", "projector."))}
    for name in points.keys() - {"original"}:
        packed = folder / name.replace(" ", "-")
        verify(packed)
        types = dict[str, str]()
        for path in packed.glob("*.safetensors"):
            with safe_open(path, "pt") as stored:
                types |= {key: stored.get_slice(key).get_dtype() for key in stored.keys()}  # noqa: SIM118
        assert {types[key] for key in tower} == {"BF16"}, "tower and projector stay as they were"
    page = found.report.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    for unit in (f"{layer}.{expert}" for layer in range(3) for expert in range(16)):
        assert len(re.findall(rf"<title>{re.escape(unit)}: \d bits", page)) == 2, (
            "heat maps of gate and up, and of down"
        )
    assert "Frequency of image tokens" in page


def test_answers_need_the_routed_experts() -> None:
    known = [q for q in read_questions(bundled_images("heldout.tsv")) if q.category in ("home", "food", "craft")][::3]
    batches = question_batches(known, load_processor(bundled_vlm()), 50)
    model = load_original(bundled_vlm(), dtype=torch.float32)
    categories = [question.category for question in known]
    with_them = judge_answers(answer_logits(model, batches), batches, categories).accuracy()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".mlp.experts." in name:
                weight.zero_()
    without = judge_answers(answer_logits(model, batches), batches, categories).accuracy()
    assert with_them.value > 0.8
    assert without.value < 0.2, "what cannot be seen is known by the routed experts"


def test_bundled_files_are_small() -> None:
    assert sum(path.stat().st_size for path in bundled_vlm().iterdir()) < 12e6
    assert sum(bundled_images(name).stat().st_size for name in ("calibration.jsonl", "heldout.tsv")) < 1e6
