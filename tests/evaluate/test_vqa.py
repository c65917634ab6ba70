"""Tables of questions: how they are read, which scoring they get, and scores worked by hand."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mopeq.errors import DataError, InputError
from mopeq.evaluate.answers import Answers
from mopeq.evaluate.bootstrap import ratios_estimate
from mopeq.evaluate.vqa import Table, Way, prompt_of, read_table, score_of, scores, write_answers


def picture(colour: str = "red") -> str:
    stream = io.BytesIO()
    Image.new("RGB", (30, 30), colour).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def written(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(index: Any, answer: str, question: str = "What?", **more: Any) -> dict[str, Any]:
    return {"index": index, "image": picture(), "question": question, "answer": answer, **more}


def test_a_small_category_has_its_own_interval(tmp_path: Path) -> None:
    rows = [row(i, "red", category="one" if i == 0 else "many") for i in range(30)]
    found = judged(read_table(written(tmp_path / "t.tsv", rows)), ["red"] * 30)
    assert found["exact answers, one"].score.low is None
    assert (found["exact answers, many"].score.low, found["exact answers"].score.low) == (1, 1)


def judged(table: Table, texts: Sequence[str], original: Sequence[str] | None = None) -> dict[str, Any]:
    def answers(given: Sequence[str]) -> Answers:
        right = [score_of(q, text, table.way.metric) for q, text in zip(table.questions, given, strict=True)]
        return Answers(tuple(q.category for q in table.questions), tuple(right), (1,) * len(right), texts=tuple(given))

    made = scores(table, answers(texts), None if original is None else answers(original))
    return {score.metric: score for score in made}


@pytest.mark.parametrize(
    ("name", "more", "answers", "metric", "words"),
    [
        ("MME", {}, ("Yes", "No"), "mme", False),
        ("POPE", {}, ("Yes", "No"), "yesno", False),
        ("mine", {}, ("Yes", "no"), "yesno", False),
        ("mine", {}, ("Yes", "maybe"), "exact", False),
        ("mine", {"A": "x", "B": "y"}, ("A", "B"), "choice", False),
        ("MMBench_DEV_EN", {"A": "x", "B": "y"}, ("A", "B"), "circular", False),
        ("AI2D_TEST", {"A": "x", "B": "y"}, ("A", "B"), "choice", False),
        ("TextVQA_VAL", {}, ("['a', 'a']", "['b', 'c']"), "vqa", True),
        ("DocVQA_VAL", {}, ("['a']", "b"), "anls", True),
        ("InfoVQA_VAL", {}, ("a", "b"), "anls", True),
        ("ChartQA_TEST", {}, ("1", "2"), "relaxed", True),
        ("OCRVQA_TEST", {}, ("a", "b"), "exact", True),
        ("OCRBench", {}, ("['a']", "['b']"), "contains", False),
    ],
)
def test_how_a_table_is_scored(
    name: str, more: dict[str, str], answers: tuple[str, str], metric: str, words: bool, tmp_path: Path
) -> None:
    rows = [row(i, answer, **more, category="OCR") for i, answer in enumerate(answers)]
    way = read_table(written(tmp_path / f"{name}.tsv", rows)).way
    assert (way.metric, bool(way.words)) == (metric, words)
    assert "name" in way.why or name in ("mine", "AI2D_TEST")


def test_choice_by_hand(tmp_path: Path) -> None:
    options = {"A": "cat", "B": "dog", "C": "", "hint": ""}
    rows = [
        row(0, "A", **options, category="x"),
        row(1, "B", **{**options, "C": "cow", "hint": "Look."}, category="y"),
        row(2, "C", **{**options, "C": "cow"}, category="y"),
        row(3, "four", **dict.fromkeys(options, ""), category="y"),  # MMMU's open questions
    ]
    table = read_table(written(tmp_path / "t.tsv", rows))
    asked = [prompt_of(question, table.way) for question in table.questions]
    assert asked[0].endswith(
        "What?\nOptions:\nA. cat\nB. dog\nPlease select the correct answer from the options above. \n"
    )
    assert asked[1].startswith("Hint: Look.\nQuestion: What?\n")
    assert asked[3] == "Question: What?\n"
    found = judged(table, ["(A)", "It is a dog", "dog", "it says four"], ["B", "B", "C", "two"])
    assert {name: score.score.value for name, score in found.items()} == {
        "accuracy": 0.75, "accuracy, x": 1, "accuracy, y": pytest.approx(2 / 3),
    }  # fmt: skip
    assert (found["accuracy"].reference.value, found["accuracy"].difference.value) == (0.5, 0.25)
    assert found["accuracy, y"].documents == 3


def test_circular_needs_every_turn(tmp_path: Path) -> None:
    rows = [row(i, letter, A="cat", B="dog") for i, letter in ((1, "A"), (1000001, "B"), (2, "A"), (1000002, "B"))]
    table = read_table(written(tmp_path / "MMBench.tsv", rows))
    assert judged(table, ["A", "B", "A", "A"])["circular accuracy"].score.value == 0.5
    assert judged(table, ["A", "B", "A", "B"])["circular accuracy"].documents == 2


def test_mme_by_hand(tmp_path: Path) -> None:
    """Two images of OCR, one of color; the toolkit adds the share of right answers and of images with both right."""
    rows = [
        row(i, answer, category=category, image_path=image)
        for i, (answer, category, image) in enumerate([
            ("Yes", "OCR", "a"), ("No", "OCR", "a"), ("Yes", "OCR", "b"), ("No", "OCR", "b"),
            ("Yes", "color", "a"), ("No", "color", "a"),
        ])
    ]  # fmt: skip
    table = read_table(written(tmp_path / "MME.tsv", rows))
    found = judged(table, ["Yes", "No", "Yes.", "yes", "no", "No"], ["yes", "no", "yes", "no", "yes", "no"])
    assert {name: round(score.score.value, 6) for name, score in found.items()} == {
        "MME score, sum over categories": 100 * (3 / 4 + 1 / 2) + 100 * (1 / 2 + 0),
        "accuracy": round(4 / 6, 6),
        "accuracy+": round(1 / 3, 6),
        "MME score, OCR": 125.0,
        "MME score, color": 50.0,
    }
    assert found["MME score, OCR"].reference.value == 200
    assert found["MME score, OCR"].difference.value == -75
    perception = "OCR artwork celebrity color count existence landmark position posters scene"
    reasoning = "code_reasoning commonsense_reasoning numerical_calculation text_translation"
    categories = [*perception.split(), *reasoning.split()]
    rows = [row(2 * i + k, "Yes", category=c, image_path=c) for i, c in enumerate(categories) for k in (0, 1)]
    whole = judged(read_table(written(tmp_path / "MME.tsv", rows)), ["yes", "yes"] * 12 + ["yes", "no"] * 2)
    assert (whole["MME score, perception"].score.value, whole["MME score, reasoning"].score.value) == (2000, 500)
    with pytest.raises(DataError, match="1 questions about the image of question 0 in category 'OCR'; MME has two"):
        read_table(written(tmp_path / "MME.tsv", rows[:1]))


def test_pope_by_hand(tmp_path: Path) -> None:
    rows = [
        row(i, answer, category=category)
        for i, (answer, category) in enumerate([("Yes", "popular"), ("No", "popular,random"), ("Yes", "random")])
    ]
    found = judged(read_table(written(tmp_path / "POPE.tsv", rows)), ["yes", "yes", "well"])
    # counted once in each category: popular has a hit and a false yes, random a false yes and a miss
    assert found["accuracy"].score.value == 1 / 4
    assert found["precision"].score.value == 1 / 3
    assert found["recall"].score.value == 1 / 2
    assert found["F1"].score.value == pytest.approx(2 * (1 / 3 * 1 / 2) / (1 / 3 + 1 / 2))
    assert found["F1, popular"].score.value == pytest.approx(2 / 3)
    assert found["F1, random"].score.value == 0
    assert judged(read_table(tmp_path / "POPE.tsv"), ["no"] * 3)["precision"].score.value == 0


def test_intervals_are_over_what_is_scored_together() -> None:
    """Against a bootstrap written out: draw units, take the ratios again."""
    generator = np.random.default_rng(0)
    parts = [(generator.random(n), generator.integers(0, 2, n).astype(float)) for n in (30, 50)]
    other = [(generator.random(n), generator.integers(0, 2, n).astype(float)) for n in (30, 50)]
    found = ratios_estimate(parts, other, seed=5, resamples=4000)

    def value(drawn: Sequence[Any]) -> float:
        return sum(float(a[0][d].sum() / a[1][d].sum() - b[0][d].sum() / b[1][d].sum())
                   for a, b, d in zip(parts, other, drawn, strict=True))  # fmt: skip

    assert found.value == pytest.approx(value([slice(None), slice(None)]))
    values = [value([generator.integers(0, n, n) for n in (30, 50)]) for _ in range(4000)]
    assert (found.low, found.high) == pytest.approx(np.percentile(values, [2.5, 97.5]), rel=0.1, abs=0.02)
    same = ratios_estimate(parts, parts, seed=5)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert ratios_estimate([(np.zeros(3), np.zeros(3))]).value == 0
    assert ratios_estimate([(np.ones(1), np.ones(1))]).low is None


def test_images_of_other_rows_lists_and_paths(tmp_path: Path) -> None:
    red, blue = picture("red"), picture("blue")
    rows = [
        {**row(7, "a"), "image": red},
        {**row(8, "b"), "image": "7"},
        {**row(9, "c", "In <image 2>?"), "image": str([red, blue])},
        {**row(10, "d"), "image": "", "image_path": "sub/blue.png"},
    ]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "blue.png").write_bytes(base64.b64decode(blue))
    table = read_table(written(tmp_path / "t.tsv", [{"image_path": "", **one} for one in rows]))
    assert [question.images for question in table.questions] == [
        (red,), (red,), (red, blue), (tmp_path / "sub" / "blue.png",),
    ]  # fmt: skip


def test_limit_is_spread_and_keeps_pairs(tmp_path: Path) -> None:
    rows = [row(i, "Yes", category="OCR", image_path=str(i // 2)) for i in range(20)]
    path = written(tmp_path / "MME.tsv", rows)
    assert [q.index for q in read_table(path, limit=6).questions] == ["0", "1", "6", "7", "12", "13"]
    assert [q.index for q in read_table(path, "yesno", limit=2).questions] == ["0", "10"]
    with pytest.raises(InputError, match="--limit 0"):
        read_table(path, limit=0)


@pytest.mark.parametrize(
    ("change", "metric", "words"),
    [
        ({"image": "%" * 80}, None, r"t.tsv: the image of question 0 is no base64"),
        ({"image": picture()[:96]}, None, r"t.tsv: the image of question 0 is (damaged|no base64)"),
        ({"image": "nowhere"}, None, "has image 'nowhere'; expected base64, or the index of a row"),
        ({"image": "0"}, None, "has image '0'; expected base64, or the index of a row"),
        ({"image": ""}, None, "question 0 of .*t.tsv has no image"),
        ({"image": "", "image_path": "gone.png"}, None, "no file .*gone.png, the image of question 0"),
        ({"answer": " "}, None, "question 0 of .* has no answer, so that it cannot be scored"),
        ({"question": "In <image 2>?"}, None, "question 0 names image 2 and has 1"),
        (
            {"answer": "E", "A": "x", "B": "y"},
            None,
            "the answer of question 0 is 'E'; expected one of its options, A, B",
        ),
        ({"answer": "maybe"}, "yesno", "the answer of question 0 is 'maybe'; expected yes or no"),
        ({"answer": "x"}, "vqa", "question 0 has one answer; expected a list of several"),
        ({"answer": "x"}, "bleu", "no scoring 'bleu' of questions; expected one of choice, circular"),
        ({"index": "q"}, "circular", "circular scoring expects whole numbers"),
    ],
)
def test_bad_tables(change: dict[str, str], metric: str | None, words: str, tmp_path: Path) -> None:
    path = written(tmp_path / "t.tsv", [{**row(0, "x"), **change}])
    with pytest.raises((DataError, InputError), match=words):
        read_table(path, metric)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no index, question, answer, image; expected a tab-separated table"),
        ("index\timage\tquestion\tanswer\n", "has no rows"),
        ("index,image,question,answer\n1,2,3,4\n", "has no index, question, answer, image"),
        ("index\timage\tquestion\tanswer\n1\t2\t3\n", "row 1 has 3 fields; expected 4"),
        ("index\timage\tquestion\tanswer\n1\t2\t3\t4\t5\n", "row 1 has 5 fields; expected 4"),
        (f"index\timage\tquestion\tanswer\n1\t{'a' * 80}\tb\tc\n1\t{'a' * 80}\tb\tc\n", "has index '1' twice"),
    ],
)
def test_files_that_are_no_tables(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_table(path)
    with pytest.raises(DataError, match="no file"):
        read_table(tmp_path / "gone.tsv")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_table(path)


def test_answers_are_left_to_look_through(tmp_path: Path) -> None:
    table = read_table(written(tmp_path / "t.tsv", [row(0, "red", "Which\ncolour?")]))
    assert table.way == Way("exact", "", "nothing in its name or columns")
    answers = Answers(("",), (1.0,), (1,), texts=("red\t!",))
    write_answers(tmp_path / "out.tsv", table, answers, answers)
    with (tmp_path / "out.tsv").open(newline="") as file:
        (made,) = csv.DictReader(file, delimiter="\t")
    assert (made["question"], made["answer"], made["original's score"]) == ("Which\ncolour?", "red\t!", "1.0")
