"""What the commands do with images."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["prompt_of"]


def prompt_of(options: argparse.Namespace) -> tuple[Any, Any]:
    """The prompt of ``mopeq run`` and, of a model that takes images, its processor.

    Such a model gets a conversation: the images, then the text. Raises :class:`ModelError` for images that the model
    does not take, before it is loaded.
    """
    from mopeq.load import load_processor, takes_images

    if not options.image and not takes_images(options.model):
        return options.prompt, None
    processor = load_processor(options.model)
    parts: list[dict[str, Any]] = [{"type": "image", "path": path} for path in options.image]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": options.prompt}]}], processor
