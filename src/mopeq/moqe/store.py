"""A set of variants on disk: ``moqe.json``, one ordinary model folder for each variant, equal tensors stored once.

::

    DIR/moqe.json                         names, recipes, bytes
    DIR/variants/gptq-3bit/config.json    an ordinary model folder: from_pretrained and mopeq.load read it
                          /shared.safetensors       what all variants have: one file with several names (hard links)
                          /shared-1-3.safetensors   what the first and the third have
                          /own.safetensors          what it alone has
    DIR/router/                           after training

Tensors are equal where name, type, shape and bytes are: embeddings, norms, the router of experts, the head, and experts
that two variants quantize alike. A hard link is one file under two names, so a variant's folder can be copied, moved or
deleted by itself; a copy of DIR that does not keep links (``cp -a`` and ``tar`` do) is larger and works the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mopeq.checkpoint import read_headers
from mopeq.checkpoint.reader import HASHES, INDEX, SINGLE, canonical
from mopeq.errors import CheckpointError, MapError, ModelError, OutputError
from mopeq.progress import Track, silent
from mopeq.stats import read_json, write_json

__all__ = [
    "SET_FILE",
    "Variant",
    "VariantSet",
    "combine",
    "read_set",
    "tensor_files",
    "tensor_of",
    "weight_bytes",
    "write_set",
]

SET_FILE = "moqe.json"
SET_FORMAT, SET_VERSION = "mopeq-moqe", 1
SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Variant:
    """One variant: its name, how it was made, the bytes of its tensor files, and of those that no other one has."""

    name: str
    recipe: str
    bytes: int
    own_bytes: int


@dataclass(frozen=True)
class VariantSet:
    """What ``moqe.json`` says. ``bytes``: of all tensor files, each once; ``id``: hash of all variants' tensors."""

    path: Path
    kind: str
    """``language`` or ``vision``."""
    base: str
    variants: tuple[Variant, ...]
    bytes: int
    id: str
    calibration: tuple[str, ...] = ()
    """Hashes of the documents that variants were calibrated on: a router must learn from others."""
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the variants, in order: a router's output i is the variant ``names[i]``."""
        return tuple(variant.name for variant in self.variants)

    @property
    def separate_bytes(self) -> int:
        """Bytes of the variants if each were stored by itself."""
        return sum(variant.bytes for variant in self.variants)

    def folder(self, name: str) -> Path:
        """The model folder of a variant."""
        return self.path / "variants" / name

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        fields = {k: v for k, v in asdict(self).items() if k != "path"}
        return {"format": SET_FORMAT, "version": SET_VERSION, **fields, "separate_bytes": self.separate_bytes}


def read_set(path: str | Path) -> VariantSet:
    """The set in a folder.

    Raises :class:`ModelError` where there is none, :class:`CheckpointError` where a variant is missing or the file is
    not as it was written.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelError(f"no folder {path}; expected a set of variants, as mopeq moqe build writes it")
    if not (path / SET_FILE).is_file():
        raise ModelError(f"{path} has no {SET_FILE}: it is no set of variants; make one with mopeq moqe build")
    try:
        data = read_json(path / SET_FILE)
        if data.get("format") != SET_FORMAT or data.get("version") != SET_VERSION:
            raise CheckpointError(
                f"{path / SET_FILE} has format {data.get('format')!r} version {data.get('version')!r}; expected "
                f"{SET_FORMAT!r} version {SET_VERSION}; use the mopeq that wrote it"
            )
        variants = tuple(Variant(**entry) for entry in data["variants"])
        fields = {key: data[key] for key in ("kind", "base", "bytes", "id", "info")}
        made = VariantSet(path, variants=variants, calibration=tuple(data["calibration"]), **fields)
    except (MapError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / SET_FILE} is malformed ({error}); build the set again") from error
    for name in made.names:
        if not made.folder(name).is_dir():
            raise CheckpointError(f"variant {name} is missing: no folder {made.folder(name)}; copy the set again")
    return made


def write_set(made: VariantSet, folder: Path) -> None:
    """Write ``moqe.json``."""
    write_json(folder / SET_FILE, made.to_json())


def tensor_files(folder: Path) -> dict[str, Path]:
    """``{tensor: safetensors file}`` of a model folder; empty where it has none (GGUF)."""
    if (folder / INDEX).is_file():
        where = read_json(folder / INDEX).get("weight_map") or {}
        return {key: folder / Path(name).name for key, name in where.items()}
    return dict.fromkeys(read_headers([folder / SINGLE]), folder / SINGLE) if (folder / SINGLE).is_file() else {}


@dataclass(frozen=True)
class _Stored:
    """A tensor of a variant: what it is, and one file that has it."""

    key: str
    digest: str
    nbytes: int
    file: Path


def combine(
    folders: Mapping[str, Path], out: Path, recipes: Mapping[str, str], track: Track = silent
) -> tuple[tuple[Variant, ...], int, str]:
    """Copy model folders to ``out/variants``, equal tensors once; returns the variants, all bytes, and the set's id."""
    tensors = [_tensors(name, folder) for name, folder in track(list(folders.items()), "compare tensors", len(folders))]
    held: dict[tuple[str, str], list[int]] = {}
    for number, found in enumerate(tensors):
        for tensor in found:
            held.setdefault((tensor.key, tensor.digest), []).append(number)
    buckets: dict[tuple[int, ...], list[_Stored]] = {}
    for number, found in enumerate(tensors):
        for tensor in found:
            having = held[tensor.key, tensor.digest]
            if having[0] == number:
                buckets.setdefault(tuple(having), []).append(tensor)
    targets = [out / "variants" / name for name in folders]
    for target in targets:
        target.mkdir(parents=True)
    where: list[dict[str, str]] = [{} for _ in targets]
    for numbers, bucket in track(list(buckets.items()), "store tensors", len(buckets)):
        for part, piece in enumerate(_pieces(bucket)):
            file = _file_name(numbers, len(targets), part)
            first = targets[numbers[0]] / file
            save_file(_read(piece), first, metadata={"format": "pt"})
            first.chmod(0o644)  # safetensors writes files that their owner alone may read
            for number in numbers:
                where[number] |= dict.fromkeys((t.key for t in piece), file)
                if number != numbers[0]:
                    _link(first, targets[number] / file)
    for target, folder, names, found in zip(targets, folders.values(), where, tensors, strict=True):
        _companions(folder, target, names, sum(t.nbytes for t in found))
    variants = tuple(_measured(name, recipes[name], target) for name, target in zip(folders, targets, strict=True))
    seen = [list(folders), [sorted((t.key, t.digest) for t in found) for found in tensors]]
    return variants, _bytes_once(targets), hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def _tensors(name: str, folder: Path) -> list[_Stored]:
    """The tensors of a model folder, each file read once."""
    where = tensor_files(folder)
    files = sorted(set(where.values()))
    read_headers(files)  # a damaged file is found here, with a sentence
    made = []
    for file in files:
        with safe_open(file, "pt") as stored:
            for key in (key for key, holder in where.items() if holder == file):
                tensor = stored.get_tensor(key)
                digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                made.append(_Stored(key, digest.hexdigest(), tensor.nbytes, file))
    gguf = [] if made else list(folder.glob("*.gguf"))
    if not made and len(gguf) != 1:
        raise ModelError(
            f"variant {name}: {folder} has no safetensors and {len(gguf)} GGUF files; give a folder with one"
        )
    return made


