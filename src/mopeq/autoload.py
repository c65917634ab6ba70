"""How transformers comes to know packed checkpoints: a hook left by ``import torch`` or ``import mopeq``.

transformers keeps its quantizers in two dictionaries. They are replaced by dictionaries that import ours at the first
look-up of ``mopeq``: at once where their module is loaded, else as soon as it is. Nothing heavy is imported here.

torch calls :func:`install` while it is being imported, through the entry point group ``torch.backends``. That matters:
a transformers that has never heard of mopeq does not refuse a packed checkpoint but fills its experts with noise. An
exception there would break ``import torch`` for everybody, so nothing here raises; the first exception can only meet
somebody who loads a packed checkpoint.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["callable_module", "install", "watch"]

QUANTIZER = "mopeq"
WATCHED = "transformers.quantizers.auto"
MAPPINGS = ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING")
HOLDERS = (WATCHED, "transformers.quantizers")
"""Modules that hold the dictionaries under those names."""
SWITCH = "MOPEQ_AUTOLOAD"
"""Environment variable; ``0`` leaves no hook. mopeq's own functions and ``import mopeq.integrations.transformers``
register the quantizer all the same."""


def install() -> None:
    """Entry point that torch calls while it is imported. Importing this module has left the hook already."""
    watch()


def watch() -> None:
    """Arrange that transformers, loaded already, just being loaded or not yet, finds the quantizer when it asks."""
    if os.environ.get(SWITCH, "1") == "0":
        return
    try:
        module = sys.modules.get(WATCHED)
        if module is not None and _is_whole(module):
            _extend(module)
        elif not any(_is_ours(finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception as error:
        _tell(error)


def _tell(error: Exception) -> None:
    logging.getLogger(__name__).warning(
        "mopeq cannot make transformers know packed checkpoints (%r); load them with mopeq.load, or import "
        "mopeq.integrations.transformers first",
        error,
    )


class _Finder(MetaPathFinder):
    """Runs :func:`_extend` after its module is executed, then leaves.

    It looks at every module that is searched for, because the watched one may have been half executed when it came:
    ``import transformers.quantizers.auto`` imports torch. Modules of models are imported later than that.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        module = sys.modules.get(WATCHED)
        if module is not None and _is_whole(module):
            self._leave(module)
        return self._watched(path, target) if fullname == WATCHED else None

    def _watched(self, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        """The specification that the other finders have, its loader prolonged; asking twice does no harm."""
        others = [finder for finder in sys.meta_path if not _is_ours(finder)]
        spec = next((s for f in others if (s := f.find_spec(WATCHED, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._leave(module)

            try:
                spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            except AttributeError as error:
                _tell(error)
        return spec

    def _leave(self, module: ModuleType) -> None:
        try:
            _extend(module)
        except Exception as error:
            _tell(error)
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]


class _Mapping(dict[str, Any]):
    """A dictionary that registers the quantizer when it is asked for it."""

    def __contains__(self, key: object) -> bool:
        if key == QUANTIZER:
            importlib.import_module("mopeq.integrations.transformers")
        return super().__contains__(key)

    def __missing__(self, key: str) -> Any:
        if key in self:
            return self[key]
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As a dictionary's, and the quantizer where that is asked for."""
        return super().get(key, default) if key in self else default


def _is_ours(finder: object) -> bool:
    """By name, because this module may have been imported anew."""
    return (type(finder).__module__, type(finder).__name__) == (__name__, _Finder.__name__)


def _is_whole(module: ModuleType) -> bool:
    return all(isinstance(getattr(module, name, None), dict) for name in MAPPINGS) and not getattr(
        module.__spec__, "_initializing", False
    )


def _extend(module: ModuleType) -> None:
    """Replace the dictionaries, wherever they are held, once."""
    for name in MAPPINGS:
        old = getattr(module, name)
        if not isinstance(old, dict):
            raise TypeError(f"{module.__name__}.{name} is {type(old).__name__}; expected a dictionary")
        if type(old) is dict and QUANTIZER not in old:
            new = _Mapping(old)
            for holder in (module, *(sys.modules[h] for h in HOLDERS if h in sys.modules)):
                if getattr(holder, name, None) is old:
                    setattr(holder, name, new)


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
