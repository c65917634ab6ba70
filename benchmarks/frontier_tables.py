"""Tables of the frontier, and its picture: KL against bytes of the knapsack, its controls and its peers."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from common import RESULTS, ROOT, estimate, interpolated, table
from pictures import BOTTOM, LEFT, RIGHT, TOP, drawn

Row = dict[str, Any]
MAIN = re.compile(r"(ours|ours-0|uniform) [\d.]+")
NUMBER = re.compile(r"^random \d+ =")
STYLES = {
    "uniform": ("uniform GPTQ", "#5b5b5b"),
    "ours": ("knapsack", "#0b62c4"),
    "pruned": ("knapsack that may leave experts out", "#1f8a4c"),
    "control": ("other allocations, same codes", "#c97b12"),
    "peer": ("other quantizers", "#b3252f"),
}


def frontier(results: Mapping[str, Any]) -> dict[str, str]:
    """Sizes, controls at equal bytes, peers, perplexity by domain, answers to questions, and how predictions rank."""
    named = rows_of(results)
    return {
        "frontier": _sizes(named, results),
        "frontier controls": _controls(named),
        "frontier peers": _peers(named, results),
        "frontier domains": _domains(named),
        "frontier questions": _questions(results),
        "frontier ranks": _ranks(results),
        "frontier seconds": _seconds(results),
    }


def rows_of(results: Mapping[str, Any]) -> dict[str, list[Row]]:
    """``{name: rows of all seeds}``; random draws of one histogram share a name."""
    named: dict[str, list[Row]] = {}
    for run in results["runs"]:
        for row in run["rows"]:
            named.setdefault(NUMBER.sub("random =", row["name"]), []).append({**row, "seed": run["seed"]})
    return named


def pooled(rows: Sequence[Row], key: str = "window_kl") -> list[float]:
    """Each window's value, the mean over rows; every seed counts once."""
    seeds = [[row for row in rows if row["seed"] == seed] for seed in dict.fromkeys(row["seed"] for row in rows)]
    means = [[sum(v) / len(v) for v in zip(*(row[key] for row in part), strict=True)] for part in seeds]
    return [sum(values) / len(values) for values in zip(*means, strict=True)]


def _called(name: str) -> str:
    return name.replace("ours-0", "knapsack with 0").replace("ours", "knapsack")


def mean(rows: Sequence[Row], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def _line(named: Mapping[str, Sequence[Row]]) -> list[tuple[int, float]]:
    return sorted((row["bytes"], mean(rows, "kl")) for name, rows in named.items() if name.startswith("uniform ")
                  for row in rows[:1])  # fmt: skip


def _shown(values: Sequence[float], digits: int = 4) -> tuple[str, str]:
    found = estimate(values)
    return f"{found.value:.{digits}f}", f"{found.low:.{digits}f} to {found.high:.{digits}f}"


def _sizes(named: Mapping[str, Sequence[Row]], results: Mapping[str, Any]) -> str:
    line = _line(named)
    chosen = [name for name in named if MAIN.fullmatch(name)]
    body = []
    for name in sorted(chosen, key=lambda n: named[n][0]["bytes"]):
        rows = named[name]
        kl = [row["kl"] for row in rows]
        ratio = mean(rows, "kl") / interpolated(line, round(mean(rows, "bytes")))
        body.append([
            _called(name), f"{mean(rows, 'bits'):.3f}", f"{mean(rows, 'bytes') / 1e6:.2f}",
            *_shown(pooled(rows)), f"{min(kl):.4f} to {max(kl):.4f}", len(rows), f"{ratio:.2f}",
            f"{mean(rows, 'perplexity'):.2f}", f"{100 * mean(rows, 'top1'):.1f}",
        ])  # fmt: skip
    original = next(iter(named.values()))[0]["perplexity_original"]
    body.append(
        ["original", "16", f"{results['original_bytes'] / 1e6:.2f}", "0", "", "", "", "", f"{original:.2f}", "100"]
    )
    head = ["map", "bits per expert weight", "MB", "KL", "95 % interval", "over seeds", "seeds",
            "KL / uniform at these bytes", "perplexity", "top-1 %"]  # fmt: skip
    return table(head, body)


def _controls(named: Mapping[str, Sequence[Row]]) -> str:
    line = _line(named)
    body = []
    for name, rows in named.items():
        if rows[0]["kind"] != "control":
            continue
        what, _, bits = name.rpartition(" = ")
        ours = [row for row in named[rows[0]["like"]] if row["seed"] in {r["seed"] for r in rows}]
        gap = estimate([a - b for a, b in zip(pooled(ours), pooled(rows), strict=True)])
        seeds = {row["seed"] for row in rows}
        won = sum(
            mean([r for r in ours if r["seed"] == seed], "kl") < mean([r for r in rows if r["seed"] == seed], "kl")
            for seed in seeds
        )
        ratio = mean(rows, "kl") / interpolated(line, round(mean(rows, "bytes")))
        cells = [
            f"{mean(rows, 'kl'):.4f}",
            f"{mean(ours, 'kl'):.4f}",
            f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})",
        ]
        body.append((float(bits), mean(rows, "kl"), [bits, what, *cells, f"{won} of {len(seeds)}", f"{ratio:.2f}"]))
    head = [
        "bits",
        "allocation",
        "KL",
        "knapsack",
        "knapsack above it, 95 %",
        "seeds won",
        "KL / uniform at these bytes",
    ]
    return table(head, [cells for *_, cells in sorted(body, key=lambda line: line[:2])])


