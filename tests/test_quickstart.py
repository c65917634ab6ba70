"""The demo: its claims hold, its files are there, and it can be run again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mopeq.checkpoint import verify
from mopeq.errors import OutputError
from mopeq.quickstart import quickstart

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_quickstart(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    found = quickstart(folder, command="mopeq quickstart")
    points = {point.name: point for point in found.points}
    original, uniform, mixed = (points[name] for name in ("original", "uniform 3", "mixed 3"))
    for ours, theirs in ((mixed, uniform), (points["wide 4"], points["uniform 4"])):
        assert ours.bytes <= theirs.bytes
        assert ours.kl_high is not None
        assert theirs.kl_low is not None
        assert ours.kl_high < theirs.kl_low, "mixed precision beats uniform at equal bytes, beyond both intervals"
    assert original.perplexity < mixed.perplexity < uniform.perplexity
    kls = [points[f"uniform {bits}"].kl or 0.0 for bits in (4, 3, 2)]
    assert kls == sorted(kls)
    for name in points.keys() - {"original"}:
        verify(folder / name.replace(" ", "-"))
        assert points[name].bytes < points[name].resident_bytes * 1.15
        assert points[name].resident_bytes < points[name].bytes * 1.15
    assert found.report.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")

    shown = README[README.index("<!-- quickstart -->") : README.index("<!-- /quickstart -->")]
    for name in points:
        assert re.search(rf"^ *{re.escape(name)}  ", shown, flags=re.M), f"README's table has no row for {name}"

    (folder / "mixed-3" / "config.json").unlink()
    quickstart_again = quickstart(folder)
    assert quickstart_again.points == found.points, "the same numbers again"


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(OutputError, match="was not made by mopeq quickstart"):
        quickstart(tmp_path)
    assert (tmp_path / "mine").exists()
