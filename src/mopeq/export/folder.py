"""Both ends of an export: a packed folder read matrix by matrix, and a folder of ordinary safetensors written beside
its name and renamed into place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from mopeq.checkpoint import Manifest, read_headers, verify, write_tensors
from mopeq.errors import OutputError
from mopeq.precision import Precision
from mopeq.qtensor import QTensor, packed_shapes
from mopeq.stats import write_json

__all__ = ["FolderWriter", "PackedFolder", "open_packed", "unfinished"]

SHARD_BYTES = 1 << 30
"""A shard is held in memory until it is full."""
INDEX = "model.safetensors.index.json"
OWN = {"config.json", INDEX}
"""Files of a folder that are written anew; all else beside the weights is copied."""


@dataclass(frozen=True)
class PackedFolder:
    """A packed checkpoint: its configuration, what it says about itself, and shape and file of every tensor."""

    path: Path
    config: Mapping[str, Any]
    manifest: Manifest
    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of its safetensors files."""
        return sum((self.path / name).stat().st_size for name in set(self.files.values()))

    def tensor(self, key: str) -> Tensor:
        """A tensor as it is stored."""
        file = self.path / self.files[key]
        status = file.stat()
        made: Tensor = _opened(file, status.st_ino, status.st_size, status.st_mtime_ns).get_tensor(key)
        return made

    def matrix(self, base: str, shape: tuple[int, int], precision: Precision) -> QTensor:
        """A packed matrix by its base name; at 16 bits one of the experts'."""
        parts = {suffix: self.tensor(f"{base}.{suffix}") for suffix in packed_shapes(shape, precision)}
        scales = parts.get("scales", torch.empty(shape[0], 0, dtype=torch.float16))
        return QTensor(parts["qweight"], scales, parts.get("zeros"), shape, precision)

    def others(self) -> list[str]:
        """Names of the tensors that are no packed matrices: kept ones, and linears at 16 bits."""
        packed = self.manifest.packed_tensors()
        return [key for key in self.files if key not in packed]

    def plain_modules(self) -> list[str]:
        """Names of the modules that are matrices in 16 bits or more: linears, routers, gates; not embeddings."""
        return [
            key.removesuffix(".weight")
            for key in self.others()
            if key.endswith(".weight") and len(self.shapes[key]) == 2 and "embed" not in key
        ]


def open_packed(path: str | Path) -> PackedFolder:
    """A packed checkpoint that follows docs/format.md, or a :class:`~mopeq.errors.CheckpointError`."""
    path = Path(path)
    manifest = verify(path, hashes=False)
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, str] = {}
    index = path / INDEX
    names = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    for name in sorted(names):
        for key, (_, shape) in read_headers([path / name]).items():
            shapes[key], files[key] = shape, name
    config = json.loads((path / "config.json").read_bytes())
    return PackedFolder(path, config, manifest, shapes, files)


@lru_cache(maxsize=8)
def _opened(file: Path, *version: int) -> Any:
    return safe_open(file, "pt")


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A file beside ``out`` that takes its name if the block ends well, and is removed otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


class FolderWriter:
    """Shards, index, configuration and companions of a model, renamed to ``out`` by :meth:`finish`.

    Leaving the block without it removes everything. Raises :class:`OutputError` where ``out`` exists.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(os.path.abspath(Path(out).expanduser()))
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self._total = 0
        self._shards: list[list[str]] = []

    def __enter__(self) -> Self:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.partial.mkdir()
        except FileExistsError as error:
            raise OutputError(
                f"{self.partial} exists: another mopeq is writing it, or one was killed; wait for it or remove it"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """One tensor; it is held until its shard is full."""
        nbytes = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + nbytes > SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._bytes += nbytes

    def finish(self, config: Mapping[str, Any], companions: Path) -> int:
        """Write what is left, copy what lies beside the weights in ``companions``; bytes of the safetensors files."""
        self._flush()
        names = [f"model-{i + 1:05}-of-{len(self._shards):05}.safetensors" for i in range(len(self._shards))]
        for number, name in enumerate(names):
            (self.partial / _temporary(number)).rename(self.partial / name)
        where = {key: name for name, keys in zip(names, self._shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(where.items()))}
        write_json(self.partial / INDEX, index)
        write_json(self.partial / "config.json", config)
        for file in sorted(companions.iterdir()):
            if file.is_file() and file.suffix != ".safetensors" and file.name not in OWN:
                shutil.copyfile(file, self.partial / file.name)
        size = sum((self.partial / name).stat().st_size for name in names)
        self.partial.replace(self.out)
        return size

    def _flush(self) -> None:
        if self._pending:
            write_tensors(self.partial / _temporary(len(self._shards)), self._pending)
            self._shards.append(list(self._pending))
            self._total += self._bytes
            self._pending, self._bytes = {}, 0


def _temporary(number: int) -> str:
    return f"shard-{number:05}"
