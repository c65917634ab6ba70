"""What ``import mopeq`` leaves behind: a hook that makes transformers know packed checkpoints without importing it.

transformers keeps its quantizers in two dictionaries. Where their module is loaded already, ours is registered at once;
else the module is watched, and its dictionaries, once made, import ours at the first look-up of ``mopeq``. An exception
there can only meet somebody who loads a packed checkpoint.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["callable_module", "watch"]

QUANTIZER = "mopeq"
WATCHED = "transformers.quantizers.auto"
MAPPINGS = ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING")


def watch() -> None:
    """Register the quantizer now, if transformers' quantizers are imported, or as soon as it is looked up."""
    if WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    importlib.import_module("mopeq.integrations.transformers")


class _Finder(MetaPathFinder):
    """Finds one module once, and runs :func:`_extend` on it after it is executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _extend(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _Mapping(dict[str, Any]):
    """A dictionary that registers the quantizer when it is asked for it."""

    def __contains__(self, key: object) -> bool:
        if key == QUANTIZER:
            _register()
        return super().__contains__(key)

    def __missing__(self, key: str) -> Any:
        if key in self:
            return self[key]
        raise KeyError(key)


def _extend(module: ModuleType) -> None:
    for name in MAPPINGS:
        setattr(module, name, _Mapping(getattr(module, name)))


def callable_module(name: str, function: Callable[..., Any]) -> None:
    """Make a module callable as the function of its own name: ``mopeq.load(DIR)`` with ``mopeq/load.py``.

    Importing a submodule binds it in its package over anything of that name, so ``mopeq.load`` is the module or the
    function depending on who imported what. With this it is always the module, and always callable.
    """

    class CallableModule(ModuleType):
        __doc__ = function.__doc__

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, function.__name__)(*args, **kwargs)

    module = sys.modules[name]
    module.__class__ = CallableModule
    module.__dict__["__signature__"] = inspect.signature(function)
