"""Images in folders, one for each class, prepared as a model's ``preprocessor_config.json`` says, with Pillow alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mopeq.errors import DataError, ModelError
from mopeq.stats import read_json

__all__ = ["Images", "preparation", "read_images"]

LARGE, DEFAULT_CROP = 384, 224 / 256
"""As ConvNextImageProcessor, which ResNet uses: from 384 pixels on nothing is cut off."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class Images:
    """Prepared images float32 (n, channels, height, width), their classes int64 (n,), and a hash of each file."""

    pixels: Tensor
    labels: Tensor
    hashes: tuple[str, ...]


def read_images(folder: str | Path, model: str | Path) -> Images:
    """The images of ``FOLDER/CLASS/*.png|jpg|...`` (as ImageNet is kept), prepared for a model's folder.

    A class's folder is named by its label, or the folders in order of name are the classes in order of number.
    Raises :class:`DataError` where there are none, or other classes than the model knows.
    """
    folder, config = Path(folder), read_json(Path(model) / "config.json")
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; expected one folder of images for each class in it")
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    known = config.get("label2id") or {}
    count = len(known) or config.get("num_labels", 0)
    named = all(path.name in known for path in classes)
    if not classes or (not named and len(classes) != count):
        raise DataError(
            f"{folder} has {len(classes)} folders; expected one for each of {count} classes, or named as the model "
            f"names its classes"
        )
    files = [
        (file, int(known[path.name]) if named else number)
        for number, path in enumerate(classes)
        for file in sorted(path.iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise DataError(f"{folder} has no images ({', '.join(SUFFIXES)}) in its class folders; check the path")
    prepare = preparation(Path(model))
    pixels = torch.stack([prepare(file) for file, _ in files])
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file, _ in files]
    return Images(pixels, torch.tensor([label for _, label in files]), tuple(hashes))


def preparation(model: Path) -> Callable[[Path], Tensor]:
    """Resize, cut the middle out, scale and normalize, as ``preprocessor_config.json`` asks."""
    from PIL import Image, UnidentifiedImageError

    file = model / "preprocessor_config.json"
    if not file.is_file():
        raise ModelError(f"{model} has no preprocessor_config.json, which says how images are prepared; add it")
    settings = read_json(file)
    size = settings.get("size") or {}
    edge = size.get("shortest_edge") or size.get("height")
    if not isinstance(edge, int):
        raise ModelError(f'{file} has size {size!r}; expected "shortest_edge" or "height" in pixels')
    channels = int(read_json(model / "config.json").get("num_channels", 3))
    mean, std = (
        torch.tensor(settings.get(key, [default] * channels)).view(-1, 1, 1)
        for key, default in (("image_mean", 0.0), ("image_std", 1.0))
    )
    cut = "shortest_edge" in size and edge < LARGE
    first = int(edge / settings.get("crop_pct", DEFAULT_CROP)) if cut else edge

    def prepare(path: Path) -> Tensor:
        try:
            image = Image.open(path).convert("RGB" if channels == 3 else "L")
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{path} is no readable image; remove it or give another") from error
        short = min(image.size)
        wide, high = (first * side // short if cut else edge for side in image.size)
        image = image.resize((wide, high), Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC)))
        left, top = (wide - edge) // 2, (high - edge) // 2
        values = np.asarray(image.crop((left, top, left + edge, top + edge)), dtype=np.float32)
        tensor = torch.from_numpy(values).reshape(edge, edge, channels).permute(2, 0, 1)
        scaled: Tensor = (tensor * settings.get("rescale_factor", 1 / 255) - mean) / std
        return scaled

    return prepare
