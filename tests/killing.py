"""Runs that are killed and resumed: ``python tests/killing.py 50`` kills that many runs at random points.

A run is a forked process that gets a real SIGKILL after a random time; then the same job is resumed, perhaps to be
killed again, until it ends. What it leaves must be the bytes of a run that nothing interrupted, and no step that was
done may have been done again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mopeq.journal import JOURNAL
from mopeq.measure import Calibration
from mopeq.precision import Precision
from mopeq.quantize import quantize
from tiny import save_tiny

TIMED = ("mopeq/run.json", JOURNAL)
"""Files that tell the time."""
JOBS: dict[str, dict[str, Any]] = {
    "budget": {"budget": "3.4bpw", "options": [Precision(b, 32) for b in (2, 3, 4)]},
    "output error": {"budget": "3.4bpw", "cost": "output_error", "options": [Precision(2, 32), Precision(4, 32)]},
    "uniform": {"uniform": Precision(3, 32)},
    "compensated": {"uniform": Precision(2, 32), "compensate": True},
    "data-free": {"uniform": Precision(3, 32), "method": "rtn-mse"},
}


def text(folder: Path) -> Calibration:
    path = folder / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i}: the quick brown fox jumps. " * 40}) for i in range(12)))
    return Calibration(str(path), samples=16, length=64, batch_size=4)


def made(model: Path, out: Path, job: str, calibration: Calibration, resume: bool = False) -> None:
    quantize(model, out, **JOBS[job], calibration=calibration, evaluated=False, resume=resume)


def forked(model: Path, out: Path, job: str, calibration: Calibration, resume: bool) -> int:
    """A process that carries out the job."""
    process = os.fork()
    if process:
        return process
    try:
        made(model, out, job, calibration, resume)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def killed_after(process: int, seconds: float) -> bool:
    """Whether the process had to be killed; False if it ended by itself, which must be well."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status) != 0


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those that tell the time."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in TIMED}


def done_again(folder: Path) -> list[str]:
    """Steps that the journal says were done twice though what they left was neither lost nor let go."""
    counts: Counter[str] = Counter()
    again = []
    for line in (folder / JOURNAL).read_text().splitlines():
        entry: Mapping[str, Any] = json.loads(line)
        if entry["event"] in ("redo", "drop"):
            counts[entry["step"]] = 0
        elif entry["event"] == "done":
            counts[entry["step"]] += 1
            # the activations that a layer leaves are stored before the layer is done with
            if counts[entry["step"]] > 1 and not entry["step"].startswith(("hidden", "packed", "gradient")):
                again.append(entry["step"])
    return again


def killed_and_resumed(
    model: Path, out: Path, job: str, calibration: Calibration, draw: random.Random, seconds: float
) -> int:
    """Carry out a job that is killed now and then; how often it was."""
    kills = 0
    while True:
        wait = draw.uniform(0, seconds) if kills < 4 else 60 * seconds
        if not killed_after(forked(model, out, job, calibration, resume=kills > 0), wait):
            return kills
        kills += 1


def main(points: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = save_tiny("qwen2_moe", folder / "model", num_hidden_layers=4)
        calibration = text(folder)
        kills = 0
        wanted, seconds = {}, {}
        for job in JOBS:
            started = time.perf_counter()
            made(model, folder / job, job, calibration)
            seconds[job] = time.perf_counter() - started
            wanted[job] = contents(folder / job)
        run = 0
        while kills < points:
            job = draw.choice(list(JOBS))
            out = folder / f"run-{run}"
            run += 1
            kills += killed_and_resumed(model, out, job, calibration, draw, 1.2 * seconds[job])
            assert contents(out) == wanted[job], (job, run)
            assert done_again(out) == [], (job, run)
        print(f"{kills} kills in {run} runs of {len(JOBS)} jobs: every result is that of an uninterrupted run")


if __name__ == "__main__":
    main(int(sys.argv[1]))
