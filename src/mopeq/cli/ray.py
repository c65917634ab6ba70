"""``--ray``: the experts of a layer are worked on by a Ray cluster."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["add_ray", "spread"]


def add_ray(p: argparse.ArgumentParser) -> None:
    """The flag."""
    p.add_argument(
        "--ray", metavar="ADDRESS", help="spread experts over this Ray cluster; auto: the one of this machine"
    )


@contextmanager
def spread(options: argparse.Namespace) -> Iterator[Any]:
    """What works on the experts: this process, or the cluster that was asked for."""
    from mopeq.analyze import here

    if options.ray is None:
        yield here
        return
    from mopeq.integrations.ray import cluster
    from mopeq.source import open_source

    with cluster(options.ray, open_source(options.model).path) as across:
        yield across
