"""The tables of docs/results.md, printed from the files in benchmarks/results and nothing else."""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from codebook_tables import codebooks, speed
from common import RESULTS, estimate, interpolated, table
from cpu_kernel import shares
from frontier_tables import frontier
from methods_tables import fitted, methods, unseen
from moqe_tables import moqe
from served_tables import fit, loading, serving, soak
from signround_tables import compensate, gptq_choices, rest, rotated, rotated_speed, signround

Row = dict[str, Any]
NUMBER = re.compile(r"random \d+ =")
COMPARISONS = (
    ("knapsack = uniform 3", "uniform 3"),
    *((f"knapsack = k-means {score} {scope}", f"k-means {score} {scope}")
      for score in ("frequency", "inverse_norm", "hessian_trace") for scope in ("layer", "model")),
    *((first, f"{control} = knapsack {bits}") for bits in (2.5, 2.8) for first, control in (
        (f"knapsack {bits}", "random"), (f"knapsack {bits}", "by frequency"), (f"knapsack {bits}", "by inverse_norm"),
        (f"knapsack {bits}", "inverted"), (f"by frequency = knapsack {bits}", "random"),
        (f"by inverse_norm = knapsack {bits}", "random"),
    )),
    ("k-means inverse_norm layer", "random = k-means inverse_norm layer"),
    ("k-means inverse_norm layer", "inverted = k-means inverse_norm layer"),
    ("k-means frequency layer", "random = k-means frequency layer"),
    ("knapsack 2.5", "knapsack 2.5 whole experts"),
    ("knapsack 3.0", "knapsack 3.0 whole experts"),
    ("knapsack 2.5", "knapsack 2.5 output_error"),
    ("knapsack 3.0", "knapsack 3.0 output_error"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, help="page whose blocks <!-- table NAME --> ... <!-- end --> to renew")
    asked = parser.parse_args()
    blocks: dict[str, str] = {}
    for name, made in PRINTED.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            before = "bundled " if name.startswith("bundled_") else ""
            blocks |= {before + title: block for title, block in made(stored["results"]).items()}
            blocks[f"{name} command"] = f"```\n{stored['command']}\n```\n"
            blocks[f"{name} origin"] = _origin(stored)
    if asked.write is None:
        for name, block in blocks.items():
            print(f"## {name}\n\n{block}")
        return
    page = asked.write.read_text(encoding="utf-8")
    for name, block in blocks.items():
        pattern = rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)"
        page = re.sub(pattern, rf"\g<1>\n{block.replace(chr(92), chr(92) * 2)}\n\g<2>", page, flags=re.DOTALL)
    asked.write.write_text(page, encoding="utf-8")


def _origin(stored: Mapping[str, Any]) -> str:
    machine, versions = stored["machine"], stored["versions"]
    changed = stored["changed_since_commit"]
    tree = f" with changes in {len(changed)} files of src" if changed else ""
    return (
        f"{stored['date'][:10]}, commit {stored['commit'][:10]}{tree}, {machine['processor']}, "
        f"{machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, python {versions['python']}, "
        f"torch {versions['torch']}, "
        f"transformers {versions['transformers']}, scipy {versions['scipy']}.\n"
    )


def by_name(runs: Iterable[Mapping[str, Any]]) -> dict[str, list[list[Row]]]:
    """``{name: for each run its rows}``; random draws of one histogram share a name."""
    made: dict[str, list[list[Row]]] = {}
    for number, run in enumerate(runs):
        uniform = sorted((r["bytes"], r["kl"]) for r in run["rows"] if re.fullmatch(r"uniform \d", r["name"]))
        for row in run["rows"]:
            name = NUMBER.sub("random =", row["name"])
            columns = made.setdefault(name, [])
            columns += [[] for _ in range(number + 1 - len(columns))]
            columns[number].append({**row, "by_uniform": row["kl"] / interpolated(uniform, row["bytes"])})
    return made


def pooled(columns: Sequence[Sequence[Row]]) -> list[float]:
    """KL of every window, the mean over all rows."""
    rows = [row["window_kl"] for column in columns for row in column]
    return [sum(values) / len(values) for values in zip(*rows, strict=True)]


def mean(columns: Sequence[Sequence[Row]], key: str) -> float:
    values: list[float] = [row[key] for column in columns for row in column]
    return sum(values) / len(values)


