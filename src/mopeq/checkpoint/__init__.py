"""Packed checkpoints: the only package that knows docs/format.md.

:class:`PackedWriter` makes one, :func:`verify` proves one whole, :func:`read_manifest` and :func:`read_packed` read it.
Whatever is wrong with a folder is a :class:`~mopeq.errors.CheckpointError`; whatever keeps one from being written is an
:class:`~mopeq.errors.OutputError`.
"""

from mopeq.checkpoint.manifest import Manifest, PackedExperts, PackedLinear, linear_precisions, packed_config
from mopeq.checkpoint.reader import (
    check_packed,
    read_headers,
    read_manifest,
    read_packed,
    rest_elements,
    verify,
)
from mopeq.checkpoint.rewrite import restored, with_tensors
from mopeq.checkpoint.unfinished import Unfinished
from mopeq.checkpoint.writer import PackedWriter, Stored, write_tensors

__all__ = [
    "Manifest",
    "PackedExperts",
    "PackedLinear",
    "PackedWriter",
    "Stored",
    "Unfinished",
    "check_packed",
    "linear_precisions",
    "packed_config",
    "read_headers",
    "read_manifest",
    "read_packed",
    "rest_elements",
    "restored",
    "verify",
    "with_tensors",
    "write_tensors",
]
