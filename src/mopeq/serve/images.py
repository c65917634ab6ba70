"""Images of a request: what an address may be, getting it, and opening it within the server's limits.

An address is a client's: it is never a path of the server's, and the server asks another machine for one only where it
was told which machines it may ask.
"""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from mopeq.errors import DataError
from mopeq.models.images import open_image
from mopeq.runtime.generate import Messages
from mopeq.serve.limits import Limits
from mopeq.serve.protocol import RequestError

__all__ = ["admitted", "opened"]

CHUNK = 1 << 16


async def admitted(messages: Messages, limits: Limits, takes_images: bool) -> Messages:
    """The messages with their images here, but not opened; those on the web are asked for.

    Raises :class:`RequestError` 400: the model takes none, too many, no address of an image, a machine that is not
    allowed, or no answer from it.
    """
    images = [part for message in messages for part in _images(message)]
    if images and not takes_images:
        raise RequestError(400, "this model takes text alone; send parts of type text", param=images[0]["where"])
    if len(images) > limits.images:
        raise RequestError(
            400, f"{len(images)} images; this server takes at most {limits.images} in a request", param="messages"
        )
    for part in images:
        _check(part["image"], part["where"], limits)
    web = {part["image"]: part["where"] for part in images if not part["image"].startswith("data:")}
    taken = await asyncio.gather(*(asyncio.to_thread(_fetch, url, where, limits) for url, where in web.items()))
    got = dict(zip(web, taken, strict=True))
    return _changed(messages, lambda part: {**part, "image": got.get(part["image"], part["image"])})


def opened(messages: Messages, limits: Limits) -> Messages:
    """The messages with their images opened. Raises :class:`mopeq.errors.DataError` for what is none, or too large."""
    left = limits.pixels

    def open_part(part: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal left
        image = open_image(part["image"], part["where"], pixels=left)
        left -= image.width * image.height
        return {"type": "image", "image": image}

    return _changed(messages, open_part)


def _images(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    parts = message["content"] if isinstance(message["content"], list) else []
    return [part for part in parts if part["type"] == "image"]


def _changed(messages: Messages, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Messages:
    """The messages with every image part changed."""
    return [
        {**m, "content": [change(part) if part["type"] == "image" else part for part in m["content"]]}
        if _images(m)
        else m
        for m in messages
    ]


def _check(url: str, where: str, limits: Limits) -> None:
    if url.startswith("data:"):
        return
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise RequestError(400, f"{where} has the address {url[:60]!r}: {error}", param=where) from error
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise RequestError(
            400, f"{where} has the address {url[:60]!r}; expected data:image/png;base64,...", param=where
        )
    if host not in limits.image_hosts:
        raise RequestError(
            400, f"{where} is on {host}; this server takes none from there; send data:image/png;base64,... instead",
            param=where,
        )  # fmt: skip


class _Straight(urllib.request.HTTPRedirectHandler):
    """No redirect: it may lead to a machine that is not allowed."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _fetch(url: str, where: str, limits: Limits) -> bytes:
    """The bytes at an address, within the limits of a request's size and time."""
    client = urllib.request.build_opener(_Straight, urllib.request.ProxyHandler({}))
    end, data = time.monotonic() + limits.body_seconds, b""
    most = limits.most_bytes(True)
    try:
        with client.open(url, timeout=limits.body_seconds) as answer:
            while chunk := answer.read1(CHUNK):
                data += chunk
                if len(data) > most or time.monotonic() > end:
                    raise DataError(f"more than {most:,} bytes, or {limits.body_seconds:g} seconds")
    except (OSError, HTTPException, ValueError, DataError) as error:
        raise RequestError(400, f"{where} cannot be got from its address: {error}", param=where) from error
    return data