def _peers(named: Mapping[str, Sequence[Row]], results: Mapping[str, Any]) -> str:
    body = []
    for name, rows in named.items():
        if rows[0]["kind"] != "peer":
            continue
        (row,) = rows
        own = [r for n, many in named.items() if re.fullmatch(r"ours [\d.]+|ours-0 2.0|uniform 2", n) for r in many
               if r["seed"] == row["seed"] and r["bytes"] <= row["bytes"]]  # fmt: skip
        cells = ["no map is as small", "", ""]
        if own:
            best = max(own, key=lambda r: r["bytes"])
            gap = estimate([a - b for a, b in zip(best["window_kl"], row["window_kl"], strict=True)])
            cells = [
                f"{best['bits']:.3f}",
                f"{best['kl']:.4f}",
                f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})",
            ]
        seconds = row.get("processor_seconds", "")
        body.append((row["bits"], [name, f"{row['bits']:.3f}", *_shown(row["window_kl"]), *cells, seconds]))
    failed = [f"{name}: `{said[:200]}`." for run in results["runs"] for name, said in run.get("failed", {}).items()]
    head = ["quantizer", "bits per expert weight", "KL", "95 % interval", "largest knapsack within its bytes",
            "KL of that", "knapsack above it, 95 %", "processor s"]  # fmt: skip
    return table(head, [cells for _, cells in sorted(body, key=lambda line: line[0])]) + "".join(
        f"\n{f}\n" for f in failed
    )


def _domains(named: Mapping[str, Sequence[Row]]) -> str:
    domains = list(next(iter(named.values()))[0]["by_domain"])
    chosen = [name for name in named if MAIN.fullmatch(name)]
    body = [
        [_called(name), *(f"{mean([row['by_domain'] for row in rows], d):.2f}" for d in domains)]
        for name, rows in sorted(((n, named[n]) for n in chosen), key=lambda item: item[1][0]["bytes"])
    ]
    return table(["map", *domains], body)


def _questions(results: Mapping[str, Any]) -> str:
    """Share of right answers, and of the nats by which the right one is ahead; both beside the original's, paired.

    The mean over seeds is taken for each question.
    """
    done: list[Mapping[str, Any]] = [run["questions"] for run in results["runs"] if "questions" in run]
    if not done:
        return ""
    size = {name: mean(rows, "bits") for name, rows in rows_of(results).items()}
    body, usual = [], done[-1]["original"]
    for name in sorted({n for said in done for n in said}, key=lambda n: size.get(n, math.inf)):
        rows = [said[name] for said in done if name in said]
        right = [100 * sum(map(int, each)) / len(each) for each in zip(*(r["right"] for r in rows), strict=True)]
        ahead = [sum(each) / len(each) for each in zip(*(r["margins"] for r in rows), strict=True)]
        cells = [_gap(right, [100.0 * int(one) for one in usual["right"]], 1), _gap(ahead, usual["margins"], 3)]
        if name == "original":
            rows, cells = [], ["", ""]
        value, interval = _shown(right, 1)
        bits = f"{size[name]:.3f}" if name in size else "16"
        body.append([_called(name), bits, len(rows) or "", value, interval, cells[0], _shown(ahead, 3)[0], cells[1]])
    head = ["model", "bits", "seeds", "right, %", "95 % interval", "than the original, 95 %", "nats ahead",
            "than the original, 95 %"]  # fmt: skip
    return f"{len(usual['right'])} questions.\n\n" + table(head, body)