def spread(columns: Sequence[Sequence[Row]], key: str, digits: int) -> str:
    values = [row[key] for column in columns for row in column]
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def maps(results: Mapping[str, Any]) -> dict[str, str]:
    """The main table, controls, paired comparisons at equal bytes, and how well predictions rank."""
    named = by_name(results["runs"])
    ordered = sorted(named, key=lambda name: mean(named[name], "bytes"))
    main = [name for name in ordered if " = " not in name and not name.endswith(("whole experts", "output_error"))]
    head = ["map", "bits per expert weight", "MB", "resident MB", "KL", "95 % interval", "over seeds", "perplexity",
            "top-1 %", "KL / uniform at these bytes", "predicted"]  # fmt: skip
    pairs = [compared(named, *pair) for pair in COMPARISONS if set(pair) <= set(named)]
    versus = ["first", "second, equal bytes", "KL of first", "KL of second", "first - second, 95 %", "ratio",
              "seeds won"]  # fmt: skip
    other = ["map", "bits per expert weight", "MB", "KL", "over seeds", "KL / uniform at these bytes"]
    original = results["runs"][0]["rows"][0]["perplexity_original"]
    first = ["original", "16", f"{results['original_bytes'] / 1e6:.2f}", f"{results['original_bytes'] / 1e6:.2f}", "0",
             "", "", f"{original:.2f}", "100", "", ""]  # fmt: skip
    return {
        "maps": table(head, [*(_line(name, named[name]) for name in main), first]),
        "others": table(other, [_brief(name, named[name]) for name in ordered if name not in main]),
        "comparisons": table(versus, pairs),
        "ranks": table(["seed", "maps", "fisher_error", "output_error"], [correlated(r) for r in results["runs"]]),
    }


def _line(name: str, columns: Sequence[Sequence[Row]]) -> list[str]:
    kl = estimate(pooled(columns))
    rows = [row for column in columns for row in column]
    guess = sum(row["predicted"]["fisher_error"] for row in rows) / len(rows)
    return [
        name, f"{mean(columns, 'expert_bits'):.3f}", f"{mean(columns, 'bytes') / 1e6:.2f}",
        f"{mean(columns, 'resident_bytes') / 1e6:.2f}", f"{kl.value:.4f}", f"{kl.low:.4f} to {kl.high:.4f}",
        spread(columns, "kl", 4), f"{mean(columns, 'perplexity'):.2f}", f"{100 * mean(columns, 'top1'):.1f}",
        "" if "g128" in name else f"{mean(columns, 'by_uniform'):.2f}", f"{guess:.4f}",
    ]  # fmt: skip


def _brief(name: str, columns: Sequence[Sequence[Row]]) -> list[str]:
    return [name, f"{mean(columns, 'expert_bits'):.3f}", f"{mean(columns, 'bytes') / 1e6:.2f}",
            f"{mean(columns, 'kl'):.4f}", spread(columns, "kl", 4), f"{mean(columns, 'by_uniform'):.2f}"]  # fmt: skip


def compared(named: Mapping[str, Sequence[Sequence[Row]]], first: str, second: str) -> list[str]:
    """A paired comparison: windows resampled together, after the mean over seeds (and draws)."""
    a, b = pooled(named[first]), pooled(named[second])
    gap = estimate([x - y for x, y in zip(a, b, strict=True)])
    won = sum(
        sum(r["kl"] for r in x) / len(x) < sum(r["kl"] for r in y) / len(y)
        for x, y in zip(named[first], named[second], strict=True)
    )
    value, other = estimate(a).value, estimate(b).value
    interval = f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"
    return [first, second, f"{value:.4f}", f"{other:.4f}", interval, f"{value / other:.2f}",
            f"{won} of {len(named[first])}"]  # fmt: skip


def correlated(run: Mapping[str, Any]) -> list[str]:
    """Spearman's rank correlation of predicted and measured loss over the mixed maps of one run."""
    rows = [r for r in run["rows"] if not r["name"].startswith("uniform")]
    found = [
        spearmanr([r["predicted"][cost] for r in rows], [r["kl"] for r in rows]).statistic
        for cost in ("fisher_error", "output_error")
    ]
    return [str(run["seed"]), str(len(rows)), *(f"{value:.3f}" for value in found)]


