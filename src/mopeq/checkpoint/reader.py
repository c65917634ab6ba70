"""Reading a packed checkpoint, and proving it whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mopeq.checkpoint.manifest import DTYPES, Header, Manifest
from mopeq.errors import CheckpointError
from mopeq.qtensor import QTensor, packed_shapes

__all__ = ["check_packed", "check_rest", "read_headers", "read_manifest", "read_packed", "rest_elements", "verify"]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HASHES = "mopeq/hashes.json"
LARGEST_HEADER = 100_000_000
SUFFIXES = ("qweight", "scales", "zeros")
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4,
    "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of an element of each safetensors dtype."""
FLOATS = ("F16", "BF16", "F32", "F64")


def read_manifest(path: str | Path) -> Manifest:
    """What a packed checkpoint says about itself. Raises :class:`CheckpointError` where it is not one."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"no folder {path}; expected a packed checkpoint, as mopeq quantize writes it")
    config = _read_json(path / CONFIG)
    if "quantization_config" not in config:
        raise CheckpointError(
            f"{path / CONFIG} has no quantization_config: this model is not packed; pack it with mopeq quantize"
        )
    return Manifest.from_json(config["quantization_config"])


def verify(path: str | Path, *, hashes: bool = True) -> Manifest:
    """Prove a packed checkpoint whole: every rule of docs/format.md, or a :class:`CheckpointError` that says which.

    ``hashes=False`` compares no file with ``mopeq/hashes.json``, as for a folder that save_pretrained wrote.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if hashes:
        _check_hashes(path)
    headers = read_headers(_shards(path))
    _check_total(path, headers)
    check_packed(manifest, headers)
    check_rest(manifest, headers)
    return manifest


def read_headers(files: Iterable[str | Path]) -> dict[str, Header]:
    """``{tensor: (safetensors dtype, shape)}`` of all files; each is as long as its header says."""
    made: dict[str, Header] = {}
    for file in files:
        header = _read_header(Path(file))
        twice = next((name for name in header if name in made), None)
        if twice is not None:
            raise CheckpointError(f"tensor {twice} is in {file} and in another file; expected it once")
        made.update(header)
    return made


def check_packed(manifest: Manifest, headers: Mapping[str, Header]) -> None:
    """Raise :class:`CheckpointError` unless exactly the packed tensors are there, with the right types and shapes."""
    expected = manifest.packed_tensors()
    missing = [name for name in expected if name not in headers]
    if missing:
        raise CheckpointError(
            f"{len(missing)} packed tensors are missing, the first is {missing[0]}; copy the checkpoint again"
        )
    for name, (dtype, shape) in expected.items():
        if headers[name] != (dtype, shape):
            found, at = headers[name]
            raise CheckpointError(f"tensor {name} is {found} {list(at)}; its precision makes it {dtype} {list(shape)}")
    left = [name for name in headers if name.rpartition(".")[2] in SUFFIXES and name not in expected]
    if left:
        raise CheckpointError(f"{len(left)} packed tensors belong to nothing in the map, the first is {left[0]}")
    for name, shape in manifest.full_tensors().items():
        kind, found_shape = headers.get(name, ("absent", ()))
        if kind not in FLOATS or found_shape != shape:
            raise CheckpointError(
                f"tensor {name} is {kind} {list(found_shape)}; expected a 16-bit matrix {list(shape)}"
            )


def check_rest(manifest: Manifest, headers: Mapping[str, Header]) -> None:
    """All other tensors together have as many elements as the inventory says are kept."""
    found = rest_elements(manifest, headers)
    if found != manifest.inventory.kept_parameters:
        raise CheckpointError(
            f"the other tensors have {found:,} elements; expected {manifest.inventory.kept_parameters:,}: "
            f"one is missing or left over; copy the checkpoint again"
        )


def rest_elements(manifest: Manifest, headers: Mapping[str, Header]) -> int:
    """How many elements all tensors have that are no matrices of the map."""
    known = {*manifest.packed_tensors(), *manifest.full_tensors()}
    return sum(prod(shape) for name, (_, shape) in headers.items() if name not in known)


def _check_hashes(path: Path) -> None:
    data = _read_json(path / HASHES)
    files = data.get("files")
    if data.get("format") != "mopeq-hashes" or data.get("version") != 1 or not isinstance(files, dict):
        raise CheckpointError(f'{path / HASHES} is not {{"format": "mopeq-hashes", "version": 1, "files": ...}}')
    if (path / HASHES).read_bytes() != canonical(data):
        raise CheckpointError(f"{path / HASHES} is not in its exact form: it was edited or damaged")
    unlisted = {CONFIG, *(file.name for file in path.glob("*.safetensors"))} - set(files)
    if unlisted:
        raise CheckpointError(f"{sorted(unlisted)[0]} is not listed in {HASHES}; it does not belong to this checkpoint")
    for name, entry in files.items():
        file = path / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not file.is_file():
            raise CheckpointError(f"{name} is listed in {HASHES} and missing; copy the checkpoint again")
        found = _digest(file)
        if entry != found:
            raise CheckpointError(
                f"{name} has {found['bytes']} bytes and sha256 {found['sha256'][:16]}..., {HASHES} says {entry}: "
                f"it was changed or damaged; copy the checkpoint again"
            )


