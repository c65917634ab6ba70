"""What the tests of ``mopeq.analyze`` share: a tiny model with its checkpoint and data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tiny
from mopeq.adapters import describe
from mopeq.source import Source, open_source
from mopeq.spec import MoESpec

Make = Callable[..., Path]

MICRO: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 4,
    "num_experts": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 12,
    "pad_token_id": 9,
    "bos_token_id": 10,
    "eos_token_id": 11,
}
"""An OLMoE so small that exact second derivatives and sums over the vocabulary take no time."""


class Case(NamedTuple):
    model: Any
    source: Source
    spec: MoESpec


def case(make: Make, family: str = "olmoe", dtype: torch.dtype = torch.float32, **changes: Any) -> Case:
    source = open_source(make(family, dtype=dtype, **changes))
    return Case(tiny.tiny_model(family, dtype=dtype, **changes), source, describe(source))


def batches(*shapes: tuple[int, int], seed: int = 0, words: int = 256) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, words, shape, generator=generator) for shape in shapes]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]
