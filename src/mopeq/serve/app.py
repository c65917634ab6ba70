"""The native server: OpenAI's HTTP interface over :class:`mopeq.serve.engine.Engine`, as a Starlette application."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mopeq.serve.engine import Done, Engine
from mopeq.serve.images import admitted
from mopeq.serve.limits import Limits
from mopeq.serve.metrics import Metrics
from mopeq.serve.protocol import Ask, Form, RequestError, body_of, chunk_of, error_of, new_id, parse, usage_of

__all__ = ["application"]

PATHS: dict[str, Form] = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}
CLOSED = 499
"""Status that is counted where the client left before the answer, as in nginx's logs."""


def application(model: Any, reader: Any, name: str, limits: Limits | None = None, api_key: str = "") -> Starlette:
    """The application for one model, served as ``name``; with a key, paths under ``/v1`` ask for it.

    ``reader`` is the model's tokenizer, or its processor, and then requests may have images.
    """
    server = _Server(model, reader, name, limits or Limits(), api_key)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.engine.close)

    routes = [
        Route("/health", server.health),
        Route("/metrics", server.metrics_page),
        Route("/v1/models", server.guarded(server.models)),
        *(Route(path, server.guarded(server.generate), methods=["POST"]) for path in PATHS),
    ]
    return Starlette(
        routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error, Exception: _failed}
    )


class _Server:
    """The handlers and what they share."""

    def __init__(self, model: Any, reader: Any, name: str, limits: Limits, api_key: str) -> None:
        self.name, self.limits, self.api_key = name, limits, api_key
        self.engine, self.metrics = Engine(model, reader, limits), Metrics()
        self.metrics.present.set_function(lambda: self.engine.present)
        self.started = int(time.time())

    def guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """With the key checked, errors in OpenAI's form, and the answer counted."""

        async def handle(request: Request) -> Response:
            try:
                self._check_key(request)
                response = await handler(request)
            except RequestError as error:
                response = JSONResponse(error_of(error), error.status)
            except ClientDisconnect:
                response = Response(status_code=CLOSED)
            self.metrics.requests.labels(request.url.path, response.status_code).inc()
            return response

        return handle

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if self.api_key and not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
            raise RequestError(
                401, "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
            )  # fmt: skip

    async def health(self, request: Request) -> Response:
        """200 while the server takes requests."""
        return Response(status_code=503 if self.engine.stopping.is_set() else 200)

    async def metrics_page(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self.metrics.page(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def models(self, request: Request) -> Response:
        """The one model."""
        entry = {"id": self.name, "object": "model", "created": self.started, "owned_by": "mopeq"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def generate(self, request: Request) -> Response:
        """Completions and chat."""
        begun = time.monotonic()
        ask = parse(PATHS[request.url.path], await self._body(request), self.name)
        if not isinstance(ask.prompt, (str, tuple)):
            messages = await admitted(ask.prompt, self.limits, self.engine.takes_images)
            ask = replace(ask, prompt=messages)
        answer = self._timed(self.engine.answer(ask), begun)
        first = await _unless_left(request, anext(answer))  # an error before the first text is a plain answer
        if ask.stream:
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            return StreamingResponse(self._events(ask, first, answer), headers=headers, media_type="text/event-stream")
        text, done = await _unless_left(request, _collect(first, answer))
        usage = usage_of(done.prompt_tokens, done.new_tokens)
        return JSONResponse(body_of(ask, new_id(ask.form), self.name, text, done.finish, usage, done.logprobs))

    async def _body(self, request: Request) -> bytes:
        """The body, within the limits of size and time."""
        most = self.limits.most_bytes(self.engine.takes_images)
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise RequestError(413, f"the body is longer than {most:,} bytes; send less")
        except TimeoutError as error:
            raise RequestError(
                408,
                f"the body did not come within {self.limits.body_seconds:g} seconds; send it faster",
                kind="timeout",
            ) from error
        return bytes(body)

    async def _timed(self, answer: AsyncIterator[str | Done], begun: float) -> AsyncIterator[str | Done]:
        """The answer, measured. Closing it closes the generation."""
        heard = False
        async with contextlib.aclosing(answer) as items:  # type: ignore[type-var]
            async for item in items:
                if not heard:
                    heard = True
                    self.metrics.first.observe(time.monotonic() - begun)
                if isinstance(item, Done):
                    self.metrics.prompt_tokens.inc(item.prompt_tokens)
                    self.metrics.new_tokens.inc(item.new_tokens)
                    self.metrics.whole.observe(time.monotonic() - begun)
                yield item

    async def _events(self, ask: Ask, first: str | Done, answer: AsyncIterator[str | Done]) -> AsyncIterator[str]:
        """Server-sent events. Starlette closes this when the client leaves, and with it the generation."""
        name, created = new_id(ask.form), int(time.time())

        def event(text: str = "", finish: str | None = None, **more: Any) -> str:
            return f"data: {json.dumps(chunk_of(ask, name, created, self.name, text, finish, **more))}\n\n"

        async with contextlib.aclosing(answer) as items:  # type: ignore[type-var]
            try:
                item, beginning = first, True
                while isinstance(item, str):
                    yield event(item, first=beginning)
                    item, beginning = await anext(items), False
                yield event(finish=item.finish, first=beginning)
                if ask.include_usage:
                    yield event(usage=usage_of(item.prompt_tokens, item.new_tokens))
                yield "data: [DONE]\n\n"
            except RequestError as error:
                yield f"data: {json.dumps(error_of(error))}\n\n"


async def _collect(first: str | Done, answer: AsyncIterator[str | Done]) -> tuple[str, Done]:
    text, item = "", first
    while isinstance(item, str):
        text += item
        item = await anext(answer)
    return text, item


async def _unless_left(request: Request, work: Any) -> Any:
    """The result of ``work``; cancels it and raises :class:`ClientDisconnect` when the client leaves before."""

    async def left() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.1)

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_of(RequestError(error.status_code, message)), error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    """A fault of ours; Starlette raises it again for the log."""
    return JSONResponse(error_of(RequestError(500, "the server failed; see its log", kind="server_error")), 500)
