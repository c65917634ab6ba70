"""Messages, as transformers and the models' own code write them, to turns of text and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mopeq.errors import DataError, InputError

__all__ = ["Turn", "conversations", "images_of", "turns_of"]

ROLES = {"user": "user", "<|User|>": "user", "assistant": "assistant", "<|Assistant|>": "assistant", "system": "system"}


@dataclass(frozen=True)
class Turn:
    """What one side said; ``text`` has the image token where each of ``images`` belongs."""

    role: str
    text: str
    images: tuple[Any, ...] = ()


def turns_of(messages: Sequence[Mapping[str, Any]], image_token: str) -> list[Turn]:
    """The turns of one conversation.

    A content is a string, with image tokens in it and the images in the message's ``images``, or a list of parts:
    ``{"type": "text", "text": ...}`` and ``{"type": "image", "image" | "path" | "url": ...}``. A part that is an image
    becomes the image token and a line break.

    Raises :class:`InputError` for a role or part that is neither, and for videos; :class:`DataError` where images and
    image tokens differ in number.
    """
    turns = []
    for message in messages:
        role = ROLES.get(str(message.get("role")))
        if role is None:
            raise InputError(f"role {message.get('role')!r}; expected user, assistant or system")
        content = message.get("content", "")
        if isinstance(content, str):
            text, images = content, tuple(message.get("images") or ())
        elif isinstance(content, (list, tuple)):
            text, images = _parts(content, image_token)
        else:
            raise InputError(f"a message's content is {content!r:.60}; expected a string or a list of parts")
        tokens = text.count(image_token)
        if tokens != len(images):
            raise DataError(
                f"a message has {tokens} times {image_token} and {len(images)} images; expected as many; "
                "add what is missing, or take the other out"
            )
        turns.append(Turn(role, text, images))
    return turns


def _parts(parts: Sequence[Mapping[str, Any]], image_token: str) -> tuple[str, tuple[Any, ...]]:
    text, images = "", []
    for part in parts:
        kind = part.get("type")
        if kind == "text":
            text += str(part["text"])
        elif kind == "image":
            source = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
            if source is None:
                raise InputError('an image part without an image; expected "image", "path" or "url" in it')
            images.append(source)
            text += f"{image_token}\n"
        elif kind == "video":
            raise InputError("a video; this model takes images; give some of its frames as images")
        else:
            raise InputError(f'a part of type {kind!r}; expected "text" or "image"')
    return text, tuple(images)


def images_of(turns: Sequence[Turn]) -> list[Any]:
    """All images, in order."""
    return [image for turn in turns for image in turn.images]


def conversations(messages: Sequence[Any]) -> list[Sequence[Mapping[str, Any]]]:
    """One conversation or a batch of them, as a batch."""
    if not messages:
        raise InputError("no messages; expected at least one")
    return [messages] if isinstance(messages[0], Mapping) else list(messages)
