"""Activations of a model that is run layer by layer, kept until the next layer needs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from mopeq.checkpoint import write_tensors
from mopeq.journal import Journal

__all__ = ["Store"]


class Store:
    """Tensors by name, in order: in memory, or in the folder of a journal, which then has them."""

    def __init__(self, journal: Journal | None = None, scratch: str = "scratch") -> None:
        self.journal, self.scratch = journal, scratch
        self._held: dict[str, list[Tensor]] = {}
        if journal is not None:
            (journal.folder / scratch).mkdir(exist_ok=True)

    def put(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Keep them."""
        if self.journal is None:
            self._held[name] = list(tensors)
            return
        path = self._path(name)
        written, _ = write_tensors(path, {f"{i:06}": tensor.detach() for i, tensor in enumerate(tensors)})
        self.journal.record(name, files={str(path.relative_to(self.journal.folder)): written})

    def has(self, name: str) -> bool:
        """Whether they are there, whole."""
        return name in self._held if self.journal is None else self.journal.done(name) is not None

    def get(self, name: str) -> list[Tensor]:
        """What was put."""
        if self.journal is None:
            return self._held[name]
        return [tensor for _, tensor in sorted(load_file(self._path(name)).items())]

    def drop(self, name: str) -> None:
        """Let go of them, if they are there."""
        self._held.pop(name, None)
        if self.journal is not None:
            self.journal.drop(name)

    def clear(self) -> None:
        """Let go of everything."""
        kept = self._held if self.journal is None else self.journal.steps
        for name in [name for name in kept if name.startswith(("hidden ", "packed ", "gradient ", "others ", "seen "))]:
            self.drop(name)

    def _path(self, name: str) -> Path:
        assert self.journal is not None
        return self.journal.folder / self.scratch / f"{name.replace(' ', '-')}.safetensors"
