"""What every benchmark shares: one thread, and a results file that says where its numbers come from."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("mopeq", "torch", "transformers", "safetensors", "numpy", "scipy")


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=RESULTS / f"{name}.json", help="results file")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    return parser


def study_arguments(description: str, name: str) -> argparse.ArgumentParser:
    """A parser with the options of every study that calibrates a model and judges it on held-out text."""
    parser = arguments(description, name)
    parser.add_argument("--model", required=True, help="folder or hub id of the original")
    parser.add_argument("--label", default="", help="how results call the model")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--text", required=True, nargs="+", help="held-out text files")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence, and of a held-out window")
    parser.add_argument("--windows", type=int, default=48, help="held-out windows, evenly spread over all files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the calibration")
    return parser


def kept_runs(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs of an earlier file of the same settings, each with the commit that it was made at."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if any(found["results"].get(key) != value for key, value in settings.items()):
        return []
    return [{"seed": r["seed"], "commit": r.get("commit", found["commit"]), "rows": r["rows"]}
            for r in found["results"]["runs"]]  # fmt: skip


def settings_of(asked: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What a study's runs have in common."""
    return {
        "model": asked.label or Path(asked.model).name, "windows": asked.windows, "length": asked.length,
        "samples": asked.samples, **more,
    }  # fmt: skip


def run_of(results: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The run of a seed among the results, which get one that has no rows yet if there is none."""
    found: dict[str, Any] | None = next((run for run in results["runs"] if run["seed"] == seed), None)
    if found is None:
        found = {"seed": seed, "commit": START["commit"], "rows": []}
        results["runs"].append(found)
    return found


def store(path: Path, results: Mapping[str, Any]) -> None:
    """Write ``results`` with machine, commit, command, date and versions, beside the target and renamed into place."""
    from mopeq.stats import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**START, "date": _now(), "results": results})


def provenance() -> dict[str, Any]:
    """Where and how this process runs."""
    words = ["benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "memory_bytes": _memory()},
        "commit": _git("rev-parse", "HEAD"),
        "changed_since_commit": _git("diff", "--name-only", "HEAD", "--", "src").splitlines(),
        "command": "python " + shlex.join(words),
        "started": _now(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


START = provenance()
"""Taken on import: the tree may change while a benchmark runs."""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def interpolated(points: Sequence[tuple[int, float]], size: int) -> float:
    """KL of uniform models at ``size`` bytes: log-linear between neighbours, or along the last two outside."""
    if len(points) < 2:
        return math.nan
    at = max(i for i in range(len(points) - 1) if i == 0 or points[i][0] <= size)
    (x0, y0), (x1, y1) = points[at], points[at + 1]
    share = (size - x0) / (x1 - x0)
    return math.exp((1 - share) * math.log(y0) + share * math.log(y1))


def estimate(values: Sequence[float]) -> Any:
    """The mean of windows' values, with its interval."""
    from mopeq.evaluate.bootstrap import ratio_estimate

    return ratio_estimate(values, [1] * len(values))
