"""mopeq in the real VLMEvalKit, and its scoring beside ours (``make test-vlmeval``)."""

# ruff: noqa: E402  (operators are named before what looks for them)

from __future__ import annotations

import csv
import os
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("vlmeval") is None:
    pytest.skip(
        "VLMEvalKit is not installed; make test-vlmeval installs it apart and runs this", allow_module_level=True
    )

import torch

# The toolkit imports torchvision for videos. A build for another torch has Python code that fails only because these
# two operators, which nothing here calls, are not there.
OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
        OPERATORS.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")

import pandas as pd
from vlmeval.dataset import image_vqa
from vlmeval.dataset.utils import vqa_eval, yorn
from vlmeval.utils import matching_util

from mopeq.cli import main
from mopeq.data.conversations import Question
from mopeq.data.samples import bundled_images, bundled_vlm
from mopeq.evaluate.answers import Answers
from mopeq.evaluate.scoring import chosen_option, normalized, said
from mopeq.evaluate.vlmevalkit import Mopeq
from mopeq.evaluate.vlmevalkit import main as toolkit
from mopeq.evaluate.vqa import PERCEPTION, REASONING, Table, score_of, way_of
from mopeq.evaluate.vqa import scores as ours
from mopeq.precision import Precision
from mopeq.quantize import quantize

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = """
a an the A B C D yes no Yes. No, not two Two 10 1,000 3.5 50% 0 0.0 blue BLUE Blue. bar-chart dont cant couldntve youve
its it's o'clock x^2 ( ) ? ! ; / "quoted" answer is **B** (C) Z E. paris Paris stop sign none zero - .5 5.
"""
WORDS = TEXT.split()


def phrases(seed: int, count: int, longest: int = 7) -> Iterator[str]:
    """Made-up answers of what the rules look at."""
    draw = random.Random(seed)
    for _ in range(count):
        joined = draw.choice((" ", " ", " ", "\n", ", ", "  "))
        yield joined.join(draw.choice(WORDS) for _ in range(draw.randrange(0, longest)))


def test_letters_words_and_normalization() -> None:
    draw = random.Random(0)
    for answer in phrases(1, 4000, 12):
        options = {letter: draw.choice(WORDS) + draw.choice(("", " cat")) for letter in "ABCDE"[: draw.randrange(2, 6)]}
        theirs = matching_util.can_infer(answer, dict(options))
        assert chosen_option(answer, options) == (theirs if theirs and theirs != "Z" else ""), (answer, options)
        assert said(answer) == {"Yes": "yes", "No": "no"}.get(yorn.YOrN_Extraction(answer), ""), answer
        assert normalized(answer) == vqa_eval.process_answer(answer), answer


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("TextVQA_VAL", "vqa_score"),
        ("DocVQA_VAL", "anls"),
        ("ChartQA_TEST", "relaxed_accuracy"),
        ("OCRVQA_TEST", "accuracy"),
    ],
)
def test_open_answers(name: str, method: str) -> None:
    draw = random.Random(2)
    pool = [phrase for phrase in phrases(3, 300, 4) if phrase.strip()]
    lines, questions, answers = [], [], []
    for number in range(600):
        expected = [draw.choice(pool) for _ in range(3)] * 3
        answer = draw.choice([*pool, *expected * 20, expected[0][:-1], str(draw.random())])
        lines.append({"index": number, "answer": str(expected), "prediction": answer})
        questions.append(Question(str(number), ("",), "", str(expected)))
        answers.append(answer)
    results = [vqa_eval.process_line(line, method=method) for line in lines]
    theirs = vqa_eval.hit_calculate(results, name)
    metric = way_of(name, questions).metric
    mine = [score_of(question, answer, metric) for question, answer in zip(questions, answers, strict=True)]
    assert mine == pytest.approx([float(score) for score in theirs], abs=1e-9)
    assert 0.1 < sum(mine) / len(mine) < 0.9


def judged(name: str, questions: list[Question], texts: list[str]) -> dict[str, float]:
    way = way_of(name, questions)
    right = tuple(score_of(q, text, way.metric) for q, text in zip(questions, texts, strict=True))
    answers = Answers(tuple(q.category for q in questions), right, (1,) * len(right), texts=tuple(texts))
    return {score.metric: score.score.value for score in ours(Table(name, tuple(questions), way), answers)}


