"""What the commands do with images."""

from __future__ import annotations

import argparse
from typing import Any

from mopeq.cli import show
from mopeq.progress import drawn

__all__ = ["do_quickstart_vlm", "reader_of", "with_images"]


def do_quickstart_vlm(options: argparse.Namespace) -> None:
    """Run the main job on the bundled vision-language model."""
    from mopeq.quickstart_vlm import quickstart_vlm

    with drawn() as track:
        result = quickstart_vlm(options.out, command=options.command_line, track=track)
    if options.json:
        return show.print_json(result.to_json())
    kinds = list(result.points[0].categories)
    rows = [
        (
            point.name,
            f"{point.expert_bits:.2f}",
            show.megabytes(point.bytes),
            _share(point.accuracy),
            *(f"{100 * point.categories[kind].value:.0f}" for kind in kinds),
            "" if point.kl is None else f"{point.kl.value:.1e} [{point.kl.low:.1e}, {point.kl.high:.1e}]",
        )
        for point in result.points
    ]
    heads = ("model", "bits/weight", "MB", "right, % [95 %]", *kinds, "KL, nats [95 %]")
    show.table(f"Bundled vision-language model, {result.questions} held-out questions", heads, rows)
    print("\n".join(result.sentences))
    print(f"report: {result.report}")
    return None


def _share(value: Any) -> str:
    return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def reader_of(options: argparse.Namespace) -> Any:
    """What makes a model's inputs: its processor if it takes images, else its tokenizer.

    Raises :class:`ModelError` for images that the model does not take, before it is loaded.
    """
    from mopeq.load import load_processor, load_tokenizer, takes_images

    wanted = options.image or takes_images(options.model)
    return load_processor(options.model) if wanted else load_tokenizer(options.model)


def with_images(text: str, images: list[str]) -> Any:
    """The content of a message: the text, after the images if there are any."""
    parts: list[dict[str, Any]] = [{"type": "image", "path": path} for path in images]
    return [*parts, {"type": "text", "text": text}] if parts else text
