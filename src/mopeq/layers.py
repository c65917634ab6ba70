"""Keys of MoE layers: the number of the decoder layer, or that and the kind of tokens, where it has experts for two.

ERNIE 4.5 VL alone has two sets of experts in a layer, of different widths, with a router each. Each set is a MoE layer
with a key of its own, ``3`` and ``3.vision``, and all that is said of layers is said of it.
"""

from __future__ import annotations

__all__ = ["ImageExperts", "decoder_of", "image_experts", "layer_key"]

_IMAGES = 1 << 20


class ImageExperts(int):
    """Key of the experts that a decoder layer has for image tokens, beside others for text; prints as ``3.vision``.

    Keys of layers are whole numbers, and so is this, 2^20 + 3: it stands wherever a layer's number does, behind them.
    """

    def __repr__(self) -> str:
        return f"{decoder_of(self)}.vision"


def image_experts(layer: int) -> ImageExperts:
    """The key of a decoder layer's experts for image tokens."""
    return ImageExperts(layer + _IMAGES)


def decoder_of(key: int) -> int:
    """The number of the decoder layer that a key is of."""
    return key % _IMAGES


def layer_key(text: str) -> int:
    """A key from the one way in which it is written, ``3`` or ``3.vision``. Raises :class:`ValueError`."""
    number = text.removesuffix(".vision")
    if not number.isdecimal() or str(int(number)) != number or int(number) >= _IMAGES:
        raise ValueError(f"layer {text!r}; expected its number, such as 3, or 3.vision of experts for images")
    return int(number) if number == text else image_experts(int(number))
