"""What quantizing a checkpoint takes: seconds, and the peak of resident memory, mapped files counted.

Runs ``mopeq quantize`` on a folder, such as one that ``scripts/random_checkpoint.py`` wrote, in a process of its own,
reads the peak that the kernel noted of it, verifies what was made, and removes it.

    python benchmarks/streaming.py --model build/olmoe --label "OLMoE-1B-7B, random weights" -- --uniform 4 --method rtn
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, START, arguments, store

CODE = "import sys; from mopeq.cli import main; sys.exit(main(sys.argv[1:]))"


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "", "streaming")
    parser.add_argument("--model", required=True, type=Path, help="folder of the original")
    parser.add_argument("--label", required=True, help="how results call it")
    parser.add_argument("--scratch", type=Path, help="folder for what is made (default: the system's)")
    parser.add_argument("flags", nargs="+", help="after --: flags of mopeq quantize; --no-eval is added")
    asked = parser.parse_args()
    results: dict[str, Any] = json.loads(asked.out.read_text())["results"] if asked.out.exists() else {}
    with tempfile.TemporaryDirectory(dir=asked.scratch) as temporary:
        row = measured(asked.model, Path(temporary) / "out", asked.flags, asked.threads)
    results[f"{asked.label}: {' '.join(asked.flags)}"] = row | {k: START[k] for k in ("commit", "command", "started")}
    print(json.dumps(row, indent=1))
    store(asked.out, results)


def measured(model: Path, out: Path, flags: list[str], threads: int) -> dict[str, Any]:
    """One run; bytes, seconds, and the peak of the process."""
    from mopeq.checkpoint import verify

    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", CODE, "quantize", str(model), "-o", str(out), "--no-eval", *flags]
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    verify(out)
    run = json.loads((out / "mopeq" / "run.json").read_text())
    layers = run["inventory"]["layers"].values()
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "stages": run["seconds"],
        "peak_bytes": used.ru_maxrss * 1024,
        "original_bytes": run["original_bytes"],
        "packed_bytes": run["bytes"],
        "expert_bits": round(run["expert_bits"], 3),
        "largest_layer_experts_bytes": max(2 * 3 * experts * hidden * width for experts, hidden, width, _ in layers),
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }


if __name__ == "__main__":
    main()
