"""Tables of codebooks.json and codebooks_speed.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common import table


def codebooks(results: Mapping[str, Any]) -> dict[str, str]:
    """What each way to store two bits loses, and the seeds of what the package has."""
    last = results["runs"][-1]
    rows = [
        [r["name"], f"{r['bits']:.4g}", f"{r['kl']:.5f}", _relative(r), f"{100 * r['output_lost']:.2f}"]
        for r in last["rows"]
    ]
    seeds = [
        [name, *(_relative(r) for run in results["runs"] for r in run["rows"] if r["name"] == name)]
        for name in [r["name"] for r in results["runs"][0]["rows"]]
    ]
    gaussian = [[name, f"{100 * lost:.1f}"] for name, lost in results["gaussian"].items()]
    return {
        "codebooks": table(["", "bits a weight", "KL", "of 2g128", "output lost, %"], rows),
        "codebooks seeds": table(["KL by that of 2g128", *(f"seed {run['seed']}" for run in results["runs"])], seeds),
        "codebooks gaussian": table(["", "squares lost, %"], gaussian),
    }


def _relative(row: Mapping[str, Any]) -> str:
    return f"{row['relative']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def speed(results: Mapping[str, Any]) -> dict[str, str]:
    """Milliseconds of a layer of OLMoE-1B-7B, uniform and with codebooks."""
    rows = [
        [where, name, f"{row['kernel ms']:.3f}", f"{row['layer ms']:.3f}", f"{100 * row['kernel share']:.0f} %"]
        for where, kinds in results["rows"].items()
        for name, row in kinds.items()
    ]
    return {"codebooks speed": table(["", "bits", "products, ms", "layer, ms", "products, share of a read"], rows)}
