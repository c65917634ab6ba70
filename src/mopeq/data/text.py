"""Text from files, calibration batches from text, and windows to score.

Documents are tokenized one by one, with the special tokens their tokenizer adds, and joined with its end-of-text token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.errors import DataError

__all__ = [
    "Window",
    "check_length",
    "fingerprint",
    "json_lines",
    "message_text",
    "read_text",
    "read_texts",
    "sliding_windows",
    "text_windows",
    "token_batches",
    "token_stream",
    "window_batches",
]


def read_texts(path: str | Path) -> list[str]:
    """The documents of a file or folder.

    A ``.jsonl`` file has one object a line, with ``text`` (a string) or ``messages`` (contents joined by blank lines).
    A folder gives its ``.txt`` files in order of name. Any other file is one document, read as UTF-8.

    Raises :class:`DataError` where nothing is found, a line is not as expected, or there is no text at all.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise DataError(f"folder {path} has no .txt files; expected text files, or give one .txt or .jsonl file")
        texts = [read_text(file) for file in files]
    elif path.suffix == ".jsonl":
        texts = list(_json_texts(path))
    elif path.suffix == ".json":
        raise DataError(f"{path} is a .json file; expected .txt, or .jsonl with one object a line; convert it")
    else:
        texts = [read_text(path)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"{path} has no text; expected at least one document that is not empty; give another file")
    return texts


def read_text(path: Path) -> str:
    """A file as UTF-8. Raises :class:`DataError` where it cannot be read or is not."""
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark, which is no text
    except FileNotFoundError as error:
        raise DataError(
            f"no file {path}; expected a .txt or .jsonl file or a folder of .txt files; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it or give another file") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error


def json_lines(path: Path, advice: str) -> Iterator[tuple[int, Any]]:
    """Number and value of every line that is not empty; :class:`DataError`, with ``advice``, for what is no JSON."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path} line {number} is not JSON ({error}); {advice}") from error
        yield number, value


def _json_texts(path: Path) -> Iterator[str]:
    expected = 'expected one object with "text" or "messages"; fix or remove the line'
    for number, record in json_lines(path, expected):
        if not isinstance(record, dict) or not ({"text", "messages"} & set(record)):
            found = (
                f"an object with {', '.join(map(str, record)) or 'no keys'}"
                if isinstance(record, dict)
                else repr(record)
            )
            raise DataError(f"{path} line {number} is {found[:120]}; {expected}")
        try:
            yield _text_of(record)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path} line {number} has text that is not a string, or messages without content ({error}); {expected}"
            ) from error


def _text_of(record: dict[str, Any]) -> str:
    text: str = record["text"] if "text" in record else message_text(record["messages"])
    return "\n\n".join([text])  # a TypeError unless it is a string


def message_text(messages: Sequence[Any]) -> str:
    """The words of a conversation's messages, joined by blank lines; KeyError or TypeError where it is none."""
    parts: list[Any] = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):  # [{"type": "text", "text": ...}, {"type": "image", ...}]
            parts.extend(part["text"] for part in content if part.get("type") == "text")
        else:
            parts.append(content)
    return "\n\n".join(parts)