def vlm(results: Mapping[str, Any]) -> dict[str, str]:
    """MoPEQ's comparison on questions about images: all maps, pairs at equal bytes, and what calibration is worth."""
    runs = [run for run in results["runs"] if run["arm"] == "images"]
    named = by_name(runs)
    ordered = sorted(named, key=lambda name: mean(named[name], "bytes"))
    tasks = list(results["original"]["by_task"])
    head = ["map", "bits per expert weight", "MB", "KL", "95 % interval", "over seeds", "KL / uniform at these bytes",
            "right %", *tasks]  # fmt: skip
    whole = results["original"]
    shares = [whole["right"], *whole["by_task"].values()]
    last = ["original", "16", f"{results['original_bytes'] / 1e6:.2f}", "0", "", "", "", *_percent(shares)]
    pairs = [compared(named, *pair) for pair in COMPARISONS if set(pair) <= set(named)]
    versus = ["first", "second, equal bytes", "KL of first", "KL of second", "first - second, 95 %", "ratio",
              "seeds won"]  # fmt: skip
    return {
        "vlm maps": table(head, [*(_answered(name, named[name], tasks) for name in ordered), last]),
        "vlm comparisons": table(versus, pairs),
        "vlm ranks": table(["seed", "maps", "fisher_error", "output_error"], [correlated(run) for run in runs]),
        "vlm calibration": _calibrations(results["runs"]),
        "vlm plain": _plain(named, results["original"]["plain"], tasks),
    }


def parts(results: Mapping[str, Any]) -> dict[str, str]:
    """What few bits in one part of the bundled vision-language model cost, the other parts whole.

    Parts that cannot be packed, whose bytes are the same at all bits, are left out.
    """
    sizes = {part: {row["bytes"] for row in results["rows"] if row["part"] == part} for part in results["weights"]}
    weights = {part: count for part, count in results["weights"].items() if len(sizes[part]) > 1}
    weights["all"] = sum(weights.values()) - weights["all"]
    tasks = list(results["original"]["by_task"])
    head = ["rounded", "weights", "bits", "KL", "95 % interval", "right %", *tasks]

    def shares(row: Mapping[str, Any]) -> list[str]:
        return _percent([row["right"], *(row["by_task"][task] for task in tasks)])

    rows = [
        [row["part"].replace("_", " "), f"{weights[row['part']]:,}", row["bits"], f"{row['kl']:.4f}",
         f"{row['kl_low']:.4f} to {row['kl_high']:.4f}", *shares(row)]
        for row in results["rows"] if row["part"] in weights
    ]  # fmt: skip
    return {"vlm parts": table(head, [*rows, ["nothing", "", "", "0", "", *shares(results["original"])]])}


def _plain(named: Mapping[str, Sequence[Sequence[Row]]], original: Row, tasks: Sequence[str]) -> str:
    """Maps that were judged on images as drawn, too."""
    judged = {name: columns for name, columns in named.items() if "plain" in columns[0][0]}
    rows = []
    for name in sorted(judged, key=lambda name: mean(judged[name], "bytes")):
        found = [row["plain"] for column in judged[name] for row in column]
        columns = [[row] for row in found]
        kl = estimate(pooled(columns))
        shares = [[row["right"], *(row["by_task"][task] for task in tasks)] for row in found]
        largest = sum(sum(sorted(row["window_kl"])[-3:]) / sum(row["window_kl"]) for row in found) / len(found)
        rows.append([name, f"{kl.value:.4f}", f"{kl.low:.4f} to {kl.high:.4f}", f"{100 * largest:.0f}",
                     *_percent([sum(values) / len(values) for values in zip(*shares, strict=True)])])  # fmt: skip
    shares = [original["right"], *(original["by_task"][task] for task in tasks)]
    head = ["map", "KL", "95 % interval", "three questions' share of it, %", "right %", *tasks]
    return table(head, [*rows, ["original", "0", "", "", *_percent(shares)]])


def _answered(name: str, columns: Sequence[Sequence[Row]], tasks: Sequence[str]) -> list[str]:
    rows = [row for column in columns for row in column]
    kl = estimate(pooled(columns))
    shares = [[row["right"], *(row["by_task"][task] for task in tasks)] for row in rows]
    return [
        name, f"{mean(columns, 'expert_bits'):.3f}", f"{mean(columns, 'bytes') / 1e6:.2f}", f"{kl.value:.4f}",
        f"{kl.low:.4f} to {kl.high:.4f}", spread(columns, "kl", 4), f"{mean(columns, 'by_uniform'):.2f}",
        *_percent([sum(values) / len(values) for values in zip(*shares, strict=True)]),
    ]  # fmt: skip


def _percent(shares: Iterable[float]) -> list[str]:
    return [f"{100 * share:.0f}" if i else f"{100 * share:.1f}" for i, share in enumerate(shares)]


