"""Questions about images put to a model, and the scores of benchmarks in VLMEvalKit's tables.

:func:`way_of` chooses how a table is asked and scored, as VLMEvalKit does by the table's name, else from its columns.
:func:`ask` lets a model answer, :func:`scores` makes numbers of the answers. Intervals are bootstraps over questions,
or over what is scored together: MME's two questions of an image, the turns of one question in circular evaluation.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mopeq.data.conversations import Question, asking, listed, read_questions
from mopeq.errors import DataError, InputError
from mopeq.evaluate.answers import Answers
from mopeq.evaluate.bootstrap import RESAMPLES, Ratio, ratios_estimate
from mopeq.evaluate.scoring import anls, chosen_option, contains, exact, relaxed, said, vqa_accuracy
from mopeq.evaluate.tasks import TaskScore
from mopeq.progress import Track, silent
from mopeq.runtime.generate import generate

__all__ = ["METRICS", "Table", "Way", "ask", "prompt_of", "read_table", "score_of", "scores", "way_of", "write_answers"]

METRICS = {
    "choice": "accuracy: the letter, or the text of one option",
    "circular": "circular accuracy: right in every order of the options",
    "yesno": "accuracy, and precision, recall and F1 of yes",
    "mme": "MME's score: accuracy and accuracy+ (both questions of an image), in points up to 200 a category",
    "exact": "exact match but for case",
    "anls": "ANLS: nearness in edits, at least one half",
    "relaxed": "relaxed accuracy: numbers within 5 %, else exact match",
    "vqa": "VQA accuracy: agreement with several people",
    "contains": "containment, as OCRBench scores",
}
"""Kinds of scoring."""
NAMES = (
    ("mme", r"^MME($|_)"),
    ("yesno", r"POPE|HallusionBench|AMBER|^VSR"),
    ("vqa", r"TextVQA"),
    ("anls", r"DocVQA|InfoVQA"),
    ("relaxed", r"ChartQA"),
    ("exact", r"OCRVQA|GQA"),
    ("contains", r"^OCRBench($|_MINI)"),
    ("circular", r"MMBench|CCBench|circular|MMCR"),
)
"""Kinds by the names of benchmarks, as VLMEvalKit calls them."""
SHORT = "\nAnswer the question using a single word or phrase."
"""What VLMEvalKit adds to open questions of the benchmarks that it scores by text."""
PERCEPTION = {
    "OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene",
}  # fmt: skip
REASONING = {"code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"}
GROUPINGS = ("category", "l2-category", "split")


@dataclass(frozen=True)
class Way:
    """How a table is asked and scored: a name in :data:`METRICS`, words added to questions, and why it was chosen."""

    metric: str
    words: str
    why: str


@dataclass(frozen=True)
class Table:
    """The questions of one file, and how they are asked and scored."""

    name: str
    questions: tuple[Question, ...]
    way: Way


def read_table(path: str | Path, metric: str | None = None, limit: int | None = None) -> Table:
    """The questions of a file, every image of which can be opened.

    Args:
        path: a table in VLMEvalKit's format.
        metric: kind of scoring, a name in :data:`METRICS`; None for :func:`way_of`.
        limit: about how many questions, evenly spread over the file; what is scored together stays together.

    Raises :class:`DataError` where the table cannot be scored this way.
    """
    path = Path(path)
    questions = read_questions(path)
    way = way_of(path.stem, questions, metric)
    groups = _groups(questions, way.metric)
    if limit is not None:
        if limit < 1:
            raise InputError(f"--limit {limit}; expected at least 1 question")
        count = max(1, min(len(groups), limit * len(groups) // len(questions)))
        groups = [groups[i * len(groups) // count] for i in range(count)]
    chosen = [questions[i] for i in sorted(i for group in groups for i in group)]
    for question in chosen:
        try:
            asking(question, question.text)
            score_of(question, "", way.metric)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    return Table(path.stem, tuple(chosen), way)


def way_of(name: str, questions: Sequence[Question], metric: str | None = None) -> Way:
    """How a table of this name is asked and scored. Raises :class:`InputError` for an unknown kind of scoring."""
    if metric is not None:
        if metric not in METRICS:
            raise InputError(f"no scoring {metric!r} of questions; expected one of {', '.join(METRICS)}")
        return Way(metric, SHORT if metric in ("anls", "relaxed", "vqa") else "", "--vqa-metric")
    with_options = any(question.options for question in questions)
    for kind, pattern in NAMES:
        if re.search(pattern, name) and (kind != "circular" or with_options):
            return Way(kind, SHORT if kind in ("anls", "relaxed", "vqa", "exact") else "", "its name")
    if with_options:
        return Way("choice", "", "its columns A, B, ...")
    if all(question.answer.strip().lower() in ("yes", "no") for question in questions):
        return Way("yesno", "", "its answers, all yes or no")
    return Way("exact", "", "nothing in its name or columns")


def prompt_of(question: Question, way: Way) -> str:
    """The words of a question, as VLMEvalKit puts them to models that have no words of their own."""
    if way.metric not in ("choice", "circular"):
        return question.text + way.words
    hint = f"Hint: {question.more['hint']}\n" if "hint" in question.more else ""
    options = "".join(f"{letter}. {text}\n" for letter, text in question.options.items())
    select = f"Options:\n{options}Please select the correct answer from the options above. \n" if options else ""
    return f"{hint}Question: {question.text}\n{select}"


def score_of(question: Question, answer: str, metric: str) -> float:
    """How right an answer is, 0 to 1. Raises :class:`DataError` where the row cannot be scored so."""
    several = listed(question.answer)
    expected = several or [question.answer]
    if metric in ("choice", "circular"):
        options, right = question.options, question.answer.strip()
        if not options:  # MMMU's open questions, as VLMEvalKit makes them choices
            options, right = {"A": question.answer, "B": "Other Answers"}, "A"
        if right not in options:
            raise DataError(
                f"the answer of question {question.index} is {right[:40]!r}; expected one of its options, "
                f"{', '.join(options)}; choose another --vqa-metric, or correct the row"
            )
        return float(chosen_option(answer, options) == right)
    if metric in ("yesno", "mme"):
        truth = question.answer.strip().lower()
        if truth not in ("yes", "no"):
            raise DataError(
                f"the answer of question {question.index} is {truth[:40]!r}; expected yes or no; "
                "choose another --vqa-metric, or correct the row"
            )
        return float(said(answer) == truth)
    if metric == "vqa":
        if len(expected) < 2:
            raise DataError(
                f"question {question.index} has one answer; expected a list of several people's answers; "
                "choose another --vqa-metric, such as exact"
            )
        return vqa_accuracy(answer, expected)
    if metric == "contains":
        return contains(answer, expected, question.category)
    return {"exact": exact, "anls": anls, "relaxed": relaxed}[metric](answer, expected)


def ask(model: Any, processor: Any, table: Table, *, max_new_tokens: int = 200, track: Track = silent) -> Answers:
    """Let a model answer every question by greedy decoding, and score the answers one by one.

    Args:
        model: a vision-language model, packed or not.
        processor: its processor.
        table: from :func:`read_table`.
        max_new_tokens: most tokens of an answer.
        track: progress.
    """
    texts, tokens = [], []
    for question in track(table.questions, table.name, len(table.questions)):
        said = [{"role": "user", "content": asking(question, prompt_of(question, table.way))}]
        try:
            made = generate(model, processor, said, max_new_tokens=max_new_tokens)
        except (InputError, DataError) as error:
            raise type(error)(f"question {question.index} of {table.name}: {error}") from error
        texts.append(made.text)
        tokens.append(len(made.tokens))
    right = [score_of(q, text, table.way.metric) for q, text in zip(table.questions, texts, strict=True)]
    categories = tuple(question.category for question in table.questions)
    return Answers(categories, tuple(right), tuple(tokens), texts=tuple(texts))


def scores(
    table: Table, answers: Answers, original: Answers | None = None, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[TaskScore, ...]:
    """The scores of a table, over all and by category, each with its interval.

    With the original's answers to the same questions also its scores, and the difference, by a paired bootstrap.
    """
    ours = list(_measures(table, answers))
    theirs = [None] * len(ours) if original is None else list(_measures(table, original))
    drawn = partial(ratios_estimate, seed=seed, resamples=resamples)
    return tuple(
        TaskScore(
            table.name,
            name,
            drawn(parts),
            count,
            None if other is None else drawn(other[1]),
            None if other is None else drawn(parts, other[1]),
        )
        for (name, parts, count), other in zip(ours, theirs, strict=True)
    )


def write_answers(path: Path, table: Table, answers: Answers, original: Answers | None = None) -> None:
    """A table of what was answered to each question and how right it is, to look through."""
    head = ["index", "category", "question", "expected", "answer", "score"]
    columns: list[Sequence[Any]] = [answers.texts, answers.right]
    if original is not None:
        head += ["original's answer", "original's score"]
        columns += [original.texts, original.right]
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(head)
        for question, *made in zip(table.questions, *columns, strict=True):
            writer.writerow([question.index, question.category, question.text, question.answer, *made])
    beside.replace(path)


Measure = tuple[str, list[Ratio], int]
"""A name, the ratios over units that add up to it, and how many questions are in it."""


def _measures(table: Table, answers: Answers) -> Iterator[Measure]:
    questions, metric = table.questions, table.way.metric
    groups = _groups(questions, metric)
    right = np.array(answers.right, dtype=np.float64)
    if metric == "circular":
        every = np.array([right[group].min() for group in groups])
        yield from _means("circular accuracy", [questions[group[0]] for group in groups], every)
    elif metric == "mme":
        yield from _mme([questions[group[0]].category for group in groups], right[groups])
    elif metric == "yesno":
        yield from _yes_no(questions, answers, right)
    else:
        names = {"choice": "accuracy", "anls": "ANLS", "relaxed": "relaxed accuracy", "vqa": "VQA accuracy",
                 "exact": "exact answers", "contains": "answers contained"}  # fmt: skip
        yield from _means(names[metric], questions, right)


def _means(name: str, questions: Sequence[Question], values: Any) -> Iterator[Measure]:
    """Means over all and over the members of each grouping that has several."""
    yield name, [(values, np.ones(len(values)))], len(values)
    for grouping in GROUPINGS:
        own = [question.more.get(grouping, "") for question in questions]
        for member in dict.fromkeys(own) if len(set(own)) > 1 else ():
            chosen = values[[one == member for one in own]]
            yield f"{name}, {member or 'no ' + grouping}", [(chosen, np.ones(len(chosen)))], len(chosen)


def _mme(categories: Sequence[str], pairs: Any) -> Iterator[Measure]:
    """pairs: (images, 2), whether each of the two questions of an image is answered rightly."""
    points = 100 * (pairs.mean(1) + pairs.prod(1))
    own = {name: points[[one == name for one in categories]] for name in dict.fromkeys(categories)}
    parts = {name: (values, np.ones(len(values))) for name, values in own.items()}
    sums = {"perception": PERCEPTION, "reasoning": REASONING}
    whole = {name: members for name, members in sums.items() if members <= set(parts)}
    for name, members in (whole or {"sum over categories": set(parts)}).items():
        chosen = [part for one, part in parts.items() if one in members]
        yield f"MME score, {name}", chosen, 2 * sum(len(values) for values, _ in chosen)
    ones = np.ones(len(pairs))
    yield "accuracy", [(pairs.mean(1), ones)], pairs.size
    yield "accuracy+", [(pairs.prod(1), ones)], pairs.size
    for name, part in parts.items():
        yield f"MME score, {name}", [part], 2 * len(part[0])


def _yes_no(questions: Sequence[Question], answers: Answers, right: Any) -> Iterator[Measure]:
    """As POPE is scored: a question of several categories, ``popular,random``, counts in each of them."""
    given = np.array([said(text) == "yes" for text in answers.texts])
    truth = np.array([question.answer.strip().lower() == "yes" for question in questions])
    own = [question.category.split(",") for question in questions]
    members = list(dict.fromkeys(name for names in own for name in names))
    counts = {"": np.array([len(names) for names in own], dtype=np.float64)}
    if len(members) > 1:
        counts |= {f", {m or 'no category'}": np.array([float(m in names) for names in own]) for m in members}
    for suffix, every in counts.items():
        inside = every > 0
        weight, yes, true = every[inside], given[inside], truth[inside]
        both, many = (yes & true) * weight, int(weight.sum())
        yield f"accuracy{suffix}", [(right[inside] * weight, weight)], many
        yield f"F1{suffix}", [(2 * both, yes * weight + true * weight)], many
        if not suffix:
            yield "precision", [(both, yes * weight)], many
            yield "recall", [(both, true * weight)], many


def _groups(questions: Sequence[Question], metric: str) -> list[list[int]]:
    """Numbers of the questions that are scored together.

    Raises :class:`DataError` for images that MME does not ask two questions about.
    """
    if metric not in ("circular", "mme"):
        return [[number] for number in range(len(questions))]
    made: dict[Any, list[int]] = {}
    for number, question in enumerate(questions):
        if metric == "circular":
            key: Any = question.more.get("g_index") or _turned(question)
        else:
            key = question.category, question.more.get("image_path") or question.images
        made.setdefault(key, []).append(number)
    for key, group in made.items() if metric == "mme" else ():
        if len(group) != 2:
            raise DataError(
                f"{len(group)} questions about the image of question {questions[group[0]].index} in category "
                f"{key[0]!r}; MME has two; correct the table, or choose --vqa-metric yesno"
            )
    return list(made.values())


def _turned(question: Question) -> int:
    """The number of the question of which this is a turn: turns are a million apart."""
    if not question.index.isdecimal():
        raise DataError(f"index {question.index!r}; circular scoring expects whole numbers, turns a million apart")
    return int(question.index) % 1_000_000
