"""``mopeq panels``."""

from __future__ import annotations

import argparse

from mopeq.cli import show

__all__ = ["add_panels", "do_panels"]


def add_panels(p: argparse.ArgumentParser) -> None:
    """Its flags."""
    p.add_argument("folder", metavar="DIR", help="a packed folder")


def do_panels(options: argparse.Namespace) -> None:
    """Lay out a packed model's weights for this machine's processor, so that it starts at once."""
    from mopeq.runtime.lean_load import PANELS, lay_out

    size = lay_out(options.folder)
    if options.json:
        return show.print_json({"file": f"{options.folder}/{PANELS}", "bytes": size})
    print(f"wrote {options.folder}/{PANELS}, {show.megabytes(size)} MB; mopeq run and chat map it; delete it at will")
    return None