def _calibrations(runs: Sequence[Mapping[str, Any]]) -> str:
    """KL of the maps that every calibration makes; in parentheses the interval of the difference from images."""
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    named = {arm: by_name(run for run in runs if run["arm"] == arm) for arm in arms}
    rows = []
    for name in dict.fromkeys(name for arm in arms[1:] for name in named[arm]):
        own = pooled(named[arms[0]][name.partition(",")[0]])
        cells = [f"{estimate(own).value:.4f}"]
        for arm in arms[1:]:
            other = pooled(named[arm][name])
            gap = estimate([x - y for x, y in zip(other, own, strict=True)])
            cells.append(f"{estimate(other).value:.4f} ({gap.low:+.4f} to {gap.high:+.4f})")
        rows.append([name, *cells])
    return table(["map", *arms], rows)


def choices(results: Mapping[str, Any]) -> dict[str, str]:
    """Group sizes at equal bits per weight, and quantizers at uniform bits."""
    rows = {row["name"]: row for run in results["runs"] for row in run["rows"]}
    sizes = ("g32", "g64", "g128", "g64 and g128", "g32, g64 and g128")
    budgets = sorted({name.rpartition(" at ")[2] for name in rows if " at " in name}, key=float)
    grid = [
        [bits, *(_cell(rows.get(f"{size} at {bits}"), rows.get(f"g64 at {bits}")) for size in sizes)]
        for bits in budgets
    ]
    known = ("rtn", "rtn-mse", "hqq", "signround", "gptq")
    methods = [m for m in known if f"{m} 2" in rows]
    bits = sorted({name.split()[1] for name in rows if name.split()[0] in methods})
    other = [[b, *(_cell(rows[f"{m} {b}"], rows[f"gptq {b}"]) for m in methods)] for b in bits]
    return {
        "groups": table(["bits per expert weight", *sizes], grid),
        "quantizers": table(["uniform bits", *methods], other),
    }


def recipes(results: Mapping[str, Any]) -> dict[str, str]:
    """What the recipes give and cost."""
    body = []
    for name, row in results["rows"].items():
        above = ("above_default", "above_low", "above_high")
        gain = "{:+.4f} ({:+.4f} to {:+.4f})".format(*(row[k] for k in above)) if above[0] in row else ""
        interval = f"{row['kl_low']:.4f} to {row['kl_high']:.4f}"
        body.append([name, f"{row['expert_bits']:.3f}", f"{row['kl']:.4f}", interval, gain, row["processor_seconds"]])
    head = ["recipe", "bits", "KL", "95 %", "above no recipe", "processor s"]
    return {"recipes": table(head, body)}


def measuring_cost(results: Mapping[str, Any]) -> dict[str, str]:
    """Quantizing with a budget beside quantizing once."""
    body = []
    for label, row in results.items():
        once, *others = row["seconds"].items()
        for way, seconds in others:
            beyond = f"{seconds / once[1] - 1:.2f}"
            body.append([label, f"{row['tokens']:,}", way, f"{once[1]:.1f}", f"{seconds:.1f}", beyond])
    commands = dict.fromkeys(row["command"] for row in results.values())
    head = ["model", "tokens", "with a budget", "quantized once, s", "with the budget, s", "measuring / once"]
    return {"measuring cost": table(head, body), "measuring cost commands": "```\n" + "\n".join(commands) + "\n```\n"}


def cost_share(results: Mapping[str, Any]) -> dict[str, str]:
    """Costs measured on a part of the text, beside those of all of it; the mean over seeds."""
    body = []
    settings = dict.fromkeys((r["cost"], r["share"], r["labels"] == r["seed"]) for r in results["rows"])
    for cost, share, same in settings:
        rows = [r for r in results["rows"] if (r["cost"], r["share"], r["labels"] == r["seed"]) == (cost, share, same)]
        ranks = f"{min(r['spearman_least'] for r in rows):.4f}"
        cells = []
        for bits in (name for name in rows[0] if re.fullmatch(r"\d\.\d+", name)):
            found = [row[bits] for row in rows]
            than = sum(one["than"] for one in found) / len(found)
            windows = zip(*(one["window_difference"] for one in found), strict=True)
            gain = estimate([sum(values) / len(values) for values in windows])
            percent = "{:+.1f} ({:+.1f} to {:+.1f})".format(
                *(100 * v / than for v in (gain.value, gain.low, gain.high))
            )
            cells.append(f"{than:.5f}, {percent} %")
        what = f"{share:g} of the text" if same else "all of it, other labels"
        body.append([f"`{cost}`, {what}", ranks, *cells])
    head = [
        "costs",
        "least rank correlation",
        *(f"KL at {bits} bits of all, and the part" for bits in ("2.25", "2.5", "3.0")),
    ]
    return {"cost share": table(head, body)}


