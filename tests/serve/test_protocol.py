"""OpenAI's requests: what is taken, and what is refused with which sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mopeq.serve.protocol import Form, RequestError, parse

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TEXT = {"model": "m", "prompt": "hello"}


def body(base: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps(base | changes).encode()


def test_defaults_are_openais() -> None:
    ask = parse("completions", body(TEXT), "m")
    assert (ask.prompt, ask.max_tokens, ask.temperature, ask.top_p, ask.stop) == ("hello", 16, 1.0, 1.0, ())
    assert not ask.stream
    chat = parse("chat", body(CHAT, n=1, tools=None, logprobs=False, presence_penalty=0.0, user="u"), "m")
    assert chat.prompt == [{"role": "user", "content": "hello"}]
    assert chat.max_tokens is None


def test_parts_of_text_are_joined_and_roles_kept() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    ask = parse("chat", body(CHAT, messages=messages, max_completion_tokens=5, stop="x", seed=3), "m")
    assert ask.prompt == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}]
    assert (ask.max_tokens, ask.stop, ask.seed) == (5, ("x",), 3)


def image(role: str = "user", **part: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": [{"type": "text", "text": "a"}, {"type": "image_url"} | part]}]


def test_images_are_parts_with_their_addresses() -> None:
    ask = parse("chat", body(CHAT, messages=image(image_url={"url": "data:,", "detail": "low"})), "m")
    where = "messages[0].content[1]"
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": "data:,", "where": where}]
    assert ask.prompt == [{"role": "user", "content": parts}]


REFUSED: list[tuple[Form, dict[str, Any], int, str]] = [
    ("chat", {"messages": image(type="input_audio")}, 400, "expected text or image_url"),
    ("chat", {"messages": image(image_url="data:,")}, 400, "expected {"),
    ("chat", {"messages": image(image_url={"url": 3})}, 400, "expected {"),
    ("chat", {"messages": image(image_url={"url": "data:,", "detail": "most"})}, 400, "expected auto, low, high"),
    ("chat", {"messages": image("system", image_url={"url": "data:,"})}, 400, "expected images in role user"),
    ("chat", {"messages": []}, 400, "missing or empty"),
    ("chat", {"messages": [{"role": "king", "content": "x"}]}, 400, "expected an object with role"),
    ("chat", {"messages": [{"role": "user"}]}, 400, "expected a text"),
    ("chat", {"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, 400, "tool_calls"),
    ("chat", {"tools": [{"type": "function"}]}, 400, "tools is not supported"),
    ("chat", {"response_format": {"type": "json_object"}}, 400, "response_format is not supported"),
    ("chat", {"n": 2}, 400, "n is not supported"),
    ("completions", {"prompt": ["a", "b"]}, 400, "several prompts"),
    ("completions", {"prompt": [[1], [2]]}, 400, "several prompts"),
    ("completions", {"prompt": [1, True]}, 400, "list of token ids"),
    ("completions", {"prompt": [2**63]}, 400, "list of token ids"),
    ("completions", {"prompt": [[]]}, 400, "not empty"),
    ("completions", {"prompt": ""}, 400, "not empty"),
    ("completions", {"logprobs": 21}, 400, "0 to 20"),
    ("completions", {"logprobs": True}, 400, "whole number"),
    ("completions", {"logprobs": 1, "stream": True}, 400, "logprobs with stream"),
    ("completions", {"echo": 1}, 400, "true or false"),
    ("chat", {"logprobs": True}, 400, "logprobs is not supported"),
    ("chat", {"echo": True}, 400, "echo is not supported"),
    ("completions", {"beam": 4}, 400, "beam is not supported"),
    ("completions", {"max_tokens": 0}, 400, "at least 1"),
    ("completions", {"max_tokens": 2.5}, 400, "whole number"),
    ("completions", {"max_tokens": True}, 400, "whole number"),
    ("completions", {"temperature": 3}, 400, "from 0 to 2"),
    ("completions", {"temperature": "hot"}, 400, "from 0 to 2"),
    ("completions", {"temperature": float("nan")}, 400, "from 0 to 2"),
    ("completions", {"top_p": 0}, 400, "above 0"),
    ("completions", {"seed": 2**64}, 400, "64 bits"),
    ("completions", {"stop": ["a"] * 17}, 400, "up to 16"),
    ("completions", {"stop": [""]}, 400, "none empty"),
    ("completions", {"stream": "yes"}, 400, "true or false"),
    ("completions", {"stream_options": {"include_usage": True}}, 400, "with stream true"),
    ("completions", {"model": "other"}, 404, "no model other"),
    ("completions", {"model": None}, 400, "model is missing"),
]


@pytest.mark.parametrize(("form", "changes", "status", "says"), REFUSED)
def test_what_cannot_be_done_is_refused(form: Form, changes: dict[str, Any], status: int, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        parse(form, body(CHAT if form == "chat" else TEXT, **changes), "m")
    assert caught.value.status == status


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse("chat", raw, "m")
    assert caught.value.status == 400
