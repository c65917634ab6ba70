"""What the native server allows its clients."""

from __future__ import annotations

from dataclasses import dataclass

from mopeq.errors import InputError

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Bounds of one server.

    body_bytes: of a request. body_seconds: to receive it. answer_seconds: from its arrival to its last token, waiting
    included. waiting: requests that may wait while another one is answered. drain_seconds: for requests in progress
    when the server is asked to stop.
    """

    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    answer_seconds: float = 600.0
    waiting: int = 16
    drain_seconds: int = 10

    def __post_init__(self) -> None:
        for name, least in (("body_bytes", 1), ("waiting", 0), ("drain_seconds", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if min(self.body_seconds, self.answer_seconds) <= 0:
            raise InputError(
                f"body_seconds is {self.body_seconds}, answer_seconds {self.answer_seconds}; expected above 0"
            )
