"""``mopeq eval`` of vision-language models from the command line: questions, conversations, and what it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mopeq.cli import main
from mopeq.data.conversations import read_questions
from mopeq.data.samples import bundled_images, bundled_vlm
from mopeq.evaluate import Evaluation
from mopeq.precision import Precision
from mopeq.quantize import quantize
from mopeq.runtime.generate import generate

LIMIT = 21


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = quantize(bundled_vlm(), tmp_path_factory.mktemp("vlm") / "packed", uniform=Precision(2, 32), method="rtn",
                    evaluated=False)  # fmt: skip
    return made.path


def test_questions(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores and answers of a packed model beside its original's, in the file, the table and the report."""
    with bundled_images("heldout.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    chosen = [row for row in rows if row["category"] == "colour"][:8]
    options = dict(zip("ABCD", ("red", "green", "blue", "white"), strict=True))
    table = tmp_path / "colours.tsv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *options], delimiter="\t")
        writer.writeheader()
        writer.writerows({**row, "answer": next((k for k, v in options.items() if v == row["answer"]), "A"), **options}
                         for row in chosen)  # fmt: skip
    given = [
        "eval",
        str(packed),
        "--against",
        str(bundled_vlm()),
        "--vqa",
        str(bundled_images("heldout.tsv")),
        str(table),
    ]
    assert main([*given, "--limit", str(LIMIT), "--max-new-tokens", "8"]) == 0
    shown = capsys.readouterr().out
    assert f"heldout: {LIMIT} questions, scored by exact" in shown
    assert "colours: 8 questions, scored by choice (accuracy: the letter, or the text of one option)" in shown
    found = Evaluation.from_json(json.loads((packed / "mopeq" / "evaluation.json").read_text()))
    whole = next(task for task in found.tasks if (task.task, task.metric) == ("heldout", "exact answers"))
    assert (whole.documents, found.perplexity) == (LIMIT, None)
    assert whole.reference is not None
    assert whole.difference is not None
    assert whole.difference.value == pytest.approx(whole.score.value - whole.reference.value)
    assert whole.reference.value > 0.8
    with (packed / "mopeq" / "answers-heldout.tsv").open(newline="") as file:
        made = list(csv.DictReader(file, delimiter="\t"))
    assert sum(float(row["score"]) for row in made) / LIMIT == pytest.approx(whole.score.value)
    assert {row["index"] for row in made} < {
        question.index for question in read_questions(bundled_images("heldout.tsv"))
    }
    assert found.info["vqa"]["colours"]["questions"] == 8
    assert main(["report", str(packed)]) == 0
    page = (packed / "mopeq" / "report.html").read_text()
    assert "its 95 % interval" in page
    assert "exact answers, chart" in page


def test_conversations(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(bundled_images("calibration.jsonl"))
    given = ["eval", str(packed), "--perplexity", data, "--windows", "6", "--json"]
    assert main([*given, "--against", str(bundled_vlm())]) == 0
    both = json.loads(capsys.readouterr().out)
    assert main([*given, "-o", str(packed.parent / "alone.json")]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert both["divergence"]["kl"]["value"] > 0
    assert both["reference_perplexity"]["nats"]["value"] > 0
    assert both["info"]["windows"] == 6
    assert alone["perplexity"] == both["perplexity"]
    assert alone["divergence"] is None


def test_the_table_is_read_before_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr("mopeq.cli.evaluate.load_any", None)
    bad = tmp_path / "bad.tsv"
    bad.write_text("index\timage\tquestion\n")
    table, vlm = str(bundled_images("heldout.tsv")), str(bundled_vlm())
    for given, words in (
        (["--vqa", str(bad)], "bad.tsv has no answer"),
        (["--vqa", str(tmp_path / "gone.tsv")], "expected a table of questions (.tsv)"),
        (["--vqa", table, table], "two tables are called heldout"),
        (["--vqa", table, "--vqa-metric", "yesno"], "expected yes or no"),
        (["--limit", "3"], "--limit does not apply here, it belongs to --vqa"),
        (["--vqa-metric", "exact"], "--vqa-metric does not apply here"),
        (["--perplexity", str(bundled_images("calibration.jsonl")), "--length", "64"], "--length does not apply here"),
    ):
        assert main(["eval", vlm, *given]) == 2
        assert words in capsys.readouterr().err


def test_text_models_take_no_questions(tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tiny_model("olmoe")), "--vqa", str(bundled_images("heldout.tsv"))]) == 2
    assert "takes no images; expected a vision-language model" in capsys.readouterr().err


def test_long_questions_are_named(
    packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def counted(*given: Any, **options: Any) -> Any:
        asked.append(options["max_new_tokens"])
        return generate(*given, **options)

    monkeypatch.setattr("mopeq.evaluate.vqa.generate", counted)
    given = ["eval", str(packed), "--vqa", str(bundled_images("heldout.tsv")), "--limit", "1"]
    assert main([*given, "--max-new-tokens", "9999"]) == 2
    assert "question 0 of heldout: " in capsys.readouterr().err
    assert asked == [9999]