def test_mme_and_pope(tmp_path: Path) -> None:
    draw, words = random.Random(4), ("Yes", "no.", "Yes and no", "It is")
    categories = [*sorted(PERCEPTION), *sorted(REASONING)]
    rows = [{"index": 4 * c + k, "category": category, "image_path": f"{k // 2}.png", "answer": ("Yes", "No")[k % 2]}
            for c, category in enumerate(categories) for k in range(4)]  # fmt: skip
    texts = [draw.choice(words) for _ in rows]
    given = [yorn.YOrN_Extraction(text) for text in texts]
    table = pd.DataFrame(rows).assign(extracted=given)
    table["score"] = table["answer"] == table["extracted"]
    table.to_csv(tmp_path / "mme.csv", index=False)
    theirs = yorn.MME_rating(str(tmp_path / "mme.csv")).iloc[0].to_dict()
    questions = [Question(str(r["index"]), ("",), "", r["answer"], r["category"], {},
                          {"image_path": r["image_path"], "category": r["category"]}) for r in rows]  # fmt: skip
    found = judged("MME", questions, texts)
    for key, value in theirs.items():
        assert found[f"MME score, {key}"] == pytest.approx(value)
    several = [draw.choice(("popular", "random", "popular,adversarial")) for _ in rows]
    table.assign(category=several).to_csv(tmp_path / "pope.csv", index=False)
    rated = yorn.POPE_rating(str(tmp_path / "pope.csv")).set_index("split")
    questions = [Question(q.index, q.images, "", q.answer, c) for q, c in zip(questions, several, strict=True)]
    found = judged("POPE", questions, texts)
    for split, values in rated.iterrows():
        suffix = "" if split == "Overall" else f", {split}"
        assert 100 * found[f"F1{suffix}"] == pytest.approx(values["Overall"])
        assert 100 * found[f"accuracy{suffix}"] == pytest.approx(values["acc"])
    assert 100 * found["precision"] == pytest.approx(rated.loc["Overall", "precision"])
    assert 100 * found["recall"] == pytest.approx(rated.loc["Overall", "recall"])


def test_ocrbench(tmp_path: Path) -> None:
    draw = random.Random(5)
    names = ["Regular Text Recognition", "Doc-oriented VQA", "Handwritten Mathematical Expression Recognition"]
    pool = [phrase for phrase in phrases(6, 200, 3) if phrase.strip()]
    rows = [{"index": i, "category": draw.choice(names), "answer": str([draw.choice(pool), draw.choice(pool)])}
            for i in range(300)]  # fmt: skip
    texts = [f"{draw.choice(pool)} {draw.choice(pool)} {draw.choice(pool)}" for _ in rows]
    pd.DataFrame(rows).assign(prediction=texts).to_excel(tmp_path / "ocr.xlsx", index=False)
    theirs = image_vqa.OCRBench.evaluate(str(tmp_path / "ocr.xlsx"))
    questions = [
        Question(str(r["index"]), ("",), "", r["answer"], r["category"], {}, {"category": r["category"]}) for r in rows
    ]
    found = judged("OCRBench", questions, texts)
    assert round(300 * found["answers contained"]) == theirs["Final Score"] > 10


def test_a_local_table_through_the_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """The same prompts, answers and score by the toolkit and by ``mopeq eval``."""
    packed = quantize(bundled_vlm(), tmp_path / "packed", uniform=Precision(3, 32), method="rtn", evaluated=False).path
    with bundled_images("heldout.tsv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["category"] == "colour"][:16]
    options = dict(zip("ABCD", ("red", "green", "blue", "white"), strict=True))
    letters = {text: letter for letter, text in options.items()}
    data = tmp_path / "LMUData"
    data.mkdir()
    with (data / "colours.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *options], delimiter="\t")
        writer.writeheader()
        writer.writerows({**row, "answer": letters.get(row["answer"], "A"), **options} for row in rows)
    monkeypatch.setenv("LMUData", str(data))
    monkeypatch.chdir(tmp_path)
    found: Any = toolkit([str(packed), "--data", "colours", "--max-new-tokens", "8"])
    answers = pd.read_excel(next((tmp_path / "outputs").glob("packed_colours.*")))
    assert main(["eval", str(packed), "--vqa", str(data / "colours.tsv"), "--max-new-tokens", "8"]) == 0
    assert "scored by choice" in capsys.readouterr().out
    with (packed / "mopeq" / "answers-colours.tsv").open(newline="") as file:
        made = list(csv.DictReader(file, delimiter="\t"))
    assert [row["answer"] for row in made] == [str(text) for text in answers["prediction"].fillna("")]
    assert sum(float(row["score"]) for row in made) / len(made) == pytest.approx(float(found["Overall"].iloc[0]))


def test_images_and_words_in_order(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        Image.new("RGB", (48, 48), "red").save(tmp_path / f"{name}.png")
    model = Mopeq(str(bundled_vlm()), max_new_tokens=4)
    message = [str(tmp_path / "a.png"), str(tmp_path / "b.png"), "Which colour is the square?"]
    assert isinstance(model.generate(message), str)


def teardown_module() -> None:
    torch.set_grad_enabled(True)  # the toolkit turns gradients off
    os.environ.pop("LMUData", None)
