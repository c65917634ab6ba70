"""Text for routers: prompts and what follows them, the loss of each variant on it, and training on both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.data.text import Window, check_length, fingerprint
from mopeq.errors import DataError
from mopeq.evaluate.perplexity import score_windows
from mopeq.moqe.make import document_hashes, learning_texts
from mopeq.moqe.model import Moqe, open_language
from mopeq.moqe.router import PromptRouter, fitting_shape, make_router, parameters_of, write_router
from mopeq.moqe.store import VariantSet
from mopeq.moqe.training import Settings, Trained, finish, fit
from mopeq.progress import Track, silent

__all__ = ["prompted_windows", "prompts_of", "train", "variant_losses"]


def prompted_windows(texts: Sequence[str], tokenizer: Any, prompt: int, length: int) -> list[Window]:
    """Windows of ``length`` tokens, of which the first ``prompt`` are given and the others scored.

    Windows do not overlap and lie within a document. Raises :class:`DataError` where no document is long enough.
    """
    if not 1 <= prompt < length:
        raise DataError(
            f"prompts of {prompt} tokens in windows of {length}; expected at least 1, and fewer than the window"
        )
    made = []
    for text in texts:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
        made += [Window(part, length - prompt) for part in torch.split(ids, length) if len(part) == length]
    if not made:
        raise DataError(f"no document has {length} tokens; give longer documents, or a shorter --length")
    return made


def prompts_of(windows: Sequence[Window]) -> list[Tensor]:
    """What a router may see of each window: the tokens before the first that is scored."""
    return [window.ids[: len(window.ids) - window.scored] for window in windows]


def variant_losses(opened: Moqe, windows: Sequence[Window], *, batch_size: int = 8, track: Track = silent) -> Tensor:
    """Mean nats of a scored token of each window with each variant: float64 (windows, variants)."""
    columns = []
    counts = torch.tensor([window.scored for window in windows], dtype=torch.float64)
    for name in opened.made.names:
        nats = score_windows(opened.pool(name), windows, batch_size=batch_size, track=track)
        columns.append(torch.tensor(nats, dtype=torch.float64) / counts)
    return torch.stack(columns, 1)


def train(
    path: str | Path,
    data: str | Path | None = None,
    *,
    prompt: int = 64,
    length: int = 192,
    settings: Settings | None = None,
    resident: int | None = 1,
    dtype: torch.dtype | None = None,
    restart: bool = False,
    command: str = "",
    track: Track = silent,
) -> Trained:
    """Train the router of a set on text that no variant was calibrated on; it replaces an earlier router.

    Args:
        path: the set.
        data: text or JSONL; None is the third of the bundled text that ``build`` keeps apart.
        prompt: tokens that the router may read of each window.
        length: tokens of a window; those after the prompt make the label.
        settings: of the training.
        resident: variants in memory while labels are made.
        dtype: compute type of the variants.
        restart: forget an interrupted training; otherwise it is continued.
        command: command line to record.
        track: progress.

    Raises:
        DataError: too little text, or text that variants were calibrated on.
    """
    settings = settings or Settings()
    opened = open_language(path, resident, dtype)
    made = opened.made
    texts = learning_texts(data)
    check_unseen(made, texts)
    windows = prompted_windows(texts, opened.tokenizer, prompt, length)
    check_length(opened.pool(made.names[0]), length)
    losses = _cached_losses(opened, windows, track)
    shape = fitting_shape("language", opened.table.shape[1], len(made.names), made.info["parameters"])
    router = make_router(shape, settings.seed)
    assert isinstance(router, PromptRouter)
    prompts = prompts_of(windows)

    def inputs(numbers: Tensor) -> tuple[Tensor, ...]:
        return opened.router_inputs([prompts[i] for i in numbers.tolist()], shape.tokens)

    folder = made.path / "router"
    found = fit(router, inputs, losses, made.names, settings, folder, restart=restart, track=track)
    about = {"prompt": prompt, "length": length, "text": fingerprint(windows), "command": command}
    share = parameters_of(router) / made.info["parameters"]
    record = {"share": share, "settings": asdict(settings), "data": about, "validation": asdict(found)}
    write_router(router, made, record)
    finish(folder)
    return found


def check_unseen(made: VariantSet, texts: Sequence[str]) -> None:
    """Raise :class:`DataError` where variants were calibrated on some of the documents."""
    seen = document_hashes(texts) & set(made.calibration)
    if seen:
        raise DataError(
            f"{len(seen)} of {len(texts)} documents calibrated a variant, whose loss on them says little; "
            f"give other text with --data"
        )


def _cached_losses(opened: Moqe, windows: Sequence[Window], track: Track) -> Tensor:
    """Losses, kept beside the router so that an interrupted training need not run the variants again."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    file = opened.made.path / "router" / "losses.safetensors"
    key = f"{opened.made.id} {fingerprint(windows)}"
    if file.is_file():
        with safe_open(file, "pt") as stored:
            if (stored.metadata() or {}).get("of") == key:
                kept: Tensor = stored.get_tensor("losses")
                return kept
    losses = variant_losses(opened, windows, track=track)
    file.parent.mkdir(exist_ok=True)
    beside = file.with_name(f".{file.name}.partial")
    save_file({"losses": losses}, beside, metadata={"of": key})
    beside.replace(file)
    return losses
