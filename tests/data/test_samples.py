"""Bundled assets."""

from __future__ import annotations

import pytest

from mopeq.data.samples import TEXTS, bundled_model, bundled_text
from mopeq.data.text import read_texts
from mopeq.errors import DataError


@pytest.mark.parametrize("name", TEXTS)
def test_bundled_text_is_there(name: str) -> None:
    assert sum(map(len, read_texts(bundled_text(name)))) > 50_000


def test_held_out_text_is_not_in_the_calibration_text() -> None:
    seen = set("\n".join(read_texts(bundled_text("calibration.jsonl"))).split("\n"))
    for name in TEXTS[1:]:
        lines = [line for text in read_texts(bundled_text(name)) for line in text.split("\n") if len(line) > 60]
        assert sum(line in seen for line in lines) < 0.01 * len(lines)


def test_unknown_text_lists_those_there_are() -> None:
    with pytest.raises(DataError, match=r"no bundled text 'x'; there are calibration.jsonl, "):
        bundled_text("x")


def test_bundled_model_is_a_folder() -> None:
    assert bundled_model().is_dir()