def _digest(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def _shards(path: Path) -> list[Path]:
    """The safetensors files: those that the index names, or the only one."""
    if not (path / INDEX).is_file():
        if not (path / SINGLE).is_file():
            raise CheckpointError(f"{path} has neither {INDEX} nor {SINGLE}; copy the checkpoint again")
        return [path / SINGLE]
    where = _read_json(path / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{path / INDEX} has no weight_map of tensors to file names; copy the checkpoint again")
    for name in set(where.values()):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path / INDEX} names {name!r}; expected safetensors files of the same folder")
        if not (path / name).is_file():
            raise CheckpointError(f"{name}, which {INDEX} names, is missing from {path}; copy the checkpoint again")
    files = sorted({path / name for name in where.values()})
    found = {(key, file.name) for file in files for key in _read_header(file)}
    if found != set(where.items()):
        key, name = sorted(found ^ set(where.items()))[0]
        says = "holds it" if (key, name) in found else "does not hold it"
        raise CheckpointError(f"{INDEX} and {name} disagree about tensor {key}: the file {says}; copy both again")
    return files


def _read_header(file: Path) -> dict[str, Header]:
    """Types and shapes of a safetensors file whose tensors cover it exactly."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(size - 8, LARGEST_HEADER):
                raise CheckpointError(
                    f"{file} is cut off or no safetensors file: {size} bytes, a header of {length}; copy it again"
                )
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no readable safetensors file: {error}; copy it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"the header of {file} is a JSON {type(header).__name__}; expected an object; copy it again"
        )
    header.pop("__metadata__", None)
    made: dict[str, Header] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if dtype in SIZES and all(
                type(n) is int and 0 <= n < 2**62 for n in (*shape, begin, end)
            ):
                if end - begin != prod(shape) * SIZES[dtype]:
                    raise CheckpointError(
                        f"{file} gives {name}, {dtype} {shape}, bytes {begin} to {end}; copy it again"
                    )
                made[name] = (dtype, tuple(shape))
                spans.append((begin, end, name))
            case _:
                raise CheckpointError(f"{file} describes {name} as {entry!r}; expected dtype, shape, data_offsets")
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise CheckpointError(f"in {file}, {name} begins at byte {begin}, the tensor before it ends at {at}")
        at = end
    if at != size - 8 - length:
        raise CheckpointError(f"{file} has {size} bytes; its header describes {8 + length + at}; copy it again")
    return made


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name is there twice")
    return made


def _check_total(path: Path, headers: Mapping[str, Header]) -> None:
    if not (path / INDEX).is_file():
        return
    metadata = _read_json(path / INDEX).get("metadata")
    total = sum(prod(shape) * SIZES[dtype] for dtype, shape in headers.values())
    if not isinstance(metadata, dict) or metadata.get("total_size") != total:
        raise CheckpointError(f"{INDEX} has metadata {metadata!r}; its files hold total_size {total}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read {file}: {error}; expected a JSON object; copy the checkpoint again"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} is a JSON {type(data).__name__}; expected an object")
    return cast(dict[str, Any], data)


def read_packed(path: str | Path, name: str) -> QTensor:
    """One packed matrix by its base name, on the CPU."""
    from safetensors import safe_open

    path = Path(path)
    known = {base: (shape, precision) for base, shape, precision in read_manifest(path).matrices()}
    if name not in known:
        raise CheckpointError(
            f"no packed matrix {name} in {path}; it has {len(known)}, such as {next(iter(known), '')}"
        )
    shape, precision = known[name]
    parts: dict[str, Tensor] = {}
    for file in _shards(path):
        header = read_headers([file])
        with safe_open(file, "pt") as stored:
            for suffix, (at, dtype) in packed_shapes(shape, precision).items():
                key = f"{name}.{suffix}"
                if key in header:
                    if header[key] != (DTYPES[dtype], at):
                        raise CheckpointError(f"tensor {key} is {header[key]}; expected {DTYPES[dtype]} {list(at)}")
                    parts[suffix] = stored.get_tensor(key)
    for suffix in packed_shapes(shape, precision):
        if suffix not in parts:
            raise CheckpointError(f"tensor {name}.{suffix} is missing from {path}; copy the checkpoint again")
    scales = parts.get("scales", torch.empty(shape[0], 0, dtype=torch.float16))
    return QTensor(parts["qweight"], scales, parts.get("zeros"), shape, precision)


def canonical(data: Mapping[str, Any]) -> bytes:
    """The exact form of hashes.json."""
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()
