"""How right an answer is, from its text alone: the rules by which VLMEvalKit scores without a judge model.

Each rule gives a number from 0 to 1. Sources: multiple choice, yes or no and OCRBench as VLMEvalKit has them; exact
match (OCR-VQA, GQA); ANLS (Biten et al., arXiv 1907.00490), with VLMEvalKit's lengths; relaxed accuracy (Methani et
al., arXiv 1909.00997, section 5.1 of ChartQA, arXiv 2203.10244); VQA accuracy with its normalisation of answers (Antol
et al., arXiv 1505.00468).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

__all__ = ["anls", "chosen_option", "contains", "exact", "normalized", "relaxed", "said", "vqa_accuracy"]

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
"""What VLMEvalKit takes for no answer."""
BRACKETS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
VERDICT = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
MARKS = ';/[]"{}()=+\\_-><@`,?!'
FORMULA = "Handwritten Mathematical Expression Recognition"
"""OCRBench's category in which spaces do not count."""
NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}


def chosen_option(answer: str, options: Mapping[str, str]) -> str:
    """The letter of the option that an answer names, empty if it names none.

    A letter counts if it alone stands as a word, within the last four words; then ``answer is B``; then the text of a
    single option, unless the answer is more than twice as long as all options.
    """
    if any(refusal in answer for refusal in REFUSALS):
        return ""
    words = answer.translate(BRACKETS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return ""
    verdict = VERDICT.search(answer)
    if verdict and verdict[1].upper() in options:
        return verdict[1].upper()
    if len(answer) > 2 * sum(map(len, options.values())):
        return ""
    found = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else ""


def said(answer: str) -> str:
    """``yes``, ``no``, or empty where an answer has both words or neither."""
    words = unpunctuated(answer.lower()).split()
    found = [word for word in ("yes", "no") if word in words]
    return found[0] if len(found) == 1 else ""


def exact(answer: str, expected: Sequence[str]) -> float:
    """Whether it is one of those expected, but for case and outer spaces."""
    return float(answer.strip().lower() in [one.strip().lower() for one in expected])


def contains(answer: str, expected: Sequence[str], category: str = "") -> float:
    """Whether one of those expected is in it, but for case and line breaks; of formulas, but for spaces."""

    def plain(text: str) -> str:
        return re.sub(r"[ \n]", "", text.strip()) if category == FORMULA else text.lower().strip().replace("\n", " ")

    return float(any(plain(one) in plain(answer) for one in expected))


def anls(answer: str, expected: Sequence[str], threshold: float = 0.5) -> float:
    """One less the edit distance over the longer length, for the nearest of those expected; 0 below the threshold."""
    nearest = max(_likeness(answer, one) for one in expected)
    return nearest if nearest >= threshold else 0.0


def _likeness(answer: str, expected: str) -> float:
    longer = max(len(answer), len(expected))
    plain = (" ".join(text.lower().split()) for text in (answer, expected))
    return 1 - _distance(*plain) / longer if longer else 1.0


def _distance(a: str, b: str) -> int:
    """Least insertions, deletions and replacements from one text to the other (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def relaxed(answer: str, expected: Sequence[str], tolerance: float = 0.05) -> float:
    """Whether it is within a twentieth of one of the numbers expected, or, where they are no numbers, the same text.

    Percent signs divide by 100; an expected 0 is compared as text.
    """
    return float(any(_near(answer.strip(), one, tolerance) for one in expected))


def _near(answer: str, expected: str, tolerance: float) -> bool:
    number, wanted = _number(answer), _number(expected)
    if number is None or not wanted:
        return answer.lower() == expected.lower()
    return abs(number - wanted) / abs(wanted) <= tolerance


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def vqa_accuracy(answer: str, expected: Sequence[str]) -> float:
    """Mean over each of those asked of min(1, how many of the others gave this answer / 3), answers normalized."""
    given, people = normalized(answer), [normalized(one) for one in expected]
    same = people.count(given)
    scores = [min(1.0, (same - (person == given)) / 3) for person in people]
    return sum(scores) / len(scores)


def normalized(answer: str) -> str:
    """Without punctuation, articles and case; numbers up to ten as digits; contractions with their apostrophes."""
    words = unpunctuated(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    kept = [word for word in (NUMBERS.get(word, word) for word in words) if word not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(word, word) for word in kept)


def unpunctuated(text: str) -> str:
    """Marks go where they touch a space, or where a number has thousands, else they become spaces; lone periods go."""
    thousands = re.search(r"\d,\d", text) is not None
    made = text
    for mark in MARKS:
        touching = f"{mark} " in text or f" {mark}" in text
        made = made.replace(mark, "" if touching or thousands else " ")
    return re.sub(r"(?<!\d)\.(?!\d)", "", made)


def _contractions() -> dict[str, str]:
    """The words that VQA's own evaluation completes, by what they look like without one or all of their apostrophes."""
    single = (
        "ain't aren't can't could've couldn't didn't doesn't don't hadn't he'd he's how'd how'll how's isn't it'd "
        "it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't "
        "somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're "
        "there's they'd they'll they're they've we've weren't what'll what're what's what've when's where'd "
        "where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd "
        "you'll you're you've"
    )
    double = (
        "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've "
        "something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've"
    )
    made = {word.replace("'", ""): word for word in single.split()}
    for word in double.split():
        first, middle, last = word.split("'")
        made |= {f"{first}{middle}'{last}": word, f"{first}'{middle}{last}": word}
    made |= {"twas": "'twas", "yall'll": "y'all'll", "y'allll": "y'all'll"}
    return made | dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")


CONTRACTIONS = _contractions()
