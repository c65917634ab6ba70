"""``mopeq align``, and the flags of ``mopeq quantize --align``."""

from __future__ import annotations

import argparse
from typing import Any

from mopeq.cli import show
from mopeq.cli.applies import refuse
from mopeq.cli.given import calibration_of, dtype_of
from mopeq.progress import drawn

__all__ = ["add_align", "add_align_to_quantize", "alignment_of", "do_align"]


def add_align(p: argparse.ArgumentParser) -> None:
    """Its flags, but for those of calibration."""
    p.add_argument("folder", metavar="DIR", help="a packed folder, which is changed in place if that helps")
    p.add_argument("--against", metavar="MODEL", required=True, help="its original: a local folder or a hub id")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="compute type (default: the checkpoint's)"
    )
    _tune(p)


def add_align_to_quantize(p: argparse.ArgumentParser) -> None:
    """``--align`` and what goes with it."""
    p.add_argument(
        "--align", action="store_true", help="fit routers to the original's, kept if that helps on text kept apart"
    )
    _tune(p)


def _tune(p: argparse.ArgumentParser) -> None:
    text = "then train norms and routers at this rate, such as 0.0001 (default: 0)"
    p.add_argument("--tune", type=float, default=0.0, metavar="RATE", help=text)


def alignment_of(options: argparse.Namespace) -> Any:
    """What ``quantize`` is to do about routers; None for nothing."""
    from mopeq.align import Alignment

    if not options.align:
        refuse(options, ("tune",), "--align")
        return None
    return Alignment(tune=options.tune)


def do_align(options: argparse.Namespace) -> None:
    """Align the routers of a packed folder."""
    from mopeq.align import Alignment, align

    refuse(options, ("cost_share",), "mopeq analyze, quantize and moqe build")
    with drawn() as track:
        found = align(
            options.folder,
            options.against,
            calibration=calibration_of(options),
            how=Alignment(tune=options.tune),
            dtype=dtype_of(options),
            command=options.command_line,
            track=track,
        )
    if options.json:
        return show.print_json({"out": options.folder, **found.to_json()})
    rows = [(index, f"{100 * a:.2f}", f"{100 * b:.2f}") for index, (a, b) in found.layers.items()]
    show.table("The original's experts that routers choose", ("layer", "before %", "after %"), rows)
    print(found.sentence)
    return None
