"""What measuring costs: processor seconds of ``mopeq quantize`` with a budget, beside quantizing once at 3 bits.

Each way runs in this process, after one of four sequences that is not counted, without guard and comparison. Both run
the model over the same calibration text, make moments and pack; with a budget every unit is quantized at every level
and its cost measured, on a quarter of the text unless a way says otherwise, for ``fisher_error`` with a backward pass;
what is packed is taken from there. ``measuring`` is what a way takes beyond quantizing once. Rows of other models stay
in the results file.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common import START, arguments, store
from mopeq.cli import main as mopeq

ONCE = "quantized once"
WAYS = {
    ONCE: ["--uniform", "3"],
    "levels 2,3,4, output_error": ["--budget", "3bpw", "--levels", "2,3,4", "--cost", "output_error"],
    "levels 2,3,4": ["--budget", "3bpw", "--levels", "2,3,4"],
    "levels 2,3,4,5,6": ["--budget", "3bpw", "--levels", "2,3,4,5,6"],
    "levels 2,3,4, all of the text": ["--budget", "3bpw", "--levels", "2,3,4", "--cost-share", "1"],
}


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "", "measuring_cost")
    parser.add_argument("--model", required=True, help="folder of the original")
    parser.add_argument("--label", required=True, help="how results call it")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    results: dict[str, Any] = json.loads(asked.out.read_text())["results"] if asked.out.exists() else {}
    common = [asked.model, "--data", asked.data, "--length", str(asked.length), "--no-eval"]
    _seconds([*common, "--samples", "4", *WAYS[ONCE]])
    seconds = {way: _seconds([*common, "--samples", str(asked.samples), *flags]) for way, flags in WAYS.items()}
    row = {"tokens": asked.samples * asked.length, "seconds": seconds}
    results[asked.label] = row | {k: START[k] for k in ("commit", "command", "started")}
    print(json.dumps(row, indent=1))
    store(asked.out, results)


def _seconds(flags: Sequence[str]) -> float:
    """Processor seconds of one run."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()) as said:
        before = time.process_time()
        code = mopeq(["quantize", *flags, "-o", str(Path(temporary) / "out"), "--json"])
        spent = time.process_time() - before
    if code:
        raise RuntimeError(f"mopeq quantize {' '.join(flags)} ended with {code}: {said.getvalue()}")
    return round(spent, 1)


if __name__ == "__main__":
    main()
