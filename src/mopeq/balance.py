"""Calibration sequences chosen so that experts that are seldom used are seen too.

A quantizer that fits what an expert saw has little to go on where that is a few tokens. So a larger pool of sequences
is run through the model once, forward only, tokens are counted by expert, and of the pool those sequences are taken
that together give each expert ``share`` times an even share, ``share * k * N / n`` of ``N`` tokens with ``k`` of ``n``
experts each, as far as the pool has them (EAQuant, arXiv 2506.13329, has the bound; MoEQuant, arXiv 2505.03804, reaches
balance by sampling text instead). Once it is reached, what is left is filled in the order drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mopeq.analyze.forward import Batch, token_mask
from mopeq.progress import Track, silent
from mopeq.source import Source
from mopeq.spec import MoESpec
from mopeq.stream import Shell, Store, forward

__all__ = ["POOL", "Balance", "balanced", "covering", "sequence_tokens"]

POOL = 4
"""Sequences that are looked at for each that is taken."""
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Balance:
    """What choosing changed. Experts: of all layers together.

    share: of an even share, asked for. pool, taken: sequences. least: tokens that a layer's experts should get, least
    over layers. short_before, short_after: experts below theirs among as many sequences drawn at random, and among
    those chosen. fewest_before, fewest_after: tokens of the expert that got fewest.
    """

    share: float
    pool: int
    taken: int
    least: int
    short_before: int
    short_after: int
    fewest_before: int
    fewest_after: int

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def balanced(
    source: Source, spec: MoESpec, batches: Sequence[Batch], samples: int, share: float, track: Track = silent
) -> tuple[list[dict[str, Tensor]], Balance]:
    """Batches of ``samples`` sequences of a pool, in batches of the pool's size, and what choosing changed.

    Memory is that of running ``samples`` sequences. The model runs in the checkpoint's own type.
    """
    counts = sequence_tokens(source, spec, batches, samples, track)
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    even = np.concatenate([np.full(len(layer.experts), layer.top_k / len(layer.experts)) for layer in spec.layers])
    tokens = samples * int(whole["attention_mask"].sum()) / len(counts)
    wanted = np.ceil(share * tokens * even).astype(np.int64)
    taken = covering(counts, wanted, samples)
    before, after = counts[:samples].sum(0), counts[taken].sum(0)
    found = Balance(
        share, len(counts), len(taken), int(wanted.min()), int((before < wanted).sum()), int((after < wanted).sum()),
        int(before.min()), int(after.min()),
    )  # fmt: skip
    size = len(batches[0]["input_ids"])
    parts = torch.split(torch.tensor(taken), size)
    return [{name: tensor[part] for name, tensor in whole.items()} for part in parts], found


def covering(counts: Counts, wanted: Counts, take: int) -> list[int]:
    """Rows of ``counts`` (sequences, experts), ``take`` of them, that cover ``wanted`` (experts,) greedily.

    The next row is the one that brings most tokens that are still missing, an even share of each layer's experts
    counting alike; of equal ones the first, so that nothing missing takes rows in order. Ascending.
    """
    missing = np.minimum(wanted, counts.sum(0))
    left = np.ones(len(counts), dtype=bool)
    for _ in range(min(take, len(counts))):
        gains = np.where(left, np.minimum(counts, missing).sum(1), -1)
        best = int(gains.argmax())
        left[best] = False
        missing = missing - np.minimum(missing, counts[best])
    return [int(row) for row in np.flatnonzero(~left)]


def sequence_tokens(
    source: Source, spec: MoESpec, batches: Sequence[Batch], at_once: int, track: Track = silent
) -> Counts:
    """Tokens of each sequence that each expert of each layer gets, (sequences, experts), ``at_once`` at a time."""
    shell = Shell(source, spec)
    size = max(1, at_once // len(batches[0]["input_ids"]))
    made = []
    for begin in range(0, len(batches), size):
        part = batches[begin : begin + size]
        lengths = torch.cat([token_mask(batch).sum(1) for batch in part])
        owner = torch.arange(len(lengths)).repeat_interleave(lengths)
        layers = [
            _by_sequence(owner, seen.index, len(lengths), len(layer.experts))
            for layer, _, seen in forward(shell, part, Store(), track=track)
        ]
        made.append(torch.cat(layers, 1).numpy())
    return np.concatenate(made)


def _by_sequence(owner: Tensor, index: Tensor, sequences: int, experts: int) -> Tensor:
    """Tokens (sequences, experts); owner: the sequence of each token, index: its experts (tokens, k), -1 for none."""
    cell = (owner[:, None] * experts + index)[index >= 0]
    return torch.bincount(cell, minlength=sequences * experts).reshape(sequences, experts)