def check_length(config: Any, length: int) -> None:
    """Raise :class:`DataError` where ``length`` tokens are more than the positions a transformers model is made for.

    A configuration that names no ``max_position_embeddings``, and None, take any length.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    if most is not None and length > most:
        raise DataError(f"{length} tokens in one sequence; this model takes at most {most}; give a shorter length")


def token_stream(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """All documents as one row of token ids: int64 (tokens,)."""
    eos = tokenizer.eos_token_id
    ids: list[int] = []
    for text in texts:
        if ids and eos is not None and ids[-1] != eos:
            ids.append(eos)
        ids.extend(tokenizer(text, verbose=False)["input_ids"])
    return torch.tensor(ids, dtype=torch.int64)


def token_batches(
    texts: Sequence[str], tokenizer: Any, *, samples: int, length: int, batch_size: int, seed: int
) -> list[dict[str, Tensor]]:
    """Batches of ``input_ids`` and ``attention_mask``, both int64 (batch, length), for calibration.

    The joined documents are cut into windows that do not overlap, from a random offset, and ``samples`` of them are
    taken in random order: no token is seen twice. A text with fewer windows is taken whole, and its last window is
    padded on the right.

    Raises :class:`DataError` for a text shorter than one window, or for numbers that are not positive.
    """
    for name, value, least in (("samples", samples, 1), ("length", length, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise DataError(f"{name} is {value}; expected at least {least}")
    ids = token_stream(texts, tokenizer)
    if len(ids) < length:
        raise DataError(
            f"the text has {len(ids)} tokens, fewer than one window of {length}; give more text or a shorter length"
        )
    generator = torch.Generator().manual_seed(seed)
    whole = len(ids) // length
    if samples <= whole:
        offset = int(torch.randint(len(ids) - whole * length + 1, (1,), generator=generator))
        windows = list(ids[offset : offset + whole * length].reshape(whole, length))
    else:
        windows = [window for window in torch.split(ids, length) if len(window) > 1]
    chosen = [windows[i] for i in torch.randperm(len(windows), generator=generator)[:samples].tolist()]
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return [_padded(chosen[i : i + batch_size], length, pad) for i in range(0, len(chosen), batch_size)]


def _padded(windows: Sequence[Tensor], length: int, pad: int) -> dict[str, Tensor]:
    ids = torch.full((len(windows), length), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = window
        mask[row, : len(window)] = 1
    return {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True, eq=False)
class Window:
    """Text to score: token ids int64 (n,), of which the last ``scored`` are predicted, each from those before it."""

    ids: Tensor
    scored: int


def window_batches(windows: Sequence[Window], batch_size: int) -> list[dict[str, Tensor]]:
    """Batches of ``input_ids`` and ``attention_mask`` of windows in their order, the shorter ones padded at the end."""
    parts = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    return [_padded([w.ids for w in part], max(len(w.ids) for w in part), 0) for part in parts]


def sliding_windows(ids: Tensor, length: int, stride: int | None = None) -> list[Window]:
    """Windows of at most ``length`` tokens that score every token of ``ids`` but the first exactly once.

    The default stride, ``length - 1``, makes windows that share one token: the last target of a window is the first
    context of the next (lm-evaluation-harness's rolling log-likelihood with a context of one). A smaller stride gives
    every target at least ``length - stride`` tokens of context, at ``length / stride`` times the work.
    """
    stride = length - 1 if stride is None else stride
    if length < 2 or not 1 <= stride < length:
        raise DataError(
            f"windows of {length} tokens at stride {stride}; expected length 2 or more, stride 1 to length - 1"
        )
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens; expected at least 2 to predict one; give more text")
    windows, done = [], 1
    for start in range(0, len(ids), stride):
        end = min(start + length, len(ids))
        windows.append(Window(ids[start:end], end - done))
        done = end
        if end == len(ids):
            break
    return windows


def text_windows(
    text: str | Path | Sequence[str],
    tokenizer: Any,
    length: int,
    *,
    stride: int | None = None,
    limit: int | None = None,
) -> list[Window]:
    """Windows of a text: a ``Path`` is read, a string is the text itself, a sequence of strings are documents.

    ``limit`` keeps that many windows, evenly spread over the text.
    """
    texts = read_texts(text) if isinstance(text, Path) else [text] if isinstance(text, str) else list(text)
    windows = sliding_windows(token_stream(texts, tokenizer), length, stride)
    if limit is None or limit >= len(windows):
        return windows
    if limit < 1:
        raise DataError(f"{limit} windows asked for; expected at least 1")
    return [windows[i * len(windows) // limit] for i in range(limit)]


def fingerprint(windows: Sequence[Window]) -> str:
    """Short hash of the tokens and which are scored: results are comparable if and only if these are equal."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{len(window.ids)} {window.scored} ".encode())
        digest.update(window.ids.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
