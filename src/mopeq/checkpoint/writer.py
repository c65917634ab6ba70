"""Writing a packed checkpoint: shards, hashes, and one rename at the end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from mopeq.checkpoint.manifest import DTYPES, Header, Manifest
from mopeq.checkpoint.reader import CONFIG, HASHES, INDEX, SIZES, canonical, check_packed, check_rest, read_headers
from mopeq.checkpoint.unfinished import Unfinished
from mopeq.errors import CheckpointError, OutputError
from mopeq.qtensor import QTensor, packed_shapes
from mopeq.stats import write_json

__all__ = ["PackedWriter", "Stored", "write_tensors"]

SHARD_BYTES = 1 << 29
"""A shard is held in memory until it is full."""
SCRATCH = "scratch"
"""Folder beside the shards for what a run needs until it is finished."""

Stored = tuple[str, QTensor | Tensor]
"""A packed matrix under its base name, or a tensor as it is."""
Written = tuple[dict[str, Any], dict[str, Header]]
"""Bytes and sha256 of a file, and the types and shapes in it."""


class PackedWriter(Unfinished):
    """Writes a packed checkpoint beside its folder and renames it into place.

    ::

        with PackedWriter(out, needed_bytes=n) as writer:
            writer.add("model.layers.0.mlp.experts.0.gate_proj", packed)
            writer.add_tensor("model.norm.weight", norm)    # 16-bit linears too
            writer.copy_file(source / "tokenizer.json")
            writer.finish(packed_config(...), {"precision.json": ..., "stats.json": ...})

    Leaving the block without :meth:`finish` leaves what :class:`Unfinished` says. Raises as that does, and where
    ``out`` has something in it. With ``behind`` set, a shard is hashed and written by a thread while the next one is
    made: one more shard in memory, and a step is noted in the journal when its last shard is on the disk, with the next
    step under way.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        needed_bytes: int = 0,
        max_shard_bytes: int = SHARD_BYTES,
        job: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        super().__init__(out, needed_bytes=needed_bytes, job=job, resume=resume)
        self.max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[dict[str, Header]] = []
        self._names: set[str] = set()
        self._total = 0
        self._hashes: dict[str, dict[str, Any]] = {}
        self.behind = False
        self._thread = ThreadPoolExecutor(1, "mopeq-write")
        self._writing: tuple[str, int, Callable[[], Written]] | None = None
        self._made: tuple[str, Mapping[str, Any], int] | None = None

    def __enter__(self) -> Self:
        with self.disk():
            if self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir())):
                raise OutputError(f"{self.out} exists already; give another folder or remove it")
        super().__enter__()
        try:
            for name in self.partial.glob("model-*.safetensors"):  # killed while it finished: as they were before
                name.rename(self.partial / _temporary(int(name.name[6:11]) - 1))
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pending = {}
        with suppress(OutputError):  # what was made is kept, and the first error is the one to tell
            self._settle()
        self._thread.shutdown()
        super().__exit__(kind, error, trace)

    def part(self, step: str, tensors: Callable[[], Iterable[Stored]], facts: Mapping[str, Any]) -> Mapping[str, Any]:
        """Shards of their own for some tensors; nothing is made where an earlier run has finished this step.

        step: its name in the journal. tensors: called for them if they are to be made. facts: what to note of the step,
        looked at when all tensors are there. Returns the facts that the run noted that made them.
        """
        self._flush()
        first = len(self._shards) + (self._writing is not None)
        found = self.journal.done(step) if self.journal is not None else None
        if self.journal is not None and found is not None:
            self._settle()
            for name in self.journal.files(step):
                headers = read_headers([self.partial / name])
                self._names.update(headers)
                self._hashes[name] = dict(self.journal.files(step)[name])
                self._shards.append(headers)
                self._total += sum(prod(shape) * SIZES[kind] for kind, shape in headers.values())
            return found
        for name, tensor in tensors():
            self.add(name, tensor) if isinstance(tensor, QTensor) else self.add_tensor(name, tensor)
        self._flush()
        if self._made is not None:  # this step has no shard
            self._settle()
        self._made = step, facts, first
        if not self.behind:
            self._settle()
        return facts

    def add(self, name: str, matrix: QTensor) -> None:
        """A packed matrix under its base name. 16-bit matrices outside the experts go to :meth:`add_tensor` instead."""
        for suffix in packed_shapes(matrix.shape, matrix.precision):
            self.add_tensor(f"{name}.{suffix}", getattr(matrix, suffix))

    def add_tensor(self, key: str, tensor: Tensor) -> None:
        """Any tensor as it is. It is held until its shard is full."""
        if key in self._names:
            raise CheckpointError(f"tensor {key} was added twice; expected one tensor of that name")
        nbytes = _bytes(tensor)
        if self._pending and self._pending_bytes + nbytes > self.max_shard_bytes:
            self._flush()
        self._names.add(key)
        self._pending[key] = tensor.detach().cpu().contiguous()
        self._pending_bytes += nbytes

    def copy_file(self, path: str | Path) -> None:
        """A file that goes with the model, under its own name."""
        path = Path(path)
        with self.disk():
            self._file(path.name, path.read_bytes())

    def finish(self, config: Mapping[str, Any], mopeq_files: Mapping[str, Mapping[str, Any]] | None = None) -> int:
        """Write what is left, check all against ``config``, rename into place; returns the safetensors files' bytes."""
        self._flush()
        self._settle()
        shards = [f"model-{i + 1:05}-of-{len(self._shards):05}.safetensors" for i in range(len(self._shards))]
        headers = {name: header for shard in self._shards for name, header in shard.items()}
        manifest = Manifest.from_json(config.get("quantization_config"))
        check_packed(manifest, headers)
        check_rest(manifest, headers)
        with self.disk():
            for number, name in enumerate(shards):
                (self.partial / _temporary(number)).rename(self.partial / name)
                self._hashes[name] = self._hashes.pop(_temporary(number))
            where = {key: name for name, shard in zip(shards, self._shards, strict=True) for key in shard}
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(where.items()))}
            for file, data in ((CONFIG, config), (INDEX, index)):
                self._json(file, data)
            if self.journal is not None:
                self.journal.spend(SCRATCH)  # killed from here on, nothing is measured again
            shutil.rmtree(self.partial / SCRATCH, ignore_errors=True)
            (self.partial / "mopeq").mkdir(exist_ok=True)
            for file, data in (mopeq_files or {}).items():
                self._json(f"mopeq/{file}", data)
            hashes = {"format": "mopeq-hashes", "version": 1, "files": self._hashes}
            _write(self.partial / HASHES, [canonical(hashes)])
            for folder in (self.partial / "mopeq", self.partial):
                _sync(folder)
            self.partial.replace(self.out)
            _sync(self.out.parent)
        return sum(self._hashes[name]["bytes"] for name in shards)

    def _flush(self) -> None:
        """Write the pending tensors as one shard, or begin to."""
        if not self._pending:
            return
        self._settle()
        name = _temporary(len(self._shards))
        write = partial(write_tensors, self.partial / name, self._pending)
        self._writing = name, self._pending_bytes, self._thread.submit(write).result if self.behind else write
        self._pending, self._pending_bytes = {}, 0
        if not self.behind:
            self._settle()

    def _settle(self) -> None:
        """Wait for the shard that is being written, and note the step that it was the last one of."""
        writing, made, self._writing, self._made = self._writing, self._made, None, None  # gone, if this fails
        if writing is not None:
            name, nbytes, write = writing
            with self.disk():
                self._hashes[name], shard = write()
            self._shards.append(shard)
            self._total += nbytes
        if made is not None and self.journal is not None:
            step, facts, first = made
            names = [_temporary(number) for number in range(first, len(self._shards))]
            with self.disk():
                _sync(self.partial)
                self.journal.record(step, facts, {name: self._hashes[name] for name in names})

    def _json(self, name: str, data: Mapping[str, Any]) -> None:
        write_json(self.partial / name, data)
        self._file(name, (self.partial / name).read_bytes())

    def _file(self, name: str, content: bytes) -> None:
        if name in self._hashes:
            raise OutputError(f"{name} would be written twice; expected one file of that name")
        self._hashes[name] = _write(self.partial / name, [content])


def write_tensors(path: Path, tensors: Mapping[str, Tensor], align: int = 8) -> Written:
    """Write and sync a safetensors file, wide elements first, so that everything is aligned; data begin at ``align``.

    Returns its bytes and sha256, and the types and shapes in it. Raises :class:`CheckpointError` for a type that a
    packed checkpoint may not hold, and OSError.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    shard: dict[str, Header] = {}
    end = 0
    for key, tensor in ordered:
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"tensor {key} is {tensor.dtype}; expected one of {', '.join(map(str, DTYPES))}")
        begin, end = end, end + _bytes(tensor)
        shard[key] = (DTYPES[tensor.dtype], tuple(tensor.shape))
        header[key] = {"dtype": shard[key][0], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    pieces = (t.contiguous().reshape(-1).view(torch.uint8).numpy().data for _, t in ordered if t.numel())
    return _write(path, [len(text).to_bytes(8, "little"), text], pieces), shard


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _temporary(number: int) -> str:
    return f"shard-{number:05}"


def _write(path: Path, *parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and sync a file; its entry in the hashes."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for pieces in parts:
            for piece in pieces:
                digest.update(piece)
                size += len(piece)
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
