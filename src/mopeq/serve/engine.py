"""One model answering one request at a time, in a thread of its own, for an asyncio server."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopeq.errors import InputError
from mopeq.runtime.generate import Generation, generate, text_ids
from mopeq.serve.images import opened
from mopeq.serve.limits import Limits
from mopeq.serve.protocol import Ask, RequestError

__all__ = ["Done", "Engine"]


@dataclass(frozen=True)
class Done:
    """How an answer ended: ``stop`` or ``length``, its tokens, and OpenAI's ``logprobs`` of them where asked for."""

    finish: str
    prompt_tokens: int
    new_tokens: int
    logprobs: dict[str, Any] | None = None


class Engine:
    """Requests wait in line for the model, whose tokenizer or processor is ``reader``. To be used in one event loop."""

    def __init__(self, model: Any, reader: Any, limits: Limits) -> None:
        self.model, self.reader, self.limits = model, reader, limits
        self.takes_images = hasattr(reader, "tokenizer")
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="mopeq")
        self.present = 0
        """Requests in progress and waiting."""
        self.stopping = threading.Event()

    def close(self) -> None:
        """Let the request in progress end at its next token, and those waiting with an error."""
        self.stopping.set()
        self.pool.shutdown(wait=True, cancel_futures=True)

    async def answer(self, ask: Ask) -> AsyncIterator[str | Done]:
        """Pieces of text, then :class:`Done`.

        To leave the iterator (``aclose``, or a cancelled task) ends the generation at its next token. Raises
        :class:`RequestError`: 400 the model cannot take it, 429 too many wait, 503 the server stops, 504 out of time.
        """
        if self.present > self.limits.waiting:
            raise RequestError(
                429, f"{self.present} requests are here already; try again later", kind="rate_limit_error",
                code="queue_full",
            )  # fmt: skip
        job = _Job(ask, self.limits, self.stopping)
        self.present += 1
        future = asyncio.get_running_loop().run_in_executor(self.pool, job.run, self.model, self.reader)
        future.add_done_callback(self._left)
        future.add_done_callback(job.ended)
        try:
            while (item := await job.next()) is not None:
                yield item
        finally:
            job.cancelled.set()
            future.cancel()

    def _left(self, future: asyncio.Future[None]) -> None:
        self.present -= 1


class _Job:
    """One generation, between the event loop and the model's thread."""

    def __init__(self, ask: Ask, limits: Limits, stopping: threading.Event) -> None:
        self.ask, self.limits, self.stopping = ask, limits, stopping
        self.deadline = time.monotonic() + limits.answer_seconds
        self.cancelled = threading.Event()
        self.loop = asyncio.get_running_loop()
        self.items: asyncio.Queue[str | Done | Exception | None] = asyncio.Queue()
        self.text, self.given, self.met_stop = "", 0, False

    async def next(self) -> str | Done | None:
        """What comes next; None after the end. Waiting is bounded too: a request may wait long for its turn."""
        try:
            item = await asyncio.wait_for(self.items.get(), max(0.0, self.deadline - time.monotonic()))
        except TimeoutError:
            item = _late()
        if isinstance(item, Exception):
            raise item
        return item

    def ended(self, future: asyncio.Future[None]) -> None:
        """In the event loop, when the thread is through or never began."""
        if future.cancelled():
            self.items.put_nowait(_stops())
        elif future.exception() is not None:
            self.items.put_nowait(RequestError(500, "the model failed; see the server's log", kind="server_error"))
            self.loop.call_exception_handler({"message": "generation failed", "exception": future.exception()})
        self.items.put_nowait(None)

    def run(self, model: Any, reader: Any) -> None:
        """In the model's thread."""
        ask, tokenizer = self.ask, getattr(reader, "tokenizer", reader)
        if self._over():
            return self._refuse()
        try:
            prompt = _prompt(ask, reader, self.limits)
            if ask.echo:
                self._put(ask.prompt if isinstance(ask.prompt, str) else tokenizer.decode(prompt))
            made = generate(
                model, reader, prompt, max_new_tokens=ask.max_tokens, temperature=ask.temperature, top_p=ask.top_p,
                seed=ask.seed, stream=self._hear, stopped=lambda: self.met_stop or self._over(), likeliest=ask.logprobs,
            )  # fmt: skip
        except InputError as error:
            return self._put(RequestError(400, str(error)))
        if self._over() and not self.met_stop:
            return self._refuse()
        if not self.met_stop:
            self._give(len(self.text))
        end = model.generation_config.eos_token_id
        ends = {*end} if isinstance(end, list) else {end, tokenizer.eos_token_id}
        by_itself = self.met_stop or (bool(made.tokens) and made.tokens[-1] in ends)
        logprobs = None if ask.logprobs is None else _logprobs(tokenizer, prompt, made, ask.echo)
        return self._put(Done("stop" if by_itself else "length", made.prompt_tokens, len(made.tokens), logprobs))

    def _over(self) -> bool:
        return self.cancelled.is_set() or self.stopping.is_set() or time.monotonic() > self.deadline

    def _refuse(self) -> None:
        self._put(_stops() if self.stopping.is_set() else _late())

    def _hear(self, piece: str) -> None:
        """A new piece: given on up to where a stop text, or the beginning of one, stands."""
        if self.met_stop:
            return
        before = max(0, self.given)
        self.text += piece
        found = [at for stop in self.ask.stop if (at := self.text.find(stop, before)) >= 0]
        if found:
            self.met_stop = True
            return self._give(min(found))
        kept = max((_overlap(self.text[before:], stop) for stop in self.ask.stop), default=0)
        return self._give(len(self.text) - kept)

    def _give(self, end: int) -> None:
        if end > self.given:
            self._put(self.text[self.given : end])
            self.given = end

    def _put(self, item: str | Done | Exception) -> None:
        self.loop.call_soon_threadsafe(self.items.put_nowait, item)


def _prompt(ask: Ask, reader: Any, limits: Limits) -> Any:
    """What :func:`generate` takes: messages with their images opened, or token ids (n,)."""
    if isinstance(ask.prompt, tuple):
        return torch.tensor(ask.prompt)
    if isinstance(ask.prompt, str):
        return text_ids(reader, ask.prompt)
    return opened(ask.prompt, limits)


def _logprobs(tokenizer: Any, prompt: Tensor, made: Generation, echo: bool) -> dict[str, Any]:
    """OpenAI's form: of the answer's tokens, and with ``echo`` of the prompt's before them, whose first has none."""
    known = made.scores if echo else made.scores[made.prompt_tokens - 1 :]
    first = [tokenizer.decode([int(prompt[0])])] if echo else []
    tokens = [*first, *(tokenizer.decode([score.token]) for score in known)]
    tops = []
    for score in known:
        named: dict[str, float] = {}
        for token, logprob in (*score.top, (score.token, score.logprob)):
            named.setdefault(tokenizer.decode([token]), logprob)  # of tokens with one text, the likeliest
        tops.append(named)
    absent = [None] * len(first)
    return {
        "tokens": tokens,
        "token_logprobs": [*absent, *(score.logprob for score in known)],
        "top_logprobs": [*absent, *tops],
        "text_offset": [0, *itertools.accumulate(len(token) for token in tokens)][: len(tokens)],
    }


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _late() -> RequestError:
    return RequestError(504, "the answer took longer than this server allows; ask for fewer tokens", kind="timeout")


def _stops() -> RequestError:
    return RequestError(503, "this server is shutting down", kind="server_error")
