"""What the native server allows its clients."""

from __future__ import annotations

from dataclasses import dataclass

from mopeq.errors import InputError

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Bounds of one server.

    body_bytes: of a request; None is 1 MiB, and 20 MiB where the model takes images. body_seconds: to receive it.
    answer_seconds: from its arrival to its last token, waiting included. waiting: requests that may wait while another
    one is answered. drain_seconds: for requests in progress when the server is asked to stop. images: of a request.
    pixels: of these together. image_hosts: names of the machines that images may be asked from, by http or https.
    """

    body_bytes: int | None = None
    body_seconds: float = 30.0
    answer_seconds: float = 600.0
    waiting: int = 16
    drain_seconds: int = 10
    images: int = 16
    pixels: int = 32_000_000
    image_hosts: frozenset[str] = frozenset()

    def most_bytes(self, images: bool) -> int:
        """Of a request to a model that takes images, or none."""
        return self.body_bytes or ((20 if images else 1) << 20)

    def __post_init__(self) -> None:
        for name, least in (("body_bytes", 1), ("waiting", 0), ("drain_seconds", 0), ("images", 0), ("pixels", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; expected at least {least}")
        if min(self.body_seconds, self.answer_seconds) <= 0:
            raise InputError(
                f"body_seconds is {self.body_seconds}, answer_seconds {self.answer_seconds}; expected above 0"
            )
