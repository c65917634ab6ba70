"""mopeq: give every expert of a mixture-of-experts model its own bit-width, and run the result.

Importing is cheap: public names are imported when they are first used, and transformers learns to load packed
checkpoints without being imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mopeq.autoload import watch

if TYPE_CHECKING:
    from mopeq import moqe
    from mopeq.errors import MopeqError
    from mopeq.load import load
    from mopeq.precision import Precision, PrecisionMap
    from mopeq.quantize import quantize
    from mopeq.stats import Stats

__version__ = "0.1.0"

_HOME = {
    "MopeqError": "errors",
    "Precision": "precision",
    "PrecisionMap": "precision",
    "Stats": "stats",
    "load": "load",
    "moqe": "moqe",
    "quantize": "quantize",
}
"""Public names and the modules that define them. A name equal to its module's is that module, which is callable."""

__all__ = ["MopeqError", "Precision", "PrecisionMap", "Stats", "__version__", "load", "moqe", "quantize"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mopeq' has no attribute {name!r}")
    module = import_module(f"mopeq.{_HOME[name]}")
    return module if _HOME[name] == name else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


watch()
