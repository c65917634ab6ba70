"""Where an original model comes from: a local folder or a Hugging Face id, read header by header, tensor by tensor.

Opening reads ``config.json``, the shard index and the safetensors headers, nothing else; weights are mapped into memory
and only the pages that a slice touches are read. Every way in which a folder can be incomplete or damaged is a
:class:`~mopeq.errors.ModelError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mopeq.errors import ModelError
from mopeq.foreign import METHODS, Packed, dequantized, find_packed, method_of
from mopeq.precision import ProjectionGroup
from mopeq.safetensors_files import DTYPE_BITS, TYPES, Header, read_header, read_span, unreadable
from mopeq.spec import TOWERS, KeptRef, MoELayer, WeightRef

__all__ = [
    "Source",
    "close_files",
    "decoder_layer",
    "kept_bytes",
    "open_source",
    "read_group",
    "read_headers",
    "read_kept",
    "read_matrix",
    "read_tensor",
    "stored_bytes",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_DTYPES = ("F16", "BF16", "F32", "F64")
"""Dtypes in which a matrix that will be quantized may be stored."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?\Z")
_DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True)
class Source:
    """An original checkpoint: folder, ``config.json``, and shape, safetensors dtype and file of every tensor.

    spans: first byte of a tensor in its file, and the one after its last. packed: weights that another quantizer
    packed, by name; ``shapes`` and ``dtypes`` have them as they are read, dequantized, instead of their parts.
    """

    path: Path
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    files: Mapping[str, str]
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    packed: Mapping[str, Packed] = field(default_factory=dict)


def open_source(model: str | Path, revision: str | None = None) -> Source:
    """Open a local folder, or a Hugging Face id at a ``revision``, which is downloaded to the Hub's cache first.

    Raises :class:`ModelError` where the folder is missing, incomplete, damaged, not safetensors, or quantized in a way
    that foreign.py does not read.
    """
    path = _folder(model, revision)
    config = _read_config(path)
    headers = read_headers(path)
    made = Source(
        path=path,
        config=config,
        shapes={key: entry[1] for header in headers.values() for key, entry in header.items()},
        dtypes={key: entry[0] for header in headers.values() for key, entry in header.items()},
        files={key: name for name, header in headers.items() for key in header},
        spans={key: entry[2:] for header in headers.values() for key, entry in header.items()},
    )
    settings = config.pop("quantization_config", None)
    return made if settings is None else _unpacked(made, settings)


def _unpacked(source: Source, settings: Mapping[str, Any]) -> Source:
    """A checkpoint of another quantizer as that of the weights it stands for."""
    packed = find_packed(settings, source.shapes, partial(_stored, source))
    parts = {key for matrix in packed.values() for key in matrix.parts.values()} | {f"{name}_shape" for name in packed}
    shapes = {key: shape for key, shape in source.shapes.items() if key not in parts}
    dtypes = {key: dtype for key, dtype in source.dtypes.items() if key not in parts}
    files, spans = dict(source.files), dict(source.spans)
    for name, matrix in packed.items():
        codes = matrix.parts["codes"]
        shapes[name], dtypes[name] = matrix.shape, source.dtypes[matrix.parts["scales"]]
        files[name], spans[name] = files[codes], spans[codes]
    return replace(source, shapes=shapes, dtypes=dtypes, files=files, spans=spans, packed=packed)


def stored_bytes(source: Source, key: str) -> int:
    """Bytes of a tensor in its file."""
    return (prod(source.shapes[key]) * DTYPE_BITS[source.dtypes[key]] + 7) // 8


def read_tensor(source: Source, key: str) -> Tensor:
    """A tensor as it is stored, mapped from its file: pages are read when touched. A packed one is dequantized."""
    if key in source.packed:
        return dequantized(source.packed[key], partial(_stored, source))
    return _stored(source, key)


def _stored(source: Source, key: str) -> Tensor:
    _check_known(source, key)
    handle = _handle(source.path / source.files[key])
    try:
        tensor: Tensor = handle.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ModelError(unreadable(source.path / source.files[key], error)) from error
    return tensor


def read_kept(source: Source, ref: KeptRef) -> Tensor:
    """A tensor that is not quantized, as a packed checkpoint holds it: as it is stored, of a tower in 16 bits."""
    tensor = read_tensor(source, ref.key)
    return tensor.to(torch.bfloat16) if _is_cut(source, ref) else tensor


def kept_bytes(source: Source, ref: KeptRef) -> int:
    """Bytes of :func:`read_kept`."""
    return 2 * prod(ref.shape) if _is_cut(source, ref) else stored_bytes(source, ref.key)


def _is_cut(source: Source, ref: KeptRef) -> bool:
    return ref.group in TOWERS and source.dtypes[ref.key] in ("F32", "F64")


def read_matrix(source: Source, ref: WeightRef) -> Tensor:
    """The canonical (out, in) matrix of ``ref`` in its stored dtype; of a fused tensor only one expert's slab is read.

    Raises :class:`ModelError` that names the tensor, and the expert where it is fused, if a weight is NaN or infinite.
    """
    matrix = _view(source, ref)
    return _finite(source, ref, matrix, matrix)


