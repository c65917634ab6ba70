"""An image from wherever it is to upright 8-bit RGB, or one sentence that says why not.

Files are turned as their EXIF orientation says; the reference processors of DeepSeek-VL2 and MolmoE leave them as they
lie. Transparency is dropped, as ``convert("RGB")`` does it and as these models saw it in training.
"""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mopeq.errors import DataError

__all__ = ["MAX_PIXELS", "MAX_RATIO", "open_image"]

MAX_PIXELS = 89_478_485
"""Most pixels of an image: Pillow's own limit against decompression bombs, a quarter of a gigabyte in RGB."""
MAX_RATIO = 200
"""Longest side over shortest, unless a processor says less: what is scaled down to a tile must keep a row of pixels."""
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"""Modes with more than 8 bits a channel, which ``convert`` would clip instead of scale."""


def open_image(source: Any, name: str = "", ratio: int = MAX_RATIO, pixels: int = MAX_PIXELS) -> Image.Image:
    """An upright RGB image from a path, a ``data:`` address, bytes, an array (H, W, 3) uint8, or a Pillow image.

    Args:
        source: the image.
        name: how to call it in a message; by default its path.
        ratio: most of the longest side over the shortest.
        pixels: most of them, known before they are decoded.

    Raises:
        DataError: no such file, not an image, damaged, several frames, more than 8 bits a channel, or a size that
            cannot be used.
    """
    name = name or _name(source)
    if isinstance(source, Image.Image):
        return _upright(source, name, ratio, pixels)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise DataError(
                f"{name} is an array {list(source.shape)} of {source.dtype}; expected uint8 (height, width, 3); "
                "convert it"
            )
        return _upright(Image.fromarray(source), name, ratio, pixels)
    data = _bytes(source, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            image = Image.open(io.BytesIO(data))
        with image as opened:
            _check_size(opened, name, ratio, pixels)
            frames = getattr(opened, "n_frames", 1)
            if frames > 1 and opened.format != "MPO":  # the second picture of an MPO is a preview
                raise DataError(f"{name} has {frames} frames; expected one image, not a video; save one frame of it")
            opened.load()
            return _upright(opened, name, ratio, pixels)
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{name} has too many pixels for Pillow; expected at most {MAX_PIXELS} in all; scale it down first"
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{name} is no image that Pillow can read ({len(data)} bytes); expected PNG, JPEG, WebP or the like; "
            "convert it or give another file"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow raises within a damaged file
        raise DataError(
            f"{name} is damaged or truncated ({str(error) or type(error).__name__}); expected a whole image; "
            "download or save it again"
        ) from error


def _name(source: Any) -> str:
    if isinstance(source, (str, Path)) and not str(source).startswith("data:"):
        return str(source)
    return getattr(source, "filename", "") or "the image"


def _bytes(source: Any, name: str) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, str) and source.startswith("data:"):
        head, _, body = source.partition(",")
        if head.endswith(";base64"):
            try:
                return base64.b64decode(body, validate=True)
            except ValueError as error:  # binascii.Error, or not ASCII
                raise DataError(f"{name} is no base64 ({error}); expected data:image/png;base64,...") from error
        raise DataError(f"{name} starts with {head[:40]!r}; expected data:image/png;base64,...; encode it so")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise DataError(f"{name} is an address on the web; expected a local file; download it first")
    if not isinstance(source, (str, Path)):
        raise DataError(f"{name} is a {type(source).__name__}; expected a path, bytes, an array or a Pillow image")
    try:
        return Path(source).read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"no file {name}; expected an image; check the path") from error
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}; expected an image file; check the path") from error


def _check_size(image: Image.Image, name: str, ratio: int, pixels: int) -> None:
    width, height = image.size
    if not width or not height:
        raise DataError(f"{name} is {width} x {height} pixels; expected at least 1 x 1; give another image")
    if width * height > pixels:
        raise DataError(f"{name} is {width} x {height} pixels; expected at most {pixels} in all; scale it down first")
    if max(width, height) > ratio * min(width, height):
        raise DataError(f"{name} is {width} x {height} pixels; expected sides at most 1 to {ratio}; cut it into pieces")


def _upright(image: Image.Image, name: str, ratio: int, pixels: int) -> Image.Image:
    _check_size(image, name, ratio, pixels)
    if image.mode in DEEP:
        raise DataError(f"{name} has pixels of mode {image.mode}; expected 8 bits a channel; convert it")
    turned = ImageOps.exif_transpose(image)
    if turned.mode == "P" and "transparency" in turned.info:
        turned = turned.convert("RGBA")  # as Pillow asks for; the colours are the same
    return turned.convert("RGB")
