"""What one precision a layer costs, and what maps with and without that weigh in the formats of other runtimes.

For each budget: the best map of all, the best whose experts of a layer share the precision of gate_up and that of down
(GGUF's constraint), and the best whose experts share one for both (vLLM's). Each is packed and compared with the
original; exports hold the same weights, so only their bytes are listed.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import arguments, store, table
from mopeq.allocate import allocate
from mopeq.data.samples import bundled_model, bundled_text
from mopeq.data.text import text_windows
from mopeq.errors import InputError
from mopeq.evaluate import evaluate_many
from mopeq.export import Plan, plan_export
from mopeq.export.folder import open_packed
from mopeq.export.gguf_model import types
from mopeq.load import load
from mopeq.measure import Calibration, measure_prepared, observed, open_model
from mopeq.quantize import pack_model

CONSTRAINTS: dict[str, dict[str, Any]] = {
    "units": {},
    "uniform layers": {"uniform_layers": True},
    "uniform layers, whole experts": {"uniform_layers": True, "granularity": "expert"},
}
FORMATS = ("auto-round", "gguf", "compressed-tensors")
COST = "fisher_error"


def main() -> None:
    parser = arguments(__doc__ or "", "export")
    parser.add_argument("--budgets", nargs="+", default=["3.0bpw", "4.0bpw"], help="bits per expert weight")
    parser.add_argument("--windows", type=int, default=64, help="windows of held-out text")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    calibration = Calibration(samples=64, length=256, batch_size=8, cost_share=1.0)
    prepared = observed(open_model(bundled_model()), calibration, dtype=torch.float32)
    stats = measure_prepared(prepared, (COST,), options=prepared.inventory.precisions((2, 3, 4, 5, 6)))
    texts = [bundled_text(name).read_text(encoding="utf-8") for name in ("heldout_code.txt", "heldout_docs.txt")]
    windows = text_windows(texts, prepared.tokenizer, calibration.length, limit=asked.windows)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        packed = {}
        for budget in asked.budgets:
            for name, constraint in CONSTRAINTS.items():
                made = allocate(stats, budget=budget, cost=COST, **constraint)
                key = f"{budget} {name}"
                packed[key] = pack_model(prepared, made, Path(scratch) / str(len(packed)))
                rows.append({"map": name, "budget": budget, "predicted": made.note["predicted_loss"]})
                rows[-1] |= {form: _bytes(packed[key].path, form) for form in FORMATS}
                rows[-1]["packed"] = packed[key].bytes
        loaders = {key: partial(load, made.path, dtype=torch.float32) for key, made in packed.items()}
        judged = evaluate_many(prepared.model, loaders, windows, cache=Path(scratch), batch_size=8)
    for row, seen in zip(rows, judged.values(), strict=True):
        kl = seen.divergence.kl
        row["kl"] = [kl.value, kl.low, kl.high]
    store(asked.out, {"rows": rows})
    heads = ["budget", "map", "predicted", "KL, nats [95 %]", "packed MB", *(f"{form} MB" for form in FORMATS)]
    print(table(heads, [_cells(row) for row in rows]))


def _bytes(folder: Path, form: str) -> int | None:
    """About what the weights take; in GGUF although llama.cpp would compute this model's router otherwise."""
    try:
        if form == "gguf":
            opened = open_packed(folder)
            return Plan(opened, form, types(opened, "bfloat16"), "bfloat16").nbytes
        return plan_export(folder, form).nbytes
    except InputError:
        return None


def _cells(row: dict[str, Any]) -> list[str]:
    value, low, high = row["kl"]
    sizes = [row["packed"], *(row[form] for form in FORMATS)]
    return [
        row["budget"], row["map"], f"{row['predicted']:.4g}", f"{value:.4f} [{low:.4f}, {high:.4f}]",
        *("refused" if size is None else f"{size / 1e6:.2f}" for size in sizes),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
