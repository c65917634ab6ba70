"""The trained models, the text and the images that come with mopeq."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from mopeq.errors import DataError

__all__ = ["bundled_images", "bundled_model", "bundled_text", "bundled_vlm"]

TEXTS = ("calibration.jsonl", "heldout_code.txt", "heldout_docs.txt")
IMAGES = ("calibration.jsonl", "heldout.tsv")


def bundled_model() -> Path:
    """Folder of the bundled OLMoE model, as the hub stores models."""
    return _asset("olmoe-tiny")


def bundled_text(name: str) -> Path:
    """A bundled text by file name: ``calibration.jsonl``, ``heldout_code.txt`` or ``heldout_docs.txt``."""
    if name not in TEXTS:
        raise DataError(f"no bundled text {name!r}; there are {', '.join(TEXTS)}")
    return _asset(f"text/{name}")


def bundled_vlm() -> Path:
    """Folder of the bundled DeepSeek-VL2 model, as the hub stores models."""
    return _asset("deepseek-vl2-tiny")


def bundled_images(name: str) -> Path:
    """A bundled file with images: ``calibration.jsonl``, conversations, or ``heldout.tsv``, questions to judge by."""
    if name not in IMAGES:
        raise DataError(f"no bundled images {name!r}; there are {', '.join(IMAGES)}")
    return _asset(f"vlm/{name}")


def _asset(name: str) -> Path:
    path = Path(str(files("mopeq") / "assets" / name))
    if not path.exists():
        raise DataError(
            f"this installation of mopeq lacks its bundled {name}; expected it at {path}; install mopeq again"
        )
    return path