def tensor_of(file: Path, key: str) -> torch.Tensor:
    """A tensor, mapped from its file: pages are read when touched."""
    with safe_open(file, "pt") as stored:
        tensor: torch.Tensor = stored.get_tensor(key)
    return tensor


def _read(piece: list[_Stored]) -> dict[str, torch.Tensor]:
    """Tensors by name, each of their files opened once."""
    made: dict[str, torch.Tensor] = {}
    for file in {tensor.file for tensor in piece}:
        with safe_open(file, "pt") as stored:
            made |= {tensor.key: stored.get_tensor(tensor.key) for tensor in piece if tensor.file == file}
    return made


def _pieces(tensors: list[_Stored]) -> list[list[_Stored]]:
    """Tensors of one set of variants in files of at most 2 GiB."""
    made: list[list[_Stored]] = [[]]
    size = 0
    for tensor in tensors:
        if made[-1] and size + tensor.nbytes > SHARD_BYTES:
            made.append([])
            size = 0
        made[-1].append(tensor)
        size += tensor.nbytes
    return made


def _file_name(numbers: tuple[int, ...], count: int, part: int) -> str:
    if len(numbers) == 1:
        stem = "own"
    else:
        stem = "shared" if len(numbers) == count else "shared-" + "-".join(str(n + 1) for n in numbers)
    return f"{stem}.{part + 1}.safetensors" if part else f"{stem}.safetensors"


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError as error:
        raise OutputError(
            f"{name.parent} cannot hold a second name of one file ({error.strerror}); variants share files by hard "
            f"links; give a folder on a file system that has them with -o"
        ) from error


def _companions(folder: Path, target: Path, names: Mapping[str, str], total: int) -> None:
    """Everything but the tensors: configuration, tokenizer, GGUF files, what mopeq left; index and hashes anew."""
    weights = (".safetensors", ".bin", ".pt", ".pth", *((".gguf",) if names else ()))
    for path in sorted([*folder.iterdir(), *(folder / "mopeq").glob("*")]):
        if path.is_file() and path.suffix not in weights and path.name not in (INDEX, Path(HASHES).name):
            copy = target / path.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    if names:
        write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})
    if (folder / HASHES).is_file():
        earlier = read_json(folder / HASHES)["files"]
        listed = [target / name for name in earlier if (target / name).is_file()]
        entries = {
            str(path.relative_to(target)): _entry(path)
            for path in {*listed, *target.glob("*.safetensors"), target / INDEX}
        }
        hashes = {"format": "mopeq-hashes", "version": 1, "files": entries}
        (target / HASHES).write_bytes(canonical(hashes))


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _weights(folder: Path) -> list[Path]:
    return [path for suffix in ("safetensors", "gguf") for path in sorted(folder.glob(f"*.{suffix}"))]


def weight_bytes(folder: Path) -> int:
    """Bytes of the tensor files of a model folder."""
    return sum(path.stat().st_size for path in _weights(folder))


def _measured(name: str, recipe: str, folder: Path) -> Variant:
    status = [path.stat() for path in _weights(folder)]
    return Variant(name, recipe, weight_bytes(folder), sum(s.st_size for s in status if s.st_nlink == 1))


def _bytes_once(folders: list[Path]) -> int:
    """Bytes of the tensor files of all folders, a file with several names once."""
    status = [path.stat() for folder in folders for path in _weights(folder)]
    return sum({s.st_ino: s.st_size for s in status}.values())
