"""``mopeq export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mopeq.cli import show
from mopeq.progress import drawn

__all__ = ["add_export", "do_export"]

FORMATS = ("compressed-tensors", "auto-round", "dequantized")


def add_export(p: argparse.ArgumentParser) -> None:
    """Its flags."""
    p.add_argument("folder", metavar="DIR", help="a packed folder")
    p.add_argument("--format", required=True, choices=FORMATS, help="of the export")
    p.add_argument("-o", "--out", help="folder to make (default: only say what it would cost)")
    p.add_argument("--uniform", default="layer", choices=("layer", "model"),
                   help="how far experts share a width in compressed-tensors: layer for vLLM, model for transformers "
                   "(default: %(default)s)")  # fmt: skip
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"),
                   help="of what is dequantized (default: %(default)s)")  # fmt: skip


def do_export(options: argparse.Namespace) -> None:
    """Write a packed model for other runtimes."""
    from mopeq.export import plan_export, write_export
    from mopeq.quantize import require_new

    if options.out:
        require_new(Path(options.out))
    plan = plan_export(options.folder, options.format, uniform=options.uniform, dtype=options.dtype)
    rows = plan.rows()
    found = {"format": plan.format, "bytes_before": plan.folder.nbytes, "bytes": plan.nbytes, "out": options.out}
    found |= {"matrices": [{**vars(row), "precision": str(row.precision)} for row in rows]}
    if not options.json:
        table = [
            (row.precision, row.stored, row.matrices, show.megabytes(row.before), show.megabytes(row.after))
            for row in rows
        ]
        show.table(f"Export to {plan.format}", ("precision", "stored as", "matrices", "MB", "MB exported"), table)
        before, after = plan.folder.nbytes, plan.nbytes
        print(f"{show.megabytes(before)} MB -> {show.megabytes(after)} MB ({100 * (after / before - 1):+.1f} %)")
    if options.out:
        with drawn() as track:
            found["bytes"] = write_export(plan, options.out, track)
    if options.json:
        return show.print_json(found)
    if options.out:
        print(f"wrote {options.out}")
    return None