def _gap(first: Sequence[float], second: Sequence[float], digits: int) -> str:
    found = estimate([a - b for a, b in zip(first, second, strict=True)])
    return f"{found.value:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"


def _ranks(results: Mapping[str, Any]) -> str:
    """Rank correlation of what is predicted of maps with their KL: those of the other tables, and random ones."""
    body = []
    for run in results["runs"]:
        rows = [row for row in run["rows"] if row["kind"] in ("ours", "pruned", "control")]
        drawn = {sizes: [row for row in run.get("draws", ()) if row["sizes"] == sizes] for sizes in ("one", "many")}
        parts = {
            "of the tables above": rows,
            "of these, at 2.5 bits": [
                row for row in rows if row["name"].endswith("= 2.5") or row["name"] == "ours 2.5"
            ],
            "random, 2.2 to 4.0 bits": drawn["many"],
            "random, 2.5 bits each": drawn["one"],
            "random, both": [*drawn["many"], *drawn["one"]],
        }
        for what, part in parts.items():
            if len(part) > 2:
                kl = [row["kl"] for row in part]
                rank = spearmanr([row["predicted"] for row in part], kl).statistic
                body.append([run["seed"], what, len(part), f"{min(kl):.4f} to {max(kl):.4f}", f"{rank:.3f}"])
    return table(["seed", "maps", "how many", "KL", "Spearman"], body)


def _seconds(results: Mapping[str, Any]) -> str:
    names = list(results["runs"][0]["seconds"])
    return table(["seed", *names], [[run["seed"], *(run["seconds"][n] for n in names)] for run in results["runs"]])


def picture(named: Mapping[str, Sequence[Row]]) -> str:
    """KL on a logarithmic axis against megabytes, as SVG; uniform models and the knapsack's joined by lines."""
    points = [
        (r["kind"], name, mean(rows, "bytes") / 1e6, mean(rows, "kl")) for name, rows in named.items() for r in rows[:1]
    ]
    sizes, values = [p[2] for p in points], [math.log10(p[3]) for p in points]
    ends = (min(sizes) - 0.2, max(sizes) + 0.2), (min(values) - 0.05, max(values) + 0.05)

    def at(size: float, kl: float) -> tuple[float, float]:
        x = LEFT + (size - ends[0][0]) / (ends[0][1] - ends[0][0]) * (RIGHT - LEFT)
        y = BOTTOM - (math.log10(kl) - ends[1][0]) / (ends[1][1] - ends[1][0]) * (BOTTOM - TOP)
        return round(x, 1), round(y, 1)

    marks = [m * 10.0**d for d in range(-5, 1) for m in (1, 2, 5)]
    ticks = (
        range(math.ceil(ends[0][0]), math.floor(ends[0][1]) + 1),
        [kl for kl in marks if ends[1][0] < math.log10(kl) < ends[1][1]],
    )
    lines = [
        (kind, sorted((size, kl) for k, name, size, kl in points if k == kind))
        for kind in ("uniform", "ours", "pruned")
    ]
    dots = [
        (kind, f"{name}: KL {kl:.4f}, {size:.2f} MB", size, kl)
        for kind, name, size, kl in sorted(points, key=lambda p: list(STYLES).index(p[0]), reverse=True)
    ]
    return drawn(at, ticks, ("checkpoint, MB", "KL to the original, nats per token"), lines, dots, STYLES)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "docs" / "frontier.svg", help="where the picture goes")
    asked = parser.parse_args()
    stored = json.loads((RESULTS / "frontier.json").read_text(encoding="utf-8"))
    asked.out.write_text(picture(rows_of(stored["results"])), encoding="utf-8")


if __name__ == "__main__":
    main()