def levels(results: Mapping[str, Any]) -> dict[str, str]:
    """Offered bits at equal bits per weight."""
    rows = {row["name"]: row for run in results["runs"] for row in run["rows"]}
    named = [name.split(" at ") for name in rows if " at " in name]
    offered = list(dict.fromkeys(found[0] for found in named))
    grid = [
        [bits, *(_cell(rows[f"{one} at {bits}"], rows[f"2, 3, 4 at {bits}"]) for one in offered)]
        for bits in dict.fromkeys(found[1] for found in named)
    ]
    return {"levels": table(["bits per expert weight", *offered], grid)}


def damping(results: Mapping[str, Any]) -> dict[str, str]:
    """GPTQ's damping and its grids at uniform bits."""
    rows = {row["name"]: row for run in results["runs"] for row in run["rows"]}
    named = [name.split() for name in rows if name.startswith("damping ")]
    values, bits = (list(dict.fromkeys(words[i] for words in named)) for i in (1, 2))
    body = [[b, *(_cell(rows[f"damping {v} {b}"], rows[f"damping {values[0]} {b}"]) for v in values)] for b in bits]
    methods = {"gptq": "0.85 to 1", "gptq-minmax": "1", "gptq-wide": "0.3 to 1.2"}
    uniform = [name.removeprefix("gptq ") for name in rows if name.startswith("gptq ")]
    other = [[p, *(_cell(rows[f"{m} {p}"], rows[f"gptq {p}"]) for m in methods)] for p in uniform]
    return {"damping": table(["uniform bits", *values], body), "grids": table(["uniform", *methods.values()], other)}


def _cell(row: Row | None, beside: Row | None) -> str:
    """KL, and the interval of its paired difference from another."""
    if row is None:
        return "not reachable"
    if beside is None or row is beside:
        return f"{row['kl']:.4f}"
    gap = estimate([x - y for x, y in zip(row["window_kl"], beside["window_kl"], strict=True)])
    return f"{row['kl']:.4f} ({gap.low:+.4f} to {gap.high:+.4f})"


def memory(results: Mapping[str, Any]) -> dict[str, str]:
    rows = []
    for name, found in results.items():
        copies = [copy for run in found["packed"] for copy in run["copies"]]
        made = found["quantize"]
        rows.append([
            name, f"{made['parameters'] / 1e6:.1f}", f"{made['expert_bits']:.2f}",
            f"{found['original_bytes'] / 1e6:.1f}", f"{found['packed_bytes'] / 1e6:.1f}",
            f"{found['resident_further_copy'] / 1e6:.1f}", f"{found['ratio_further_copy']:.3f}",
            f"{found['resident_first_copy'] / 1e6:.1f}", f"{found['constant'] / 1e6:.1f}",
            f"{max(c['peak_loading'] for c in copies) / 1e6:.0f}",
            f"{max(c['peak_forward'] for c in copies) / 1e6:.0f}",
            f"{made['peak'] / 1e6:.0f}", f"{made['seconds']:.0f}",
        ])  # fmt: skip
    head = ["model", "M parameters", "bits", "original MB", "packed MB", "resident MB", "resident / packed",
            "first copy MB", "constant MB", "peak loading MB", "peak forward MB", "peak quantize MB",
            "quantize s"]  # fmt: skip
    return {"memory": table(head, rows)}


def peers_speed(results: Mapping[str, Any]) -> dict[str, str]:
    rows = [
        [name, r["version"], f"{r['processor_seconds']:.1f}", f"{r['seconds_a_layer']:.0f}",
         f"{r['peak_bytes'] / 1e9:.2f}", f"{100 * r['error_calibration']:.3f}", f"{100 * r['error_heldout']:.3f}"]
        for name, r in results["rows"].items() if "error" not in r
    ]  # fmt: skip
    failed = [f"{name}: {r['error']}." for name, r in results["rows"].items() if "error" in r]
    head = ["", "version", "processor s", "s a layer of 64", "peak GB", "error of the output, %", "on other text, %"]
    return {"speed of peers": table(head, rows) + "".join(f"\n{line}\n" for line in failed)}


