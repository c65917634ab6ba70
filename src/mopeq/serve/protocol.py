"""OpenAI's requests and answers: JSON to a checked :class:`Ask`, and back. Knows no server and no model.

Fields after https://platform.openai.com/docs/api-reference (completions, chat). A parameter that would change the
answer and is not supported is an error, never ignored.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mopeq.runtime.generate import Messages

__all__ = ["Ask", "Form", "RequestError", "body_of", "chunk_of", "error_of", "new_id", "parse", "usage_of"]

Form = Literal["completions", "chat"]

TAKEN = {"model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed", "stop", "user"}
OWN: dict[Form, set[str]] = {
    "completions": {"prompt", "echo", "logprobs"},
    "chat": {"messages", "max_completion_tokens"},
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "suffix": ("",),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none",),
    "response_format": ({"type": "text"},), "metadata": ({},), "store": (False,), "modalities": (["text"],),
}  # fmt: skip
"""Parameters that are taken only where they ask for nothing, besides null."""
ROLES = ("system", "developer", "user", "assistant")
MOST_STOPS = 16
MOST_LOGPROBS = 20
DETAILS = ("auto", "low", "high")


class RequestError(Exception):
    """A request that gets an error: HTTP status, and message, type, parameter and code in OpenAI's form."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = status, message, param, code, kind


@dataclass(frozen=True)
class Ask:
    """A checked request. ``max_tokens`` None goes to the end of the model's positions.

    A prompt is a text, token ids or messages, whose contents are texts or lists of parts: ``{"type": "text", "text":
    ...}`` and ``{"type": "image", "image": its address, "where": its place in the request}``. ``logprobs`` None asks
    for none, else for so many of the likeliest tokens beside each.
    """

    form: Form
    prompt: str | tuple[int, ...] | Messages
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    echo: bool = False
    logprobs: int | None = None


def parse(form: Form, body: bytes, model: str) -> Ask:
    """A request's body, checked; ``model`` is the served name. Raises :class:`RequestError` with status 400 or 404."""
    try:
        data = json.loads(body)
        json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON in UTF-8: {error}") from error
    if not isinstance(data, dict):
        raise RequestError(400, f"the body is a JSON {type(data).__name__}; expected an object")
    for name, value in data.items():
        if name not in TAKEN | OWN[form] and not (value is None or any(value == v for v in NEUTRAL.get(name, ()))):
            raise RequestError(400, f"{name} is not supported by this server; leave it out", param=name)
    given = {name: value for name, value in data.items() if value is not None}
    if given.get("model") != model:
        if not isinstance(given.get("model"), str):
            raise RequestError(400, f"model is missing; this server has {model}", param="model")
        raise RequestError(
            404, f"there is no model {given['model']}; this server has {model}", param="model", code="model_not_found"
        )
    stream = _take(given, "stream", bool, False)
    options = _take(given, "stream_options", dict, {})
    if options and (
        not stream or set(options) - {"include_usage"} or not isinstance(options.get("include_usage"), bool)
    ):
        raise RequestError(
            400, "stream_options takes include_usage true or false, with stream true", param="stream_options"
        )
    most = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    max_tokens = _take(given, most, int, 16 if form == "completions" else None)
    if max_tokens is not None and max_tokens < 1:
        raise RequestError(400, f"{most} is {max_tokens}; expected at least 1", param=most)
    logprobs = None if form == "chat" else _take(given, "logprobs", int, None)
    if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
        raise RequestError(400, f"logprobs is {logprobs}; expected 0 to {MOST_LOGPROBS}", param="logprobs")
    if logprobs is not None and stream:
        raise RequestError(400, "logprobs with stream is not supported by this server; leave one out", param="logprobs")
    return Ask(
        form=form,
        prompt=_prompt(given) if form == "completions" else _messages(given),
        max_tokens=max_tokens,
        temperature=_within(given, "temperature", 0.0, 2.0),
        top_p=_within(given, "top_p", 0.0, 1.0, open_below=True),
        seed=_seed(given),
        stop=_stops(given),
        stream=stream,
        include_usage=options.get("include_usage", False),
        echo=form == "completions" and _take(given, "echo", bool, False),
        logprobs=logprobs,
    )


