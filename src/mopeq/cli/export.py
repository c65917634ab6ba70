"""``mopeq export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mopeq.cli import show
from mopeq.errors import InputError
from mopeq.progress import drawn

__all__ = ["add_export", "do_export"]

FORMATS = ("compressed-tensors", "auto-round", "gguf", "dequantized")


def add_export(p: argparse.ArgumentParser) -> None:
    """Its flags."""
    p.add_argument("folder", metavar="DIR", help="a packed folder")
    p.add_argument("--format", required=True, choices=FORMATS, help="of the export")
    p.add_argument("-o", "--out", help="folder to make, for gguf a file (default: only say what it would cost)")
    p.add_argument("--uniform", default="layer", choices=("layer", "model"),
                   help="how far experts share a width in compressed-tensors: layer for vLLM, model for transformers "
                   "(default: %(default)s)")  # fmt: skip
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"),
                   help="of what is dequantized (default: %(default)s)")  # fmt: skip
    p.add_argument("--against", metavar="MODEL", help="the original: measures the KL divergence of the export from it")


def do_export(options: argparse.Namespace) -> None:
    """Write a packed model for other runtimes."""
    from mopeq.export import measured, plan_export, priced, write_export
    from mopeq.quantize import require_new

    if options.out:
        require_new(Path(options.out))
    elif options.against:
        raise InputError("--against measures what was written; give -o too")
    plan = plan_export(options.folder, options.format, uniform=options.uniform, dtype=options.dtype)
    rows, price = plan.rows(), priced(plan)
    found: dict[str, Any] = {"format": plan.format, "out": options.out, "price": vars(price)}
    found["matrices"] = [{**vars(row), "precision": str(row.precision)} for row in rows]
    if not options.json:
        table = [
            (row.precision, row.stored, row.matrices, show.megabytes(row.before), show.megabytes(row.after))
            for row in rows
        ]
        show.table(f"Export to {plan.format}", ("precision", "stored as", "matrices", "MB", "MB exported"), table)
        print("\n".join(price.sentences(plan.format)), flush=True)
    if options.out:
        with drawn() as track:
            found["bytes"] = write_export(plan, options.out, track)
            judged = measured(plan, options.out, options.against, track) if options.against else {}
        divergences = {name: one.divergence.kl for name, one in judged.items() if one.divergence}
        found["kl"] = {name: [kl.value, kl.low, kl.high] for name, kl in divergences.items()}
    if options.json:
        return show.print_json(found)
    if options.out:
        for name, kl in divergences.items():
            ends = f"[{kl.low:.4g}, {kl.high:.4g}]"
            print(f"KL of the {name} model to {options.against}: {kl.value:.5g} nats a token {ends}")
        print(f"wrote {options.out}")
    return None
