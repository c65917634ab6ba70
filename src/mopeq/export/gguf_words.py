"""The tokenizer of a model in GGUF's words, from ``tokenizer.json``.

llama.cpp has two ways to read text that such a file can ask for: byte-level BPE with one of its own splitters of words,
and sentencepiece's BPE with bytes as a last resort. A splitter is recognized by its pattern.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mopeq.errors import ModelError

__all__ = ["add_tokenizer"]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTERS = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
}
"""Names of llama.cpp for what comes between text and byte-level BPE, by the pattern in ``tokenizer.json``."""


def add_tokenizer(writer: Any, folder: Path, rows: int) -> None:
    """Write tokens, merges, special tokens and chat template of ``folder``; ``rows``: of the model's embedding.

    Raises :class:`ModelError` for a tokenizer that llama.cpp would read differently, or that there is none.
    """
    import gguf

    try:
        data = json.loads((folder / "tokenizer.json").read_bytes())
        model, added = data["model"], data.get("added_tokens", [])
        vocabulary, merges = dict(model["vocab"]), [_merge(m) for m in model["merges"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder} has no tokenizer.json with byte pairs ({error!r}), as GGUF needs; save the fast tokenizer there"
        ) from error
    if not merges:
        raise ModelError(f"the tokenizer of {folder} has no merges; llama.cpp reads none without; give another")
    bytewise = bool(model.get("byte_fallback"))
    kinds = [int(gguf.TokenType.NORMAL)] * rows
    tokens = [f"[PAD{i}]" for i in range(rows)]
    for number in range(rows):
        kinds[number] = int(gguf.TokenType.UNUSED)
    for text, number in vocabulary.items():
        if number >= rows:
            raise ModelError(f"token {text!r} is number {number}; the model has {rows}; give the model's own tokenizer")
        tokens[number] = text
        raw = bytewise and len(text) == 6 and text.startswith("<0x")
        kinds[number] = int(gguf.TokenType.BYTE if raw else gguf.TokenType.NORMAL)
        if bytewise and text == model.get("unk_token"):
            kinds[number] = int(gguf.TokenType.UNKNOWN)
    for entry in added:
        if entry["id"] < rows and kinds[entry["id"]] != int(gguf.TokenType.UNKNOWN):
            tokens[entry["id"]] = entry["content"]
            kinds[entry["id"]] = int(gguf.TokenType.CONTROL if entry.get("special") else gguf.TokenType.USER_DEFINED)
    if bytewise:
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
        writer.add_add_space_prefix(_prefixed(data.get("normalizer"), data.get("pre_tokenizer")))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitter(data.get("pre_tokenizer"), folder))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=not bytewise, n_vocab=rows)
    special.add_to_gguf(writer, quiet=True)


def _merge(entry: str | list[str]) -> tuple[str, str]:
    left, right = entry.split(" ") if isinstance(entry, str) else entry
    return left, right


def _prefixed(*steps: Any) -> bool:
    """Whether a space is put before a text."""
    parts = [part for step in steps if step for part in step.get("normalizers", step.get("pretokenizers", [step]))]
    return any(
        part.get("type") == "Prepend" or (part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )


def _splitter(steps: Any, folder: Path) -> str:
    """llama.cpp's name of a pre-tokenizer."""
    parts = steps.get("pretokenizers", [steps]) if isinstance(steps, dict) else []
    if len(parts) == 1 and parts[0].get("type") == "ByteLevel" and parts[0].get("use_regex", True):
        return "gpt-2"
    if len(parts) == 2 and parts[0].get("type") == "Split" and parts[1].get("type") == "ByteLevel":
        name = SPLITTERS.get((parts[0].get("pattern") or {}).get("Regex", ""))
        if name is not None:
            return name
    kinds = [part.get("type") for part in parts]
    if kinds[:1] == ["Split"] and kinds[-2:] == ["Digits", "ByteLevel"]:
        return "deepseek-llm"
    raise ModelError(
        f"the tokenizer of {folder} splits text by {kinds or steps!r}, which mopeq cannot name for llama.cpp; "
        f"expected that of GPT-2, Llama 3, Qwen 2 or DeepSeek; use --format dequantized and llama.cpp's own converter"
    )
