"""Flags that say nothing in the way chosen are refused, so that nobody believes they were heard."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mopeq.errors import InputError

__all__ = ["check_allocate", "check_quantize", "refuse"]


def check_allocate(options: argparse.Namespace) -> None:
    """Raise :class:`InputError` for flags of another ``--method``."""
    if options.method != "kmeans":
        refuse(options, ("score", "scope"), "--method kmeans")
    if options.method not in ("knapsack", "random"):
        refuse(options, ("granularity",), "--method knapsack and random")
    if not options.fit:
        refuse(options, ("context", "batch", "model", "dtype"), "--fit")
    elif options.model is None:
        raise InputError("--fit needs the model's configuration, found no --model; give the model that was measured")
    if options.method != "knapsack":
        refuse(options, ("uniform_layers", "no_protect"), "--method knapsack")
    if options.method != "random":
        refuse(options, ("seed",), "--method random")
    if not options.levels:
        refuse(options, ("group_size", "symmetric"), "--levels, such as 2,3,4")


def check_quantize(options: argparse.Namespace) -> None:
    """Raise :class:`InputError` for flags that choose precisions where a map or ``--uniform`` has them."""
    if not options.fit:
        refuse(options, ("context", "batch"), "--fit")
    if options.map or options.uniform:
        of_a_budget = ("levels", "cost", "granularity", "guard", "uniform_layers", "no_protect", "cost_share")
        refuse(options, of_a_budget, "--budget and --fit")
    if options.map:
        refuse(options, ("group_size", "symmetric", "hadamard"), "--budget, --fit and --uniform")


def refuse(options: argparse.Namespace, names: Sequence[str], owner: str) -> None:
    """Raise :class:`InputError` for flags that were given, of those named, which belong to ``owner``."""
    for name in names:
        if getattr(options, name) != options.default_of(name):
            raise InputError(
                f"--{name.replace('_', '-')} does not apply here, it belongs to {owner}; leave it out, or give that"
            )