def floor(results: Mapping[str, Any]) -> dict[str, str]:
    stages = results["rows"]
    rows = [[n, f"{r['seconds']:.2f}", f"{r['operations'] / 1e9:.1f}", f"{r['floor']:.2f}"] for n, r in stages.items()]
    total = {key: sum(r[key] for r in stages.values()) for key in ("seconds", "operations", "floor")}
    rows.append(["all", f"{total['seconds']:.2f}", f"{total['operations'] / 1e9:.1f}", f"{total['floor']:.2f}"])
    head = ["of one expert", "processor s", "10^9 operations", f"s at {results['rate'] / 1e9:.0f} GFLOP/s"]
    return {"floor": table(head, rows)}


def ray(results: Mapping[str, Any]) -> dict[str, str]:
    rows = [
        [name, f"{r['seconds']:.1f}", f"{r['units_seconds']:.1f}" if "units_seconds" in r else "",
         f"{r['load_average']:.1f}", f"{r['waiting_seconds']:.1f}"]
        for name, r in results["rows"].items()
    ]  # fmt: skip
    waiting = f"{results['waiting_units']} units that wait {results['wait']:g} s, s"
    head = ["", f"a layer of {results['experts']} experts, s", "of it in units", "load average", waiting]
    return {"ray": table(head, rows)}


def streaming(results: Mapping[str, Any]) -> dict[str, str]:
    rows = [
        [name, f"{r['original_bytes'] / 1e9:.2f}", f"{r['packed_bytes'] / 1e9:.2f}",
         f"{r['largest_layer_experts_bytes'] / 1e9:.2f}", f"{r['peak_bytes'] / 1e9:.2f}",
         f"{r['processor_seconds']:.0f}", f"{r['seconds']:.0f}"]
        for name, r in results.items()
    ]  # fmt: skip
    head = ["model and flags", "original GB", "packed GB", "experts of a layer, GB", "peak resident GB",
            "processor s", "wall s"]  # fmt: skip
    commands = "\n".join(r["command"] for r in results.values() if "command" in r)
    return {"streaming": table(head, rows), "streaming commands": f"```\n{commands}\n```\n"}


def economy(results: Mapping[str, Any]) -> dict[str, str]:
    rows = [
        [f"{r['group']} {r['shape'][0]} x {r['shape'][1]}", r["apart"], r["shared"], r["times"]]
        for r in results["rows"]
    ]
    return {"economy": table(["matrices", "apart, s", "shared, s", "times"], rows)}


def estimates(results: Mapping[str, Any]) -> dict[str, str]:
    cells, maps = [], []
    for label, row in results.items():
        for name in ("min-max", "searched", "searched, damped"):
            for what in ("moments", "output"):
                found = row[f"{name}, {what}"]
                least = min(found["by option"])
                ratios = ", ".join(f"{ratio:.2f}" for ratio in found["ratio"])
                cells.append([label, name, what, f"{found['all pairs']:.4f}", f"{least:.4f}", ratios,
                              f"{max(found['spread']):.2f}"])  # fmt: skip
        made, spent, count = row["map"], row["spent"], len(row["options"])
        solved = sum(seconds for name, seconds in spent.items() if name.startswith("solved"))
        free = (spent["min-max grids"] + spent["min-max"]) / solved
        sums = made["output error"]
        maps.append([label, row["units"], f"{100 * solved / count / (spent['factors'] + solved / count):.0f}",
                     f"{100 * free:.1f}", f"{100 * spent['inverse'] / (solved / count):.0f}",
                     f"{made['same precision']} of {made['units']}",
                     f"{100 * (sums['estimated'] / sums['measured'] - 1):+.2f}"])  # fmt: skip
    heads = [
        "",
        "steps of",
        "beside",
        "rank correlation, all pairs",
        "least of an option",
        "ratio at each option",
        "spread",
    ]
    costs = ["", "units", "an option's share of quantizing once, %", "its estimate, % of it", "inverse, %",
             "same precision", "output error of the map, %"]  # fmt: skip
    commands = "\n".join(row["command"] for row in results.values())
    return {"estimate": table(heads, cells), "estimated maps": table(costs, maps),
            "estimate commands": f"```\n{commands}\n```\n"}  # fmt: skip


def rounding(results: Mapping[str, Any]) -> dict[str, str]:
    where = list(next(iter(results.values())))
    return {"rounding": table(["ns a weight", *where], [[name, *row.values()] for name, row in results.items()])}


def rows(results: Mapping[str, Any]) -> dict[str, str]:
    names = list(next(iter(results["rows"].values())))
    cells = [[count, *(f"{row[name]:.0f}" for name in names)] for count, row in results["rows"].items()]
    return {"rows": table(["rows", *names], cells)}