def _take(given: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = given.get(name, default)
    if value is not default and type(value) is not kind:
        words = {bool: "true or false", int: "a whole number", dict: "an object"}
        raise RequestError(400, f"{name} is {_short(value)}; expected {words[kind]}", param=name)
    return value


def _within(given: Mapping[str, Any], name: str, low: float, high: float, *, open_below: bool = False) -> float:
    value = given.get(name, 1.0)
    if type(value) not in (int, float) or not low <= value <= high or (open_below and value == low):
        expected = f"a number {'above' if open_below else 'from'} {low:g} {'up ' if open_below else ''}to {high:g}"
        raise RequestError(400, f"{name} is {_short(value)}; expected {expected}", param=name)
    return float(value)


def _seed(given: Mapping[str, Any]) -> int | None:
    seed = _take(given, "seed", int, None)
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise RequestError(400, f"seed is {_short(seed)}; expected 64 bits", param="seed")
    return seed  # type: ignore[no-any-return]


def _stops(given: Mapping[str, Any]) -> tuple[str, ...]:
    value = given.get("stop", [])
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise RequestError(
            400, f"stop is {_short(value)}; expected a text or up to {MOST_STOPS}, none empty", param="stop"
        )
    return tuple(stops)


def _prompt(given: Mapping[str, Any]) -> str | tuple[int, ...]:
    prompt = given.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        (prompt,) = prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int and abs(token) < 2**63 for token in prompt):
        return tuple(prompt)
    if not isinstance(prompt, str) or not prompt:
        raise RequestError(
            400, f"prompt is {_short(prompt)}; expected one text, or one list of token ids, that is not empty; several "
            "prompts are not supported by this server", param="prompt",
        )  # fmt: skip
    return prompt


def _messages(given: Mapping[str, Any]) -> Messages:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "messages is missing or empty; expected a list of messages", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise RequestError(
            400, f"{where} is {_short(message)}; expected an object with role {', '.join(ROLES)}", param=where
        )
    extra = {name for name, value in message.items() if value is not None} - {"role", "content", "name"}
    if extra:
        raise RequestError(400, f"{where} has {sorted(extra)[0]}, which is not supported by this server", param=where)
    role = "system" if message["role"] == "developer" else message["role"]
    content = _content(message.get("content"), f"{where}.content")
    if role != "user" and not isinstance(content, str):
        raise RequestError(400, f"{where} has an image and role {role}; expected images in role user", param=where)
    return {"role": role, "content": content}


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    """Text; parts of text joined; or, where there are images, parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise RequestError(400, f"{where} is {_short(content)}; expected a text or a list of parts", param=where)
    parts = [_part(part, f"{where}[{i}]") for i, part in enumerate(content)]
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise RequestError(400, f"{where} is a part of type text without text", param=where)
        return {"type": "text", "text": part["text"]}
    if kind != "image_url":
        raise RequestError(
            400, f"{where} is a part of type {kind}; expected text or image_url; this server takes no others",
            param=where,
        )  # fmt: skip
    image = part.get("image_url")
    if not isinstance(image, dict) or not isinstance(image.get("url"), str):
        raise RequestError(
            400,
            f'{where} is {_short(part)}; expected {{"type": "image_url", "image_url": {{"url": ...}}}}',
            param=where,
        )
    if image.get("detail", "auto") not in DETAILS:
        raise RequestError(
            400, f"{where} has detail {_short(image['detail'])}; expected {', '.join(DETAILS)}", param=where
        )
    return {"type": "image", "image": image["url"], "where": where}


def _short(value: Any) -> str:
    if value is None:
        return "missing"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def error_of(error: RequestError) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


def new_id(form: Form) -> str:
    """Of an answer."""
    return f"{'chatcmpl' if form == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"


def usage_of(prompt: int, new: int) -> dict[str, int]:
    """Counts of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def body_of(
    ask: Ask, name: str, model: str, text: str, finish: str, usage: Mapping[str, int],
    logprobs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A whole answer."""
    kind = "chat.completion" if ask.form == "chat" else "text_completion"
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": logprobs}
    choice |= {"message": {"role": "assistant", "content": text}} if ask.form == "chat" else {"text": text}
    return {
        "id": name,
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": usage,
    }


def chunk_of(
    ask: Ask, name: str, created: int, model: str, text: str = "", finish: str | None = None, *, first: bool = False,
    usage: Mapping[str, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A piece of a streamed answer; with ``usage``, the last one, which has no choices."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
    if ask.form == "chat":
        choice["delta"] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
    else:
        choice["text"] = text
    kind = "chat.completion.chunk" if ask.form == "chat" else "text_completion"
    made = {"id": name, "object": kind, "created": created, "model": model, "choices": [choice]}
    if usage is not None:
        made |= {"choices": [], "usage": usage}
    return made
