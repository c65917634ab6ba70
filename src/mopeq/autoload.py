"""How transformers comes to know packed checkpoints and our models: a hook of ``import torch`` and ``import mopeq``.

transformers keeps its quantizers in two dictionaries, and configurations that others register in a third. They are
replaced by dictionaries that import ours at the first look-up of ``mopeq``, or of a model type of ``mopeq.models``: at
once where their module is loaded, else as soon as it is. Nothing heavy is imported here.

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
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["callable_module", "extend", "install", "watch"]

QUANTIZERS = "transformers.quantizers.auto"
QUANTIZER_HOLDERS = (QUANTIZERS, "transformers.quantizers")
"""Modules that hold the two dictionaries under those names."""
CONFIGURATIONS = "transformers.models.auto.configuration_auto"
PROCESSORS = "transformers.models.auto.processing_auto"
WATCHED = {
    QUANTIZERS: ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"),
    CONFIGURATIONS: ("CONFIG_MAPPING",),
    PROCESSORS: ("PROCESSOR_MAPPING",),
}
"""Modules of transformers, and what of them is needed."""
IMPORTED = {
    QUANTIZERS: {"mopeq": "mopeq.integrations.transformers"},
    CONFIGURATIONS: {"deepseek_vl_v2": "mopeq.models.register", "molmo": "mopeq.models.register"},
    PROCESSORS: {"": "mopeq.models.processors"},
}
"""What a look-up of which key imports; processors are sought by class, so there any look-up does."""
SWITCH = "MOPEQ_AUTOLOAD"
"""Environment variable; ``0`` leaves no hook. mopeq's own functions and ``import mopeq.integrations.transformers``
register the quantizer all the same."""


def install() -> None:
    """Entry point that torch calls while it is imported. Importing this module has left the hook already."""
    watch()


def watch() -> None:
    """Arrange that transformers, loaded already, just being loaded or not yet, finds what is ours when it asks."""
    if os.environ.get(SWITCH, "1") == "0":
        return
    for name in WATCHED:
        try:
            module = sys.modules.get(name)
            if module is not None and _is_whole(module):
                extend(module)
            elif not any(_is_ours(finder) and finder.watched == name for finder in sys.meta_path):  # type: ignore[attr-defined]
                sys.meta_path.insert(0, _Finder(name))
                if module is not None and type(module.__spec__) is ModuleSpec:
                    module.__spec__.__class__ = _Executing
        except Exception as error:
            _tell(error)


def _tell(error: Exception) -> None:
    logging.getLogger(__name__).warning(
        "mopeq cannot make transformers know packed checkpoints (%r); load them with mopeq.load, or import "
        "mopeq.integrations.transformers and mopeq.models.register first",
        error,
    )


class _Finder(MetaPathFinder):
    """Runs :func:`extend` after its module is executed, then leaves.

    It looks at every module that is searched for, because the watched one may have been half executed when it came:
    ``import transformers.quantizers.auto`` imports torch. Modules of models are imported later than that.
    """

    def __init__(self, watched: str) -> None:
        self.watched = watched

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        module = sys.modules.get(self.watched)
        if module is not None and _is_whole(module):
            self._leave(module)
        return self._prolonged(path, target) if fullname == self.watched else None

    def _prolonged(self, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        """The specification that the other finders have, its loader prolonged; asking twice does no harm."""
        others = [finder for finder in sys.meta_path if not _is_ours(finder)]
        spec = next((s for f in others if (s := f.find_spec(self.watched, path, target)) is not None), None)
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
            extend(module)
        except Exception as error:
            _tell(error)
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]


class _Executing(ModuleSpec):
    """The specification of a module that is half executed: it runs :func:`extend` when importlib is done with it.

    ``AutoProcessor.from_pretrained`` searches for no module that would bring :class:`_Finder` into play.
    """

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__["_initializing"])

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value and self.name in sys.modules:
            try:
                extend(sys.modules[self.name])
            except Exception as error:
                _tell(error)


class _Mapping(dict[str, Any]):
    """A dictionary that imports a module when it is asked for one of some keys; the module adds them."""

    def __init__(self, known: dict[str, Any], imported: Mapping[str, str]) -> None:
        super().__init__(known)
        self.imported = imported

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str) and key in self.imported and not super().__contains__(key):
            importlib.import_module(self.imported[key])
        return super().__contains__(key)

    def __missing__(self, key: str) -> Any:
        if key in self:
            return self[key]
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As a dictionary's, and ours where that is asked for."""
        return super().get(key, default) if key in self else default


class _Processors(_Mapping):
    """A dictionary that imports our processors when anything is sought that transformers itself does not have."""

    def __contains__(self, key: object) -> bool:
        importlib.import_module(self.imported[""])
        return dict.__contains__(self, key)

    def values(self) -> Any:
        """As a dictionary's, with ours."""
        importlib.import_module(self.imported[""])
        return super().values()


def _is_ours(finder: object) -> bool:
    """By name, because this module may have been imported anew."""
    return (type(finder).__module__, type(finder).__name__) == (__name__, _Finder.__name__)


def _is_whole(module: ModuleType) -> bool:
    found = [getattr(module, name, None) for name in WATCHED[module.__name__]]
    return all(value is not None for value in found) and not getattr(module.__spec__, "_initializing", False)


def extend(module: ModuleType) -> None:
    """Replace the dictionaries of one of the watched modules, wherever they are held, once."""
    for name in WATCHED[module.__name__]:
        if module.__name__ == QUANTIZERS:
            holders = [module, *(sys.modules[h] for h in QUANTIZER_HOLDERS if h in sys.modules)]
            _replace(holders, name, IMPORTED[QUANTIZERS])
        else:  # what others registered lies in a dictionary of its own
            kind = _Processors if module.__name__ == PROCESSORS else _Mapping
            _replace([getattr(module, name)], "_extra_content", IMPORTED[module.__name__], kind)


def _replace(holders: Sequence[Any], name: str, imported: Mapping[str, str], kind: type[_Mapping] = _Mapping) -> None:
    old = getattr(holders[0], name, None)
    if not isinstance(old, dict):
        raise TypeError(f"{name} of {holders[0]!r} is {type(old).__name__}; expected a dictionary")
    if type(old) is dict and not imported.keys() & old.keys():
        new = kind(old, imported)
        for holder in holders:
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
