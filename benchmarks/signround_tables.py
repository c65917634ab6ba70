"""Tables of signround.json and bundled_signround.json, and of rotated.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from codebook_tables import speed
from common import table


def signround(results: Mapping[str, Any]) -> dict[str, str]:
    """What whole experts lose by each quantizer, on the text it saw and on other text."""
    rows = [
        [r["name"], f"{r['kl']:.5f}", _between(r["more than gptq"]), f"{100 * r['lost, calibration']:.2f}",
         f"{100 * r['lost, held out']:.2f}", r["processor_seconds"]]
        for r in results["runs"][0]["rows"]
    ]  # fmt: skip
    head = [
        "",
        "KL",
        "more than GPTQ's",
        "output lost on the calibration text, %",
        "on other text, %",
        "processor seconds",
    ]
    return {"signround": table(head, rows)}


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
