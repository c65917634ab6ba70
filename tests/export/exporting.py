"""Tiny packed models to export."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

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


def with_pieces(folder: Path) -> Path:
    """Give a tiny model a tokenizer like Mixtral's: pieces that begin with \u2581, bytes where there are none."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"\u2581thea:,"]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("t", "h"), ("th", "a")]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *(left + right for left, right in merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    for file in folder.glob("tokenizer*"):
        file.unlink()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    return folder
