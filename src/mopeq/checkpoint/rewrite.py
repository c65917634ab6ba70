"""Other values for some tensors of a packed checkpoint: a whole folder beside it, then two renames."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mopeq.checkpoint.reader import HASHES, canonical, read_headers, verify
from mopeq.checkpoint.unfinished import Unfinished
from mopeq.checkpoint.writer import write_tensors
from mopeq.errors import CheckpointError, OutputError

__all__ = ["restored", "with_tensors"]


def with_tensors(path: str | Path, changed: Mapping[str, Tensor], *, without: Sequence[str] = ()) -> None:
    """Give tensors of a packed checkpoint other values of their own types; all else stays to the last byte.

    Files that do not change are linked where the disk can link them. ``without`` names files to leave out, which say
    something of the old tensors. Killed at any moment, the folder is as it was or as it should be, if
    :func:`restored` is called before it is read again.

    Raises :class:`CheckpointError` for a folder that is not whole, and for tensors that it does not have in this shape,
    :class:`OutputError` where it cannot be written.
    """
    from safetensors.torch import load_file

    path = Path(os.path.abspath(Path(path).expanduser()))
    verify(path)
    shards = {file: read_headers([file]) for file in sorted(path.glob("*.safetensors"))}
    places = {key: file for file, headers in shards.items() for key in headers}
    for key, tensor in changed.items():
        if key not in places or shards[places[key]][key][1] != tuple(tensor.shape):
            raise CheckpointError(f"{path} has no tensor {key} of shape {list(tensor.shape)}; it is another model's")
    touched = {places[key] for key in changed}
    with Unfinished(path, needed_bytes=sum(file.stat().st_size for file in touched)) as made, made.disk():
        hashes = json.loads((path / HASHES).read_bytes())
        for file in sorted(path.rglob("*")):
            at = made.partial / file.relative_to(path)
            if file.is_dir():
                at.mkdir(parents=True, exist_ok=True)
            elif file in touched:
                old = load_file(file)
                new = {key: changed[key].to(t.dtype) if key in changed else t for key, t in old.items()}
                hashes["files"][file.name], _ = write_tensors(at, new)
            elif str(file.relative_to(path)) not in {*without, HASHES}:
                at.parent.mkdir(parents=True, exist_ok=True)
                _link(file, at)
        (made.partial / HASHES).write_bytes(canonical(hashes))
        verify(made.partial)
        before = _before(path)
        path.rename(before)
        made.partial.rename(path)
        shutil.rmtree(before)


def restored(path: str | Path) -> None:
    """Undo, or finish, what a killed :func:`with_tensors` left between its renames.

    Raises :class:`OutputError` where the disk refuses.
    """
    path = Path(os.path.abspath(Path(path).expanduser()))
    before = _before(path)
    if not before.is_dir():
        return
    try:
        if path.exists():
            shutil.rmtree(before)
        else:
            before.rename(path)
            shutil.rmtree(path.with_name(path.name + ".partial"), ignore_errors=True)
    except OSError as error:
        raise OutputError(f"cannot bring back {path} from {before}: {error}; rename it by hand") from error


def _before(path: Path) -> Path:
    return path.with_name(path.name + ".before")


def _link(file: Path, at: Path) -> None:
    try:
        os.link(file, at)
    except OSError:  # another disk, or one that has no links
        shutil.copy2(file, at)
