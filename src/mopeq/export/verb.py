"""The ``export`` verb: what would be written, at what price, and the writing of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.adapters import spec_from
from mopeq.errors import InputError, ModelError
from mopeq.export import auto_round, compressed_tensors, gguf_model
from mopeq.export.fields import Field, Stored
from mopeq.export.folder import FolderWriter, PackedFolder, open_packed, unfinished
from mopeq.precision import LEFT_OUT, Precision
from mopeq.progress import Track, silent
from mopeq.qtensor import dequantize
from mopeq.quantize import require_new

__all__ = ["DTYPES", "FORMATS", "Plan", "Row", "plan_export", "write_export"]

FORMATS = ("compressed-tensors", "auto-round", "gguf", "dequantized")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Row:
    """Matrices of one precision that are exported alike: how many, and their bytes before and after."""

    precision: Precision
    stored: str
    matrices: int
    before: int
    after: int


@dataclass(frozen=True)
class Plan:
    """What an export will write: ``{base name: how it is stored}`` of every packed matrix; the rest is copied."""

    folder: PackedFolder
    format: str
    stored: Mapping[str, Stored]
    dtype: str

    def rows(self) -> list[Row]:
        """All packed matrices, by what becomes of them."""
        made: dict[tuple[Precision, str], list[int]] = {}
        for base, shape, precision in self.folder.manifest.matrices():
            stored = self.stored[base]
            row = made.setdefault((precision, str(stored)), [0, 0, 0])
            for i, count in enumerate((1, precision.nbytes(*shape), stored.nbytes(*shape))):
                row[i] += count
        return [Row(*key, *counts) for key, counts in sorted(made.items())]

    @property
    def nbytes(self) -> int:
        """About what the exported weights take: matrices, and the rest as it is."""
        return self.folder.nbytes + sum(row.after - row.before for row in self.rows())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the exported folder."""
        for name, tensor in self._tensors():
            yield (auto_round.named(self.folder, name) if self.format == "auto-round" else name), tensor

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Under the names of the packed folder's own family."""
        for base, shape, precision in self.folder.manifest.matrices():
            matrix, stored = self.folder.matrix(base, shape, precision), self.stored[base]
            if not isinstance(stored, Field):
                made = auto_round.packed(matrix)
            elif stored.bits >= 16:
                made = {"weight": dequantize(matrix, DTYPES[self.dtype])}
            else:
                made = compressed_tensors.packed(matrix, stored)
            yield from ((f"{base}.{suffix}", tensor) for suffix, tensor in made.items())
        for key in self.folder.others():
            yield key, self._kept(self.folder.tensor(key))

    def _kept(self, tensor: Tensor) -> Tensor:
        floats = self.format == "dequantized" and tensor.is_floating_point()
        return tensor.to(DTYPES[self.dtype]) if floats else tensor

    def config(self) -> dict[str, Any]:
        """``config.json`` of the exported folder."""
        config = {key: value for key, value in self.folder.config.items() if key != "quantization_config"}
        if self.format == "dequantized":
            config["dtype"] = self.dtype
            config.pop("torch_dtype", None)
        else:
            kind = compressed_tensors if self.format == "compressed-tensors" else auto_round
            config["quantization_config"] = kind.quantization_config(self.folder, self.stored)
        return config


def plan_export(path: str | Path, kind: str, *, uniform: str = "layer", dtype: str = "bfloat16") -> Plan:
    """What exporting a packed folder would write; reads no weights.

    Args:
        path: a packed folder.
        kind: one of ``FORMATS``.
        uniform: ``layer`` or ``model``: how far experts share a width where the format wants that (compressed-tensors).
        dtype: of what is dequantized.

    Raises:
        CheckpointError: the folder is not a packed one, or is damaged.
        InputError: the format cannot say what is in it.
    """
    if kind not in FORMATS:
        raise InputError(f"no format {kind!r}; there are {', '.join(FORMATS)}")
    folder = open_packed(path)
    if LEFT_OUT in folder.manifest.precisions.histogram():
        raise InputError(f"{path} leaves experts out, which no format here can say; quantize without 0 in the levels")
    if folder.manifest.has_image_experts:
        raise InputError(
            f"a {folder.manifest.inventory.model_type} has two sets of experts in a layer, which export writes in no "
            "format; run this one with mopeq"
        )
    _check_names(folder)
    stored: Mapping[str, Stored]
    if kind == "compressed-tensors":
        stored = compressed_tensors.plan(folder, uniform)
    elif kind == "auto-round":
        stored = auto_round.plan(folder)
    elif kind == "gguf":
        stored = gguf_model.plan(folder, dtype)
    else:
        stored = {base: Field(32 if dtype == "float32" else 16) for base, _, _ in folder.manifest.matrices()}
    return Plan(folder, kind, stored, dtype)


def write_export(plan: Plan, out: str | Path, track: Track = silent) -> int:
    """Carry out a plan; returns the bytes of the weights. ``out`` is a folder to make, for ``gguf`` a file.

    Raises :class:`OutputError` where ``out`` exists.
    """
    require_new(Path(out))
    total = len(plan.stored) + len(plan.folder.others())
    label = f"export to {plan.format}"
    if plan.format == "gguf":
        with unfinished(Path(out)) as path:
            for _ in track(gguf_model.write(plan.folder, plan.stored, plan.dtype, path), label, total):
                pass
        return Path(out).stat().st_size
    with FolderWriter(out) as writer:
        for name, tensor in track(plan.tensors(), label, total):
            writer.add(name, tensor)
        return writer.finish(plan.config(), plan.folder.path)


def _check_names(folder: PackedFolder) -> None:
    """Refuse models whose ordinary checkpoints have other tensors than one weight for each packed matrix."""
    shapes: dict[str, tuple[int, ...]] = {f"{base}.weight": shape for base, shape, _ in folder.manifest.matrices()}
    shapes |= {key: folder.shapes[key] for key in folder.others()}
    try:
        spec_from(folder.config, shapes)
    except ModelError as error:
        raise InputError(
            f"a {folder.manifest.inventory.model_type} stores several experts or matrices in one tensor ({error}); "
            f"export writes models that store each matrix of an expert by itself; run this one with mopeq"
        ) from error
