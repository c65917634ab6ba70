"""Draws docs/decode.svg: tokens a second against the bytes that a token reads, of mopeq, llama.cpp and a plain read.

    python benchmarks/decode_picture.py

From the results of llama_cpp.py. Every dot is the median of the rounds of one run; the types of llama.cpp were measured
anew beside each width.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT
from pictures import BOTTOM, LEFT, RIGHT, TOP, drawn

STYLES = {
    "read": ("a plain read of as many bytes", "#8a8a8a"),
    "mopeq": ("mopeq", "#0b62c4"),
    "llama.cpp": ("llama.cpp", "#b3252f"),
}
STEPS = 100, 10


def picture(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Of the ``runs`` of llama_cpp.py."""
    dots = []
    for bits, rows in runs.items():
        for name, row in rows.items():
            kind = {"plain read": "read", "mopeq": "mopeq"}.get(name, name.split()[0])
            if name == "mopeq, one digit":
                continue
            called = f"mopeq, experts at {bits} bits" if kind == "mopeq" else name
            dots.append((kind, f"{called}: {row['decode']:.1f} tokens/s", row["bytes"] / 1e6, row["decode"]))
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
    asked.out.write_text(picture(stored["results"]["runs"]), encoding="utf-8")


if __name__ == "__main__":
    main()