def read_group(source: Source, layer: MoELayer, group: ProjectionGroup, experts: Sequence[int] | None = None) -> Tensor:
    """Weights of one projection group of a layer's experts, all or those named, float32 (experts, rows, in).

    Rows are gate's then up's for ``gate_up`` (2I, H), and down's for ``down`` (H, I). Raises like :func:`read_matrix`.
    """
    shapes = layer.shapes(group)
    wanted = layer.experts if experts is None else [layer.experts[e] for e in experts]
    stacked = torch.empty(len(wanted), sum(out for out, _ in shapes), shapes[0][1])
    spans = [_span(source, ref) for expert in wanted for ref in expert.refs(group)]
    room = torch.empty(max((end - begin for begin, end in spans), default=0), dtype=torch.uint8)
    for into, expert in zip(stacked, wanted, strict=True):
        refs = expert.refs(group)
        for rows, ref in zip(into.split([ref.shape[0] for ref in refs]), refs, strict=True):
            matrix = _read(source, ref, room)
            _finite(source, ref, matrix, rows.copy_(matrix))
    return stacked


def decoder_layer(key: str, layer: MoELayer) -> int | None:
    """The number of the decoder layer that a stored tensor belongs to, None where it is outside; ``layer``: any one."""
    prefix = layer.experts[0].gate.key.partition(f".{layer.decoder}.")[0] + "."  # most say layers, MolmoE says blocks
    return int(key[len(prefix) :].partition(".")[0]) if key.startswith(prefix) else None


def close_files() -> None:
    """Unmap all files: pages that were read count as resident memory as long as their file is mapped."""
    _mapped.cache_clear()


def _view(source: Source, ref: WeightRef) -> Tensor:
    """``ref`` (out, in) as a view of the mapped file."""
    tensor = read_tensor(source, ref.key)
    return _cut(tensor if ref.expert is None else tensor[ref.expert], ref)


def _span(source: Source, ref: WeightRef) -> tuple[int, int]:
    """Where in its file the tensor, or the expert's part of it, lies that ``ref`` is in."""
    _check_known(source, ref.key)
    begin, end = source.spans.get(ref.key, (0, 0))
    if ref.expert is None:
        return begin, end
    size = (end - begin) // source.shapes[ref.key][0]
    return begin + ref.expert * size, begin + (ref.expert + 1) * size


def _read(source: Source, ref: WeightRef, room: Tensor) -> Tensor:
    """``ref`` (out, in), read into ``room``: mapping pages takes several times as long as copying from them."""
    kind = TYPES.get(source.dtypes[ref.key])
    if ref.key in source.packed or ref.key not in source.spans or kind is None:
        return _view(source, ref)
    begin, end = _span(source, ref)
    read_span(source.path / source.files[ref.key], ref.key, begin, room[: end - begin].numpy().data)
    shape = source.shapes[ref.key]
    return _cut(room[: end - begin].view(kind).view(shape if ref.expert is None else shape[1:]), ref)


def _cut(slab: Tensor, ref: WeightRef) -> Tensor:
    """``ref`` (out, in) of the tensor, or the expert's part of it, that it is in."""
    matrix = slab.T if ref.transposed else slab
    return matrix if ref.rows is None else matrix[slice(*ref.rows)]


def _finite(source: Source, ref: WeightRef, matrix: Tensor, same: Tensor) -> Tensor:
    """``same``, which is the matrix in some type, if all of it is finite."""
    if bool(torch.isfinite(same.sum())) or bool(torch.isfinite(same).all()):  # the sum may overflow
        return same
    bad = int((~torch.isfinite(matrix.float())).sum())
    of = f", expert {ref.expert}" if ref.expert is not None else ""
    raise ModelError(
        f"{bad} of {matrix.numel()} weights of {ref.key}{of} in {source.files[ref.key]} are NaN or infinite; "
        f"expected finite weights; download this file again, or use a checkpoint without them"
    )


def _check_known(source: Source, key: str) -> None:
    if key not in source.files:
        raise ModelError(f"no tensor {key!r} in {source.path}; it has {len(source.files)} others")


# --- folders


