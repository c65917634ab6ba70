"""``--ray`` and ``--devices``: who works on the experts of a layer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mopeq.cli.given import usable

__all__ = ["add_spread", "spread"]


def add_spread(p: argparse.ArgumentParser) -> None:
    """The flags."""
    where = p.add_mutually_exclusive_group()
    where.add_argument(
        "--ray", metavar="ADDRESS", help="spread experts over this Ray cluster; auto: this machine's own"
    )
    where.add_argument("--devices", metavar="NAMES", help="work on experts there, such as cuda:0,cuda:1 (default: cpu)")


@contextmanager
def spread(options: argparse.Namespace) -> Iterator[Any]:
    """What works on the experts: this process, the devices, or the cluster that was asked for."""
    from mopeq.analyze.slab import here, over

    if options.devices is not None:
        yield over([usable(name.strip()) for name in options.devices.split(",")])
        return
    if options.ray is None:
        yield here
        return
    from mopeq.integrations.ray import cluster
    from mopeq.source import open_source

    with cluster(options.ray, open_source(options.model).path) as across:
        yield across
