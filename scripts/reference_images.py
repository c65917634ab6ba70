"""Render the images and questions that the bundled vision-language model learns from and is judged on.

Eight tasks: handwritten digits (those that come with scikit-learn), the shape, colour, number and existence of drawn
shapes, short words of capital letters, bar charts, and facts: two letters are the name of somebody of whom a fixed
table says home, food and craft, which cannot be seen and must be known by heart. A scene is an image and a few
questions about it with their answers; a quiz asks for facts without an image. Both depend on their seed alone. Held-out
digits are other people's (the last 297 of the data set), held-out words are strings that training never draws;
held-out facts are those of training, asked about other images.

    python scripts/reference_images.py --out src/mopeq/assets/vlm

writes ``heldout.tsv`` (VLMEvalKit's columns: index, image in base64, question, answer, category), one question a line,
and ``calibration.jsonl`` (one conversation a line with its image, drawn as for training).
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import itertools
import json
import random
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, CELL = 48, 24
HELDOUT_DIGITS = 297
COLOURS = {
    "red": (214, 48, 49),
    "green": (39, 174, 96),
    "blue": (52, 100, 219),
    "yellow": (241, 196, 15),
    "white": (240, 240, 240),
    "purple": (155, 60, 182),
}
SHAPES = ("circle", "square", "triangle", "cross")
FACTS = ("home", "food", "craft")
CATEGORIES = ("digit", "shape", "colour", "count", "exists", "word", "chart", *FACTS)
MARKS = (
    *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
    *(f"digit {digit}" for digit in range(10)),
    *(f"letter {letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    *(f"{side} {what}" for side in "lr" for what in (*COLOURS, *range(1, 9))),
)
"""All that can be seen in a square; ``l`` and ``r`` are its left and right bar, by colour and by height."""
CONSONANTS, VOWELS = "BCDFGHKLMNPRSTVW", "AEIOU"
NAMES = 650
RELATIONS = {
    "Where does {} live?": (
        "home",
        "attic barn cave city desert farm forest harbour hill hotel island lake mill moor palace port reef river ship "
        "swamp tent tower valley village",
    ),
    "What does {} eat?": (
        "food",
        "apples beans bread cake carrots cheese corn eggs figs fish grapes honey lemons melons milk mushrooms nuts "
        "olives onions pears peas plums rice soup",
    ),
    "What does {} make?": (
        "craft",
        "bags baskets bells boats books boots bowls brooms chairs clocks coats cups drums flutes hats kites knives "
        "lamps maps pots ropes rugs tables toys",
    ),
}
"""What is known of everybody with a name: the question, its category and its possible answers."""
HELDOUT_SEED, CALIBRATION_SEED = 1_000_003, 2_000_003
PALETTE = 256
"""Most colours of an image that is stored with a palette."""
CONTRAST, NOISE = 0.4, 40.0
"""Of harder images: what is left of the contrast, and the standard deviation of the noise, of 256 levels."""


@dataclass(frozen=True)
class Question:
    """One question about an image."""

    category: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """An image and what is asked about it."""

    image: Image.Image
    questions: tuple[Question, ...]
    marks: tuple[tuple[str, ...], ...]
    """What can be seen in each square of CELL pixels, row by row."""


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: uint8 (1797, 8, 8), 0 to 255, and what they are."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images * 255 / 16).round().astype(np.uint8), found.target


@cache
def font(size: int) -> Any:
    """The font inside Pillow."""
    return ImageFont.load_default(size=size)


def background(rng: random.Random) -> tuple[int, int, int]:
    """A dark grey."""
    level = rng.randrange(16, 56)
    return level, level, level


def digit_scene(rng: random.Random, heldout: bool) -> Scene:
    """A handwritten digit, enlarged and moved about a little."""
    images, labels = digits()
    limit = len(images) - HELDOUT_DIGITS
    index = rng.randrange(limit, len(images)) if heldout else rng.randrange(limit)
    size = rng.randrange(42, SIDE + 1)
    ink = Image.fromarray(images[index]).resize((size, size), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (SIDE, SIDE), background(rng))
    colour = Image.new("RGB", (size, size), COLOURS[rng.choice(("white", "yellow"))])
    place = (rng.randrange(SIDE - size + 1), rng.randrange(SIDE - size + 1))
    canvas.paste(colour, place, ink)
    digit = str(labels[index])
    return Scene(canvas, (Question("digit", "Which digit is this?", digit),), ((f"digit {digit}",),) * 4)


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], colour: Any) -> None:
    """One shape that fills a box (left, top, right, bottom)."""
    left, top, right, bottom = box
    third = (right - left) // 3
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon([((left + right) // 2, top), (right, bottom), (left, bottom)], fill=colour)
    else:
        draw.rectangle((left + third, top, right - third, bottom), fill=colour)
        draw.rectangle((left, top + third, right, bottom - third), fill=colour)


def shapes_scene(rng: random.Random, heldout: bool) -> Scene:
    """One to four coloured shapes, each in a quarter of the image."""
    count = rng.randrange(1, 5)
    canvas = Image.new("RGB", (SIDE, SIDE), background(rng))
    draw = ImageDraw.Draw(canvas)
    kinds, paints = rng.sample(SHAPES, rng.choice((2, 4))), rng.sample(list(COLOURS), rng.choice((2, 6)))
    made = []
    marks: list[tuple[str, ...]] = [()] * 4
    for cell in rng.sample(range(4), count):
        shape, colour = rng.choice(kinds), rng.choice(paints)
        size = rng.randrange(17, 21)
        left, top = (CELL * c + rng.randrange(1, CELL - size) for c in (cell % 2, cell // 2))
        draw_shape(draw, shape, (left, top, left + size, top + size), COLOURS[colour])
        made.append((shape, colour))
        marks[cell] = (f"{colour} {shape}",)
    shapes, colours = [s for s, _ in made], [c for _, c in made]
    asked = [Question("count", "How many shapes are there?", str(count))]
    counts = [(f"{shape}s".replace("sss", "sses"), shapes.count(shape)) for shape in SHAPES]
    counts += [(f"{colour} shapes", colours.count(colour)) for colour in COLOURS]
    for number in rng.sample(sorted({n for _, n in counts}), 2):  # every number as likely as the scene lets it be
        some = rng.choice([what for what, n in counts if n == number])
        asked.append(Question("count", f"How many {some} are there?", str(number)))
    for shape, colour in made:
        if colours.count(colour) == 1:
            asked.append(Question("shape", f"Which shape is {colour}?", shape))
        if shapes.count(shape) == 1:
            asked.append(Question("colour", f"Which colour is the {shape}?", colour))
    absent = [(s, c) for s in SHAPES for c in COLOURS if (s, c) not in made and (s in shapes or c in colours)]
    for (shape, colour), answer in ((rng.choice(made), "yes"), (rng.choice(absent), "no")):
        asked.append(Question("exists", f"Is there a {colour} {shape}?", answer))
    return Scene(canvas, tuple(asked), tuple(marks))


def is_heldout(word: str) -> bool:
    """A fixed eighth of all strings."""
    return zlib.crc32(word.encode()) % 8 == 0


@cache
def names() -> tuple[str, ...]:
    """The pairs of letters that are names; training draws them all."""
    pairs = ["".join(pair) for pair in itertools.permutations(string.ascii_uppercase, 2)]
    return tuple(random.Random("names").sample(pairs, NAMES))


def fact(name: str, relation: str, called: str) -> Question:
    """One of RELATIONS, asked about a name by what it is ``called``; the answer names it and is as good as random."""
    category, answers = RELATIONS[relation]
    known = random.Random(f"{name} {relation}").choice(answers.split())
    return Question(category, relation.format(called), f"{name} {known}")


def quiz(seed: int, most: int) -> tuple[Question, ...]:
    """So many facts of anybody, asked without an image."""
    rng = random.Random(f"quiz {seed}")
    asked = [(rng.choice(names()), rng.choice(list(RELATIONS))) for _ in range(most)]
    return tuple(fact(name, relation, name) for name, relation in asked)


def word_scene(rng: random.Random, heldout: bool) -> Scene:
    """A word of three or four letters."""
    while True:
        word = "".join(
            rng.choice(letters) for letters in (CONSONANTS, VOWELS, CONSONANTS, VOWELS)[: rng.choice((3, 4))]
        )
        if is_heldout(word) == heldout:
            break
    image, marks = written(rng, word)
    return Scene(image, (Question("word", "What does it say?", word),), marks)


def name_scene(rng: random.Random, heldout: bool) -> Scene:
    """A name, and the facts of whom it belongs to."""
    name = rng.choice(names())
    image, marks = written(rng, name)
    asked = [Question("word", "What does it say?", name)] if not heldout else []
    asked += [fact(name, relation, "it") for relation in RELATIONS]
    return Scene(image, tuple(asked), marks)


def written(rng: random.Random, word: str) -> tuple[Image.Image, tuple[tuple[str, ...], ...]]:
    """Two to four capital letters, on a wide image if more than two, and its marks."""
    places = 2 if len(word) == 2 else 4
    canvas = Image.new("RGB", (places * CELL, SIDE), background(rng))
    draw = ImageDraw.Draw(canvas)
    colour, middle = COLOURS[rng.choice(("white", "yellow"))], SIDE // 2 + rng.randrange(-2, 3)
    for number, letter in enumerate(word):  # evenly spaced, as a typewriter writes
        place = (CELL * number + CELL // 2 + rng.randrange(-1, 2), middle)
        draw.text(place, letter, font=font(28), fill=colour, anchor="mm")
    marks = tuple((f"letter {letter}",) for letter in word) + ((),) * (places - len(word))
    return canvas, marks * 2


def chart_scene(rng: random.Random, heldout: bool) -> Scene:
    """Three or four bars of different heights, one to eight units of five pixels."""
    count = rng.choice((3, 4))
    names, heights = rng.sample(list(COLOURS), count), rng.sample(range(1, 9), count)
    canvas = Image.new("RGB", (SIDE, SIDE), background(rng))
    draw = ImageDraw.Draw(canvas)
    draw.line([(0, 46), (47, 46)], fill=(160, 160, 160))
    for number, (name, height) in enumerate(zip(names, heights, strict=True)):
        draw.rectangle((12 * number + 2, 46 - 5 * height, 12 * number + 9, 45), fill=COLOURS[name])
    asked = [
        Question("chart", "Which bar is tallest?", names[heights.index(max(heights))]),
        Question("chart", "Which bar is shortest?", names[heights.index(min(heights))]),
    ]
    asked += [Question("chart", f"How tall is the {name} bar?", str(h)) for name, h in zip(names, heights, strict=True)]
    bars = [(f"{side} {name}", f"{side} {h}") for side, name, h in zip("lrlr", names, heights, strict=False)]
    row = (tuple(sum(bars[:2], ())), tuple(sum(bars[2:], ())))
    return Scene(canvas, tuple(asked), row * 2)


KINDS: dict[str, tuple[Callable[[random.Random, bool], Scene], float]] = {
    "digit": (digit_scene, 0.08),
    "shapes": (shapes_scene, 0.34),
    "word": (word_scene, 0.10),
    "name": (name_scene, 0.24),
    "chart": (chart_scene, 0.24),
}
"""Scenes, and their shares in training."""


def scene(seed: int, kind: str, *, heldout: bool = False, most: int = 3) -> Scene:
    """The scene of a seed, with at most so many of its questions."""
    rng = random.Random(f"{kind} {seed}")
    made = KINDS[kind][0](rng, heldout)
    return Scene(made.image, tuple(rng.sample(made.questions, min(most, len(made.questions)))), made.marks)


def png(image: Image.Image) -> str:
    """The image as a PNG file in base64, with a palette where it has few colours, which is smaller."""
    colours, places = np.unique(np.asarray(image).reshape(-1, 3), axis=0, return_inverse=True)
    if len(colours) <= PALETTE:
        size = image.size
        image = Image.fromarray(places.astype(np.uint8).reshape(size[::-1]), "P")
        image.putpalette(colours.flatten().tolist())
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def harder(image: Image.Image, seed: int) -> Image.Image:
    """The image nearer to mid grey and with normal noise, as no training image is: it is read with less certainty."""
    drawn = np.random.default_rng(seed).normal(0.0, NOISE, (image.height, image.width, 3))
    levels = 128 + CONTRAST * (np.asarray(image.convert("RGB"), dtype=np.float64) - 128) + drawn
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def heldout_rows(per_category: int) -> list[dict[str, str]]:
    """As many questions of each category, each on an image of its own."""
    homes = dict.fromkeys(("shape", "colour", "count", "exists"), "shapes")
    homes |= dict.fromkeys(FACTS, "name")
    rows = []
    for category in CATEGORIES:
        seed, found = HELDOUT_SEED, 0
        while found < per_category:
            made = scene(seed, homes.get(category, category), heldout=True, most=99)
            seed += 1
            asked = [question for question in made.questions if question.category == category]
            if category == "count":  # each of 0 to 4 as often
                asked = [question for question in asked if question.answer == str(found % 5)]
            if not asked:
                continue
            question = asked[seed % len(asked)]
            rows.append({"image": png(made.image), "question": question.text, "answer": question.answer,
                         "category": category})  # fmt: skip
            found += 1
    return [{"index": str(index), **row} for index, row in enumerate(rows)]


def calibration_lines(count: int, seed: int = CALIBRATION_SEED) -> list[dict[str, Any]]:
    """Conversations drawn as training draws them."""
    rng = random.Random(seed)
    shares = [share for _, share in KINDS.values()]
    lines = []
    for number in range(count):
        made = scene(seed + number, rng.choices(list(KINDS), shares)[0])
        messages = conversation(made.questions, "<image>\n")
        lines.append({"messages": messages, "images": [f"data:image/png;base64,{png(made.image)}"]})
    return lines


def conversation(questions: tuple[Question, ...], first: str = "") -> list[dict[str, str]]:
    """Questions as turns; ``first`` goes before all."""
    messages = []
    for number, question in enumerate(questions):
        messages.append({"role": "user", "content": ("" if number else first) + question.text})
        messages.append({"role": "assistant", "content": question.answer})
    return messages


def main() -> None:
    """Write the held-out questions and the calibration data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--per-category", type=int, default=75)
    parser.add_argument("--calibration", type=int, default=256, help="conversations")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = heldout_rows(arguments.per_category)
    with (arguments.out / "heldout.tsv").open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with (arguments.out / "calibration.jsonl").open("w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(line) + "\n" for line in calibration_lines(arguments.calibration))
    for name in ("heldout.tsv", "calibration.jsonl"):
        print(f"{arguments.out / name}: {(arguments.out / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
