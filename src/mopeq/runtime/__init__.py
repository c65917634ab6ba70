"""Packed models at work: experts and linears that stay packed, their installation, generation.

Names are imported when they are first used: those of experts import Dynamo, 1.5 s, which lean.py does without.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mopeq.runtime.experts import MixedExperts
    from mopeq.runtime.install import packed_modules
    from mopeq.runtime.linear import QLinear
    from mopeq.runtime.packed import PackedModule, prepare

__all__ = ["MixedExperts", "PackedModule", "QLinear", "packed_modules", "prepare"]

_HOME = {
    "MixedExperts": "experts",
    "PackedModule": "packed",
    "QLinear": "linear",
    "packed_modules": "install",
    "prepare": "packed",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mopeq.runtime' has no attribute {name!r}")
    return getattr(import_module(f"mopeq.runtime.{_HOME[name]}"), name)