def _folder(model: str | Path, revision: str | None) -> Path:
    """The local folder of a model, downloading it where ``model`` is a Hub id."""
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path
        found = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a null byte, an unknown ~user
        raise ModelError(f"{str(model)[:80]!r} cannot be a folder ({error}); expected a folder or a Hub id") from error
    if found:
        raise ModelError(
            f"{model} is a file; expected a model folder or a Hugging Face id such as allenai/OLMoE-1B-7B-0924"
        )
    if isinstance(model, Path) or not _HUB_ID.match(model):
        raise ModelError(
            f"no folder {model}; expected a model folder or a Hugging Face id such as allenai/OLMoE-1B-7B-0924"
        )
    # config.json first: a checkpoint that will be refused is not worth downloading
    _read_config(_download(model, revision, ["config.json"]))
    return _download(model, revision, _DOWNLOADED)


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        folder = snapshot_download(
            model, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
        )
    except Exception as error:  # the client raises errors of several libraries: HTTP, file system, validation
        at = f" at revision {revision}" if revision else ""
        if constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"{model}{at} is neither a folder here nor in the Hugging Face cache, and HF_HUB_OFFLINE is set; "
                f"give a folder, or unset HF_HUB_OFFLINE to download it"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{model}{at} is no folder here and could not be fetched from the Hugging Face Hub ({reason.rstrip('.')}); "
            f"check the name and the connection, or give a folder"
        ) from error
    return Path(folder)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(f"{path} has no config.json; expected a Hugging Face model folder{_advice(path)}")
    config = _read_json(file)
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds a {type(config).__name__}; expected a JSON object; download it again")
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        settings = part.get("quantization_config") or part.get("compression_config")
        if settings and not (part is config and method_of(part.get("quantization_config"))):
            _refuse_quantized(path, settings)
    return config


def _refuse_quantized(path: Path, settings: object) -> None:
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    method = method if isinstance(method, str) and method.isprintable() else None
    if method == "mopeq":
        raise ModelError(
            f"{path} is already packed by mopeq; expected an original model in 16 or 32 bits; "
            f"load it as it is, or give the model that it was made from"
        )
    raise ModelError(
        f"{path} is already quantized ({method or 'method unknown'}); expected weights in 16 or 32 bits, or packed by "
        f"{', '.join(METHODS)}; give the bfloat16 checkpoint of this model, or dequantize it with transformers"
    )


def read_headers(path: Path) -> dict[str, Header]:
    """Headers of the safetensors files by name, checked against the index where there is one."""
    present = sorted(p.name for p in path.glob("*.safetensors") if p.is_file())
    if not (path / INDEX).is_file():
        if SINGLE in present:
            return {SINGLE: read_header(path / SINGLE)}
        if present:
            raise ModelError(
                f"{path} holds {len(present)} safetensors files ({', '.join(present[:3])}) and no {INDEX}; "
                f"expected {SINGLE}, or shards with their index; download the index"
            )
        raise ModelError(
            f"{path} has no safetensors files; expected {SINGLE}, or shards with their index{_advice(path)}"
        )
    index = _read_json(path / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{path / INDEX} has no weight_map of tensor names to file names; download it again")
    shards = sorted(set(names.values()))
    outside = [name for name in shards if Path(name).name != name or not name.isprintable()]
    if outside:
        raise ModelError(f"{path / INDEX} names {outside[0]!r}; expected names of files beside it; download it again")
    if SINGLE in present and SINGLE not in shards:
        raise ModelError(
            f"{path} has both {SINGLE} and {INDEX}, which does not name it; remove the one that is not in use"
        )
    missing = [name for name in shards if name not in present]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(shards)} shards are missing from {path}: {', '.join(missing[:3])}"
            f"{' ...' if len(missing) > 3 else ''}; expected all that {INDEX} names; download them"
        )
    headers = {shard: read_header(path / shard) for shard in shards}
    listed: dict[str, set[str]] = {shard: set() for shard in shards}
    for key, shard in names.items():
        listed[shard].add(key)
    for shard, header in headers.items():
        if lacking := sorted(listed[shard] - set(header)):
            raise _index_error(path, f"{shard} lacks {_some(lacking)}, which {INDEX} places there")
    for shard, header in headers.items():
        if unlisted := sorted(set(header) - listed[shard]):
            other = names.get(unlisted[0])
            if other is not None:
                raise _index_error(path, f"tensor {unlisted[0]!r} is in both {other} and {shard}")
            raise _index_error(path, f"{shard} holds {_some(unlisted)}, which {INDEX} does not name")
    return headers


def _index_error(path: Path, what: str) -> ModelError:
    return ModelError(f"{what}, in {path}; expected every tensor once, where the index says; download both again")


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors, among them {names[0]!r}" if len(names) > 1 else f"tensor {names[0]!r}"


def _advice(path: Path) -> str:
    """What else lies in the folder, as the end of a sentence."""
    for suffix, advice in (
        (".gguf", "this is a GGUF model, give the original safetensors checkpoint"),
        (".bin", "these are PyTorch pickles, load them with transformers and save_pretrained to another folder"),
        (".pt", "these are PyTorch pickles, convert them to the Hugging Face layout first"),
        (".pth", "these are PyTorch pickles, convert them to the Hugging Face layout first"),
    ):
        found = sorted(path.glob(f"*{suffix}"))
        if found:
            return f"; found {found[0].name}: {advice}"
    if next(path.iterdir(), None) is None:
        return "; the folder is empty"
    return "; check the path"


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not readable JSON ({error}); expected a JSON object; download it again") from error


# --- files


def _handle(file: Path) -> Any:
    try:
        status = file.stat()
        return _mapped(file, status.st_ino, status.st_size, status.st_mtime_ns)
    except (SafetensorError, OSError) as error:
        raise ModelError(unreadable(file, error)) from error


@lru_cache(maxsize=32)
def _mapped(file: Path, *version: int) -> Any:
    return safe_open(file, framework="pt")
