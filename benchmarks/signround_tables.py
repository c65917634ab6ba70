"""Tables of ``signround.py``, ``gptq_choices.py``, ``rest.py`` and ``rotated.py``, from their results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from codebook_tables import speed
from common import estimate, interpolated, table


def signround(results: Mapping[str, Any]) -> dict[str, str]:
    """What whole experts lose by each quantizer, on the text it saw and on other text."""
    return {"signround": _beside_gptq(results)}


def gptq_choices(results: Mapping[str, Any]) -> dict[str, str]:
    """GPTQ with one choice changed at a time."""
    return {"gptq choices": _beside_gptq(results)}


def _beside_gptq(results: Mapping[str, Any]) -> str:
    """The mean over the seeds that have a row, beside GPTQ's of the same seeds and precision, window by window."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for run in results["runs"]:
        for row in run["rows"]:
            rows.setdefault(row["name"], []).append({**row, "seed": run["seed"]})
    body = []
    for name in sorted(rows, key=lambda name: name.split()[-1]):
        found = rows[name]
        usual = [r for r in rows[f"gptq {name.split()[-1]}"] if r["seed"] in {row["seed"] for row in found}]
        own, than = (_mean([r["window_kl"] for r in part]) for part in (found, usual))
        gap, whole = estimate([x - y for x, y in zip(own, than, strict=True)]), sum(than) / len(than)
        kl = [row["kl"] for row in found]
        lost = (sum(100 * r[f"lost, {which}"] for r in found) / len(found) for which in ("calibration", "held out"))
        body.append([
            name, f"{sum(kl) / len(kl):.5f}", f"{min(kl):.5f} to {max(kl):.5f}" if len(kl) > 1 else "", len(kl),
            "" if name.startswith("gptq ") else _between([v / whole for v in (gap.value, gap.low, gap.high)]),
            *(f"{value:.2f}" for value in lost), f"{sum(r['processor_seconds'] for r in found) / len(found):.1f}",
        ])  # fmt: skip
    head = ["", "KL", "over seeds", "seeds", "more than GPTQ's", "output lost on the calibration text, %",
            "on other text, %", "processor seconds"]  # fmt: skip
    return table(head, body)


def _mean(windows: list[list[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*windows, strict=True)]


def rest(results: Mapping[str, Any]) -> dict[str, str]:
    """The same bytes with other precisions outside the experts, the mean over seeds."""
    rows: dict[tuple[float, str, str], list[Mapping[str, Any]]] = {}
    for run in results["runs"]:
        for row in run["rows"]:
            rows.setdefault((row["bits"], row["attention"], row["head"]), []).append(row)
    body = []
    for (bits, attention, head), found in sorted(rows.items(), key=lambda item: item[0][0]):
        usual = rows[bits, "8g128s", "8g128s"]
        own, than = (_mean([r["window_kl"] for r in part]) for part in (found, usual[: len(found)]))
        gap, whole = estimate([x - y for x, y in zip(own, than, strict=True)]), sum(than) / len(than)
        won = sum(row["kl"] < other["kl"] for row, other in zip(found, usual, strict=False))
        if attention == "auto":
            attention, head = (f"auto: {', '.join(dict.fromkeys(row['chosen'][i] for row in found))}" for i in (0, 1))
        body.append([
            f"{bits:g}", attention, head, f"{sum(r['expert_bits'] for r in found) / len(found):.2f}",
            f"{sum(r['kl'] for r in found) / len(found):.4f}",
            *(["", ""] if found is usual else [_between([v / whole for v in (gap.value, gap.low, gap.high)]),
                                               f"{won} of {len(found)}"]),
        ])  # fmt: skip
    titles = ["bytes of the default at", "attention", "head", "experts' bits", "KL", "more than the default's, 95 %",
              "seeds won"]  # fmt: skip
    return {"rest": table(titles, body)}


def compensate(results: Mapping[str, Any]) -> dict[str, str]:
    """The same maps with and without ``--compensate``: means over seeds, the range of the change, and shares of what a
    log-linear line through the uniform maps without it has at as many bytes.
    """
    rows: dict[str, list[Mapping[str, Any]]] = {}
    shares: dict[str, list[tuple[float, float]]] = {}
    for run in results["runs"]:
        line = [(row["bytes"], row["kl"][0]) for row in run["rows"] if " at " not in row["name"]]
        for row in run["rows"]:
            rows.setdefault(row["name"], []).append(row)
            there = interpolated(line, row["bytes"])
            shares.setdefault(row["name"], []).append((row["kl"][0] / there, row["kl"][1] / there))
    body = []
    for name, found in rows.items():
        kl = [sum(row["kl"][way] for row in found) / len(found) for way in (0, 1)]
        changes = sorted(100 * row["change"][0] for row in found)
        beyond = sum(row["change"][2] < 0 for row in found)
        of_line = (f"{sum(share[way] for share in shares[name]) / len(found):.2f}" for way in (0, 1))
        spent = [sum(row["processor_seconds"][way] for row in found) for way in (0, 1)]
        body.append([
            name, *(f"{value:.5f}" for value in kl), f"{100 * (kl[1] / kl[0] - 1):+.1f} %",
            f"{changes[0]:+.1f} to {changes[-1]:+.1f}", f"{beyond} of {len(found)}", *of_line,
            f"{spent[1] / spent[0]:.1f}",
        ])  # fmt: skip
    titles = ["map", "KL", "with `--compensate`", "change", "over seeds, %", "beyond 95 % in seeds",
              "of the line", "with it", "processor time, times"]  # fmt: skip
    return {"compensate": table(titles, body)}


def rotated(results: Mapping[str, Any]) -> dict[str, str]:
    """KL with rotated inputs, by that without, for each seed."""
    names = list(dict.fromkeys(r["name"] for run in results["runs"] for r in run["rows"]))
    bits = {r["name"]: r["bits"] for run in results["runs"] for r in run["rows"]}
    kl = [{r["name"]: r for r in run["rows"]} for run in results["runs"]]
    rows = [
        [name, f"{bits[name]:.3f}", *(f"{seed[name]['kl']:.5f}" if name in seed else "" for seed in kl),
         *(f"{seed[name]['relative']:.3f} [{seed[name]['low']:.3f}, {seed[name]['high']:.3f}]"
           if name in seed and "h" in name else "" for seed in kl)]
        for name in names
    ]  # fmt: skip
    seeds = [run["seed"] for run in results["runs"]]
    head = ["", "bits a weight", *(f"KL, seed {s}" for s in seeds), *(f"of that without, seed {s}" for s in seeds)]
    return {"rotated": table(head, rows)}


def rotated_speed(results: Mapping[str, Any]) -> dict[str, str]:
    """Milliseconds of a layer of OLMoE-1B-7B with and without."""
    return {"rotated speed": speed(results)["codebooks speed"]}


def _between(values: list[float]) -> str:
    middle, low, high = (100 * v for v in values)
    return f"{middle:+.1f} % [{low:+.1f}, {high:+.1f}]"
