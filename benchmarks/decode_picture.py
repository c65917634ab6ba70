"""Draws docs/decode.svg: tokens a second against the bytes that a token reads, of mopeq, llama.cpp and a plain read.

    python benchmarks/decode_picture.py

From the results of llama_cpp.py, on two threads. Every dot is the median of its rounds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT
from pictures import BOTTOM, LEFT, RIGHT, TOP, drawn
from tables import medians

STYLES = {
    "plain read": ("a plain read of as many bytes", "#8a8a8a"),
    "mopeq": ("mopeq", "#0b62c4"),
    "llama.cpp": ("llama.cpp", "#b3252f"),
}
STEPS, THREADS = (100, 10), 2


def picture(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Of the ``rounds`` of llama_cpp.py, those of two threads."""
    rows = medians([r["rows"] for r in rounds if r["threads"] == THREADS])
    dots = []
    for name, row in rows.items():
        kind = next(kind for kind, (title, _) in STYLES.items() if name.startswith((kind, title)))
        if not name.endswith("one digit"):
            dots.append((kind, f"{name}: {row['decode']:.1f} tokens/s", row["bytes"] / 1e6, row["decode"]))
    least, most = (edge(d[2] for d in dots) // STEPS[0] * STEPS[0] for edge in (min, max))
    sizes = range(int(least), int(most) + 2 * STEPS[0], STEPS[0])
    rates = range(0, int(max(d[3] for d in dots)) + 2 * STEPS[1], STEPS[1])

    def at(size: float, rate: float) -> tuple[float, float]:
        x = LEFT + (size - sizes[0]) / (sizes[-1] - sizes[0]) * (RIGHT - LEFT)
        return round(x, 1), round(BOTTOM - rate / rates[-1] * (BOTTOM - TOP), 1)

    line = sorted((size, rate) for kind, _, size, rate in dots if kind == "mopeq")
    titles = "weights that a token reads, MB", "tokens decoded a second"
    return drawn(at, (sizes, rates), titles, [("mopeq", line)], dots, STYLES)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "docs" / "decode.svg", help="where the picture goes")
    asked = parser.parse_args()
    stored = json.loads((RESULTS / "llama_cpp.json").read_text(encoding="utf-8"))
    asked.out.write_text(picture(stored["results"]["rounds"]), encoding="utf-8")


if __name__ == "__main__":
    main()