def runtime(results: Mapping[str, Any]) -> dict[str, str]:
    """Whole models, and what they take of memory."""
    cells, held = [], []
    for bits, found in results["runs"].items():
        held.append([bits, *(f"{found[key] / 1e9:.2f}" for key in ("bytes", "model bytes", "process grew by"))])
        for threads, made in found.items():
            if not threads.endswith("threads"):
                continue
            read, size = made["rows"]["read"], made["active bytes"] / 1e6
            for name, row in made["rows"].items():
                tokens = made["prompt"] if name == "prefill" else 0 if name == "read" else 1
                cells.append([bits, threads.split()[0], name, f"{size:.0f}", f"{row['ms']:.1f}",
                              f"{1000 * tokens / row['ms']:.1f}" if tokens else "", f"{read['ms'] / row['ms']:.0%}",
                              f"{row['processor ms']:.1f}",
                              f"{read['processor ms'] / row['processor ms']:.0%}"])  # fmt: skip
    head = ["experts' bits", "threads", "what", "MB a token", "ms", "tokens/s", "of the read", "processor ms",
            "of the read's"]  # fmt: skip
    return {
        f"{results['model']} runtime": table(head, cells),
        f"{results['model']} memory": table(["experts' bits", "files GB", "model GB", "process grew by GB"], held),
    }


def runtime_peers(results: Mapping[str, Any]) -> dict[str, str]:
    """Whole models of others, and mopeq in the same turns."""
    cells = []
    for bits, found in results["runs"].items():
        for name, peer in found["peers"].items():
            if "failed" in peer:
                cells.append([name, "", "", "", f"failed: {peer['failed']}"])
            for threads, made in peer.items():
                if not threads.endswith("threads"):
                    continue
                rows, read = made["rows"], made["active bytes"] / made["rows"]["read"]["ms"]
                for who, before, size, memory in (
                    (f"mopeq, {bits} bits", "", made["active bytes"], found["process grew by"]),
                    (name, "peer's ", peer["active bytes"], peer["process"]),
                ):
                    one, many = rows[f"{before}decode"], rows[f"{before}prefill"]
                    cells.append([who, threads.split()[0], f"{size / 1e6:.0f}", f"{1000 / one['ms']:.1f}",
                                  f"{size / one['ms'] / read:.0%}", f"{one['processor ms']:.1f}",
                                  f"{1000 * made['prompt'] / many['ms']:.0f}", f"{memory / 1e9:.1f}"])  # fmt: skip
    head = ["", "threads", "MB a token", "decode, tokens/s", "bytes/s of the read's", "processor ms a token",
            "prefill, tokens/s", "memory GB"]  # fmt: skip
    return {f"{results['model']} peers": table(head, cells)}


def activations(results: Mapping[str, Any]) -> dict[str, str]:
    widths = {bits: row for bits, row in results.items() if bits.isdigit()}
    names = list(next(iter(widths.values())))

    def cell(found: Mapping[str, Any]) -> str:
        low, high = found["more"]
        return f"{found['kl']:.4f}" + (f" ({low:+.5f} to {high:+.5f})" if high > low else "")

    return {"activations": table(["bits", *names], [[b, *(cell(row[n]) for n in names)] for b, row in widths.items()])}


def kernel(results: Mapping[str, Any]) -> dict[str, str]:
    return {"kernel": shares(results)}


def llama_cpp(results: Mapping[str, Any]) -> dict[str, str]:
    cells = []
    for threads in sorted({r["threads"] for r in results["rounds"]}, reverse=True):
        rows = medians([r["rows"] for r in results["rounds"] if r["threads"] == threads])
        read = statistics.median(r["decode"] * r["bytes"] for n, r in rows.items() if n.startswith("plain read"))
        cells += [
            [threads, name, f"{row['bytes'] / 1e6:.0f}", f"{row['file bytes'] / 1e9:.2f}", f"{row['decode']:.1f}",
             f"{row['decode'] * row['bytes'] / read:.0%}", f"{row['prefill']:.0f}" if "prefill" in row else ""]
            for name, row in rows.items()
        ]  # fmt: skip
    head = ["threads", "", "MB a token", "GB of files", "decode, tokens/s", "of the read's rate", "prefill, tokens/s"]
    return {"llama.cpp": table(head, cells), "llama.cpp ratios": _ratios(results["rounds"])}


