"""What a run is: two runs of the same job make the same result, so one goes on where the other was killed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.checkpoint import Unfinished
from mopeq.errors import MapError
from mopeq.journal import Journal
from mopeq.source import Source
from mopeq.stats import Stats, read_json, write_json

__all__ = ["hashed", "hashed_batches", "job_of", "spilled", "written", "written_before"]


def job_of(source: Source, **asked: Any) -> dict[str, Any]:
    """The job of a :class:`~mopeq.journal.Journal`: a checkpoint as it is now, what is asked for, and the versions."""
    files = sorted(set(source.files.values()))
    state = [(name, (source.path / name).stat()) for name in files]
    return {
        "model": str(source.path.resolve()),
        "checkpoint": hashed([source.config, [(name, s.st_size, s.st_mtime_ns) for name, s in state]]),
        **asked,
        "versions": {name: version(name) for name in ("mopeq", "torch", "transformers")},
    }


def hashed(value: Any) -> str:
    """A short hash of something that JSON takes."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def hashed_batches(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """A short hash of all tensors of the batches."""
    found = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


@contextmanager
def spilled(out: str | Path | None, needed: int, job: Mapping[str, Any], resume: bool) -> Iterator[Journal | None]:
    """The journal of the folder beside ``out`` for ``needed`` bytes until that is made; None, for memory, without it.

    What was made of it is to be written before this ends. Raises as :class:`~mopeq.checkpoint.Unfinished`.
    """
    if out is None:
        yield None
        return
    with Unfinished(out, needed_bytes=needed, job=job, resume=resume) as folder, folder.disk():
        yield folder.journal
        folder.remove()


def written(out: str | Path | None, stats: Stats, **info: Any) -> Stats:
    """Statistics with more facts, those that are empty left out, in a file unless ``out`` is None."""
    stats = stats.with_metrics({}, **{name: value for name, value in info.items() if value})
    if out is not None:
        write_json(out, stats.to_json())
    return stats


def written_before(out: str | Path | None, job: Mapping[str, Any]) -> Stats | None:
    """What an earlier run of the same job has written."""
    try:
        stats = Stats.from_json(read_json(out)) if out is not None else None
    except MapError:  # no file, or another one, which is written anew
        return None
    return stats if stats is not None and stats.info.get("job") == hashed(job) else None
