"""Scores of single answers, each worked by hand from the rule's published form."""

from __future__ import annotations

import pytest

from mopeq.evaluate.scoring import anls, chosen_option, contains, exact, normalized, relaxed, said, vqa_accuracy

OPTIONS = {"A": "a red cat", "B": "two dogs", "C": "nothing", "D": "Paris"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("B. two dogs", "B"),
        ("The answer is D.", "D"),
        ("I think it must be B", "B"),
        ("B because there are clearly two of them", ""),  # the letter stands too early, and no option's text is there
        ("B because I see two dogs on the grass", "B"),  # by the text
        ("The correct answer is **C**. Here is why, step by step", "C"),
        ("A or B", ""),
        ("It shows Paris at night", "D"),
        ("paris", "D"),
        ("a red cat and two dogs", ""),  # two options
        ("It shows " + "very " * 20 + "old Paris", ""),  # longer than twice all options
        ("Z", ""),
        ("Sorry, I can't help with images of people yet. B", ""),
        ("", ""),
        ("E", ""),
    ],
)
def test_the_option_that_an_answer_names(answer: str, letter: str) -> None:
    assert chosen_option(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("Yes, it is.", "yes"),
        ("No, there is not.", "no"),
        ("yes and no", ""),
        ("There is a dog", ""),
        ("nothing", ""),
        ("(yes)", "yes"),
    ],
)
def test_yes_and_no(answer: str, word: str) -> None:
    assert said(answer) == word


def test_exact_and_contained() -> None:
    assert exact(" Blue\n", ["red", "BLUE"]) == 1
    assert exact("blue.", ["blue"]) == 0
    assert contains("The sign says STOP\nhere", ["stop here"]) == 1
    assert contains("The sign says STO P", ["stop"]) == 0
    formula = "Handwritten Mathematical Expression Recognition"
    assert contains("so x ^ 2 + 1", ["x^2 +1"], formula) == 1
    assert contains("X^2", ["x^2"], formula) == 0


def test_anls_by_hand() -> None:
    assert anls("hello", ["hello"]) == 1
    assert anls("helo", ["hello"]) == pytest.approx(1 - 1 / 5)
    assert anls("Hello  World", ["hello world"]) == 1
    assert anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)  # the textbook's distance of 3
    assert anls("abcd", ["abxy"]) == 0.5  # at the threshold
    assert anls("abc", ["axy"]) == 0  # one third is below it
    assert anls("cat", ["dog", "cart"]) == pytest.approx(3 / 4)  # the nearest counts
    assert anls("", ["abc"]) == 0


def test_relaxed_accuracy_by_hand() -> None:
    assert relaxed("105", ["100"]) == 1  # exactly 5 %
    assert relaxed("105.1", ["100"]) == 0
    assert relaxed("50%", ["0.5"]) == 1
    assert relaxed("50", ["50%"]) == 0  # 50 against a half
    assert relaxed("-95.5", ["-100"]) == 1
    assert relaxed("0", ["0"]) == 1
    assert relaxed("0.0", ["0"]) == 0  # an expected 0 is compared as text
    assert relaxed("Blue ", ["red", "blue"]) == 1
    assert relaxed("Blue bar", ["Blue"]) == 0


def test_vqa_accuracy_by_hand() -> None:
    people = ["red"] * 2 + ["blue"] * 8
    # left out in turn: the two that said red leave 1 other (1/3), the eight others leave 2 (2/3)
    assert vqa_accuracy("red", people) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("blue", people) == 1
    assert vqa_accuracy("green", people) == 0
    assert vqa_accuracy("The two.", ["2"] * 10) == 1


def test_normalized_answers() -> None:
    assert normalized("The  cat, and a dog!") == "cat and dog"
    assert normalized("Ten dont") == "10 don't"
    assert normalized("couldntve couldn'tve") == "couldntve couldn't've"
    assert normalized("1,000 men") == "1000 men"
    assert normalized("a-b") == "b"  # the mark becomes a space, and the article goes
    assert normalized("3.5 m.") == "3.5 m"
    assert normalized("none\nat all") == "0 at all"
