"""The rows of ``--fit`` against measured memory: a random OLMoE, packed, reads a prompt of the whole context.

Every measurement is a process of its own, as in resident_memory.py: resident memory after the imports and a tiny
model (the process), after loading (weights), and the kernel's peak (VmHWM) while ``generate`` reads ``context - 2``
tokens and writes two. The prediction is what ``mopeq quantize --fit`` would subtract, and the checkpoint's bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import resident_memory as memory
from common import ROOT, arguments, store

CASES = ((512, 1), (2048, 1), (1024, 4), (2048, 4))
SMALLER = {"num_hidden_layers": 4, "num_experts": 32}


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        print("\n" + json.dumps(_measure(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
        return
    asked = arguments(__doc__ or "", "fit").parse_args()
    memory.RANDOM_OLMOE |= SMALLER
    results: dict[str, Any] = {"config": memory.RANDOM_OLMOE, "cases": []}
    with tempfile.TemporaryDirectory() as folder:
        original, packed = Path(folder) / "original", Path(folder) / "packed"
        memory._write(original)
        memory._quantize(original, packed)
        for context, batch in CASES:
            environment = {**os.environ, "OMP_NUM_THREADS": str(asked.threads), "PYTHONPATH": str(ROOT / "src")}
            command = [sys.executable, __file__, "measure", str(packed), str(context), str(batch)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            results["cases"].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(json.dumps(results["cases"][-1]), flush=True)
    store(asked.out, results)


def _measure(packed: Path, context: int, batch: int) -> dict[str, Any]:
    import torch

    from mopeq.checkpoint import read_manifest
    from mopeq.fit import fit
    from mopeq.load import load
    from mopeq.memory import give_back_freed

    give_back_freed()  # as the server does
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    memory._warm_up()
    process = memory._settled()["total"]
    model = load(packed)
    weights = memory._settled()["total"] - process
    ids = torch.randint(0, 1000, (batch, context - 2), generator=torch.Generator().manual_seed(0))
    memory._reset_peak()
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    peak = memory._status()["VmHWM"]
    size = memory._bytes(packed)
    made = fit("64GiB", model.config, read_manifest(packed).inventory, context, batch, "bfloat16")
    predicted = size + made.cache + made.activations + made.process
    return {
        "context": context, "batch": batch, "process": process, "weights": weights, "peak": peak, "checkpoint": size,
        "predicted": dict(made.rows()[1:-1]) | {"total": predicted}, "predicted_over_peak": round(predicted / peak, 3),
    }  # fmt: skip


if __name__ == "__main__":
    main()
