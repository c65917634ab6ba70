"""What ``--data`` takes: one source of text or several with weights, tables of the hub, text that the model writes.

::

    DATA   = SOURCE[:WEIGHT][,SOURCE[:WEIGHT]...]  |  self
    SOURCE = a .txt, .jsonl or .parquet file, a folder of such files, or hf:OWNER/NAME[/FOLDER], a dataset of the hub
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mopeq.data.text import message_text, read_texts
from mopeq.errors import DataError

__all__ = ["SELF", "read_data", "written"]

SELF = "self"
"""The ``--data`` that is written by the model itself."""
HUB = "hf:"
COLUMNS = ("text", "messages", "conversations", "content")
"""Columns of a table that hold a document, in the order in which they are looked for."""
_PART = re.compile(r"(?P<source>.+?)(?::(?P<weight>\d+(?:\.\d+)?))?\Z")


def read_data(data: str) -> list[str]:
    """The documents of a source, or of several, each cut down to its share of the characters.

    Of parts with weights, the one that has least for its weight is taken whole, and of the others whole documents,
    evenly spread, until their share is reached. A path that exists is a source, whatever it is called. Raises
    :class:`DataError` for what is not there or not understood.
    """
    if Path(data).exists():
        return _documents(data)
    pieces = [piece.strip() for piece in data.split(",") if piece.strip()]
    matches = [m for piece in pieces if (m := _PART.match(piece)) is not None]
    if len(matches) == 1 and matches[0]["weight"] is None:
        return _documents(matches[0]["source"])
    parts, weights = [], []
    for match in matches:
        weights.append(float(match["weight"] or 1))
        if weights[-1] <= 0:
            raise DataError(f"{match[0]!r} has weight {match['weight']}; expected more than 0; leave this source out")
        parts.append(_documents(match["source"]))
    if not parts:
        raise DataError(f"--data {data!r} names no source; expected such as a.jsonl:2,b.txt")
    least = min(sum(map(len, part)) / weight for part, weight in zip(parts, weights, strict=True))
    return [text for part, weight in zip(parts, weights, strict=True) for text in _share(part, int(least * weight))]


def _share(texts: Sequence[str], characters: int) -> Iterator[str]:
    """Documents evenly spread over all, about as many characters together; the last one is cut."""
    left, count = characters, len(texts)
    stride = next((s for s in range(int(count**0.5) + 1, count) if _coprime(s, count)), 1)  # visits all, spread out
    for i in range(count):
        if left <= 0:
            return
        text = texts[i * stride % count][:left]
        left -= len(text)
        yield text


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1


def _documents(source: str) -> list[str]:
    if source.startswith(HUB):
        return _tables(_downloaded(source.removeprefix(HUB)), source)
    path = Path(source)
    if path.suffix == ".parquet" or (path.is_dir() and any(path.rglob("*.parquet"))):
        return _tables(path, source)
    return read_texts(path)


def _downloaded(name: str) -> Path:
    """The files of a dataset of the hub, or of one folder in it, that can be read."""
    from huggingface_hub import snapshot_download

    owner, _, rest = name.partition("/")
    dataset, _, folder = rest.partition("/")
    kinds = ("*.parquet", "*.jsonl", "*.txt")
    try:
        found = snapshot_download(
            f"{owner}/{dataset}", repo_type="dataset", allow_patterns=[f"{folder}{kind}" for kind in kinds]
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{HUB}{name} cannot be had from the hub: {reason}; expected {HUB}OWNER/NAME; check the name and connection"
        ) from error
    return Path(found) / folder


def _tables(path: Path, source: str) -> list[str]:
    """Documents of parquet files, or of the other files where there are none."""
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        others = sorted([*path.rglob("*.jsonl"), *path.rglob("*.txt")]) if path.is_dir() else []
        if not others:
            raise DataError(f"{source} has no .parquet, .jsonl or .txt files; expected some; give another dataset")
        return [text for file in others for text in read_texts(file)]
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{source} is a parquet file, which pyarrow reads; install mopeq[data]") from error
    texts: list[str] = []
    for file in files:
        try:
            table = parquet.ParquetFile(file)
            columns = [name for name in COLUMNS if name in table.schema_arrow.names]
            if not columns:
                raise DataError(
                    f"{file} has columns {', '.join(table.schema_arrow.names)}; expected one of {', '.join(COLUMNS)}"
                )
            for batch in table.iter_batches(columns=columns[:1]):
                texts += (_document(file, value) for value in batch.column(0).to_pylist() if value)
        except (ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read as parquet: {str(error).splitlines()[0]}; give another") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"{source} has no text; expected at least one document that is not empty; give another file")
    return texts


def _document(file: Path, value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return message_text(value)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{file} has a row that is neither a string nor messages with content ({error}); repair or remove it"
        ) from error


def written(model: nn.Module, tokenizer: Any, *, samples: int, length: int, batch_size: int, seed: int) -> list[str]:
    """Texts that the model writes itself, drawn at temperature 1, ``length`` tokens each after its first token.

    The first one is the beginning-of-text token, or the end-of-text token, or else drawn evenly from the vocabulary.
    Words that end early are followed by other ones. The same seed gives the same texts on the same machine.
    """
    first = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    generator = torch.Generator().manual_seed(seed)
    m: Any = model
    texts: list[str] = []
    for start in range(0, samples, batch_size):
        rows = min(batch_size, samples - start)
        if first is None:
            ids = torch.randint(len(tokenizer), (rows, 1), generator=generator)
        else:
            ids = torch.full((rows, 1), first, dtype=torch.int64)
        made, cache = [ids], None
        for _ in range(length):
            with torch.no_grad():
                out = m(input_ids=made[-1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            chances = out.logits[:, -1].float().softmax(-1)
            made.append(torch.multinomial(chances, 1, generator=generator))
        texts += tokenizer.batch_decode(torch.cat(made[1:], 1), skip_special_tokens=True)
    return texts
