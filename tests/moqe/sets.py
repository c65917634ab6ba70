"""A set of three variants of a tiny model, and its router, made once a session."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mopeq import moqe
from mopeq.measure import Calibration
from mopeq.moqe.model import open_language
from mopeq.moqe.router import RouterShape, make_router, write_router

SMALL = Calibration(samples=4, length=32, batch_size=4)
CODE, PROSE = "def f(x):\n    return x + 1  # comment\n", "It was a bright cold day in April, and the clocks struck. "


def write_texts(path: Path, *texts: str) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


def calibrated(tmp: Path) -> Calibration:
    text = write_texts(tmp / "calibration.jsonl", CODE * 20, PROSE * 20)
    return Calibration(str(text), SMALL.samples, SMALL.length, SMALL.batch_size)


def random_router(made: moqe.VariantSet, seed: int = 0) -> None:
    """A router that knows nothing and whose choices differ from prompt to prompt."""
    shape = RouterShape("language", open_language(made.path).table.shape[1], len(made.names), 16)
    router = make_router(shape, seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.mul_(3)
    write_router(router, made, {})
