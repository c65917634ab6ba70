"""Models whose logits are known, and textbook scores in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class Scripted(nn.Module):
    """Logits depend on the token and its position: ``table[position, token]`` (length, vocabulary, vocabulary)."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        position = torch.arange(input_ids.shape[1])
        return SimpleNamespace(logits=self.table[position, input_ids])


def scripted(seed: int, length: int = 12, vocabulary: int = 7, scale: float = 2.0) -> Scripted:
    generator = torch.Generator().manual_seed(seed)
    return Scripted(scale * torch.randn(length, vocabulary, vocabulary, generator=generator))


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def textbook(model: Scripted, ids: Tensor, scored: int) -> NDArray[np.float64]:
    """Log-probabilities (scored, vocabulary) of the last ``scored`` targets of one window."""
    rows = [model.table.detach().double().numpy()[p, int(t)] for p, t in enumerate(ids[:-1])]
    return log_softmax(np.stack(rows[-scored:]))
