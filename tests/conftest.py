"""Shared fixtures. Everything runs offline and on one thread."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import save_tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model(family, dtype=..., **changes) -> folder``: saved once a session; tests must not write into it."""
    saved: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = f"{family} {sorted(options.items())}"
        if key not in saved:
            saved[key] = save_tiny(family, tmp_path_factory.mktemp(family), **options)
        return saved[key]

    return make