def _ratios(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Each model over llama.cpp's types within a round, on two threads: medians, and the range over the rounds."""
    two = [r["rows"] for r in rounds if r["threads"] == 2]
    sets = {"decode": ["Q2_K", "Q3_K_M"], "decode ": ["Q4_0"], "prefill": ["Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q8_0"]}
    body = []
    for name in dict.fromkeys(name for rows in two for name in rows if name.startswith("mopeq")):
        of = [rows for rows in two if name in rows]
        cells = []
        for key, kinds in sets.items():
            what = key.strip()
            best = [max(rows[f"llama.cpp {k}"][what] for k in kinds if f"llama.cpp {k}" in rows) for rows in of]
            found = sorted(rows[name][what] / b for rows, b in zip(of, best, strict=True))
            cells.append(f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})")
        body.append([name, len(of), *cells])
    titles = [
        "times as fast",
        "rounds",
        "decode, the faster of Q2_K and Q3_K_M",
        "decode, Q4_0",
        "prefill, the best type",
    ]
    return table(titles, body)


def medians(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Of every number of every row, over the rounds that have the row."""
    names = dict.fromkeys(name for rows in rounds for name in rows)
    of = {name: [rows[name] for rows in rounds if name in rows] for name in names}
    return {name: {key: statistics.median(r[key] for r in rows) for key in rows[0]} for name, rows in of.items()}


def solver(results: Mapping[str, Any]) -> dict[str, str]:
    rows = [
        [f"{r['units']:,} ({r['like']})", r["solver"], f"{1000 * r['seconds_median']:.1f}",
         f"{1000 * r['seconds_max']:.1f}", f"{r['gap_max']:.1e}", f"{r['proven']} of {r['instances']}"]
        for r in results["rows"]
    ]  # fmt: skip
    head = ["units", "solver", "median ms", "longest ms", "largest gap", "finished"]
    return {"solver": table(head, rows)}


def scores(results: Mapping[str, Any]) -> dict[str, str]:
    """Rank correlation of scores with losses: over the model, and in parentheses the mean over layers."""
    head = ["", *(row["score"] for row in results["rows"][:-1])]
    rows = [
        [row["score"], *("" if (found := row.get(other)) is None else f"{found['model']:.2f} ({found['layers']:.2f})"
                         for other in head[1:])]
        for row in results["rows"]
    ]  # fmt: skip
    load = [
        [layer, f"{100 * v['busiest']:.0f}", f"{100 * v['quarter']:.0f}", v["unused"]]
        for layer, v in results["load"].items()
    ]
    return {
        "scores": table(head, rows),
        "load": table(["layer", "busiest expert %", "busiest quarter %", "experts without tokens"], load),
    }


PRINTED = {
    "codebooks": codebooks,
    "codebooks_speed": speed,
    "signround": signround,
    "bundled_signround": signround,
    "gptq_choices": gptq_choices,
    "bundled_gptq_choices": gptq_choices,
    "compensate": compensate,
    "bundled_compensate": compensate,
    "rest": rest,
    "bundled_rest": rest,
    "rotated": rotated,
    "rotated_speed": rotated_speed,
    "fidelity": maps,
    "choices": choices,
    "levels": levels,
    "damping": damping,
    "bundled_fidelity": maps,
    "bundled_choices": choices,
    "bundled_levels": levels,
    "bundled_damping": damping,
    "scores": scores,
    "resident_memory": memory,
    "moqe": moqe,
    "methods": methods,
    "bundled_methods": methods,
    "recipes": recipes,
    "bundled_recipes": recipes,
    "measuring_cost": measuring_cost,
    "cost_share": cost_share,
    "few_bits": methods,
    "bundled_few_bits": methods,
    "unseen": unseen,
    "fitted_costs": fitted,
    "bundled_fitted_costs": fitted,
    "frontier": frontier,
    "bundled_frontier": frontier,
    "solver": solver,
    "streaming": streaming,
    "peers_speed": peers_speed,
    "floor": floor,
    "ray": ray,
    "economy": economy,
    "rounding": rounding,
    "estimate": estimates,
    "fit": fit,
    "soak": soak,
    "serving": serving,
    "loading": loading,
    "vlm_study": vlm,
    "vlm_parts": parts,
    "cpu_rows": rows,
    "activations": activations,
    "cpu_kernel": kernel,
    "cpu_runtime": runtime,
    "cpu_runtime_vl2": runtime,
    "cpu_runtime_peers": runtime_peers,
    "cpu_runtime_peers_vl2": runtime_peers,
    "llama_cpp": llama_cpp,
}

if __name__ == "__main__":
    main()
