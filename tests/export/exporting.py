"""Tiny packed models to export."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mopeq.measure import open_model
from mopeq.precision import DEFAULT_REST, GROUPS, Precision, PrecisionMap, parse_precision
from packing import pack_model

REST = dict.fromkeys(DEFAULT_REST, Precision(8, 32, True))


def packed(
    make: Callable[..., Path], tmp_path: Path, family: str, *row: str, rest: Mapping[str, Precision] = REST,
    **changes: Any,
) -> Path:  # fmt: skip
    """A tiny model whose experts get the precisions of ``row`` in turn."""
    folder = make(family, dtype=torch.bfloat16, **changes)
    kinds = [parse_precision(text) for text in row]
    layers = open_model(folder).inventory.experts
    experts = {g: {k: tuple(kinds[(e + i) % len(kinds)] for e in range(n)) for k, n in layers.items()}
               for i, g in enumerate(GROUPS)}  # fmt: skip
    pack_model(folder, tmp_path / "packed", PrecisionMap(experts, rest, {}))
    return tmp_path / "packed"


def with_merges(folder: Path) -> Path:
    """Give the byte-level tokenizer of a tiny model a few merges, which llama.cpp wants."""
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    first = max(data["model"]["vocab"].values()) + 1
    for number, (left, right) in enumerate([("t", "h"), ("th", "e"), ("Ġ", "a")]):
        data["model"]["merges"].append([left, right])
        data["model"]["vocab"][left + right] = first + number
    for entry in data["added_tokens"]:
        entry["id"] += 3
    file.write_text(json.dumps(data))
    return folder
