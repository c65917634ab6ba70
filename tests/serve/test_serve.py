"""The native server over a real socket, asked by the real ``openai`` client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI

import packing
from mopeq.cli import main
from mopeq.load import load, load_tokenizer
from mopeq.runtime.decode import decode
from mopeq.runtime.generate import generate
from mopeq.serve import Limits, vllm_command
from serving import asking, raw, serving

PROMPT = "def f("
MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    out = tmp_path_factory.mktemp("packed") / "tiny"
    packing.pack_model(tiny_model("olmoe"), out)
    return out


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Any, Any]:
    return load(folder, torch.float32), load_tokenizer(folder)


@pytest.fixture(scope="module")
def port(pair: tuple[Any, Any]) -> Iterator[int]:
    with serving(pair, Limits(body_bytes=4096)) as number:
        yield number


@pytest.fixture(scope="module")
def client(port: int) -> Iterator[OpenAI]:
    with asking(port) as made:
        yield made


def metric(port: int, name: str) -> float:
    lines = raw(port, "GET", "/metrics")[1].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def test_completions_are_generates(client: OpenAI, pair: tuple[Any, Any]) -> None:
    expected = generate(*pair, PROMPT, max_new_tokens=12)
    made = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    assert made.choices[0].text == expected.text
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (6, len(expected.tokens))
    pieces = list(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, stream=True))
    assert "".join(p.choices[0].text for p in pieces) == expected.text
    assert pieces[-1].choices[0].finish_reason == made.choices[0].finish_reason == "length"
    sampled = [
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=1.5, seed=s).choices[0].text
        for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_chat_streams_the_same_and_counts_tokens(client: OpenAI, pair: tuple[Any, Any]) -> None:
    expected = generate(*pair, MESSAGES, max_new_tokens=10)
    made = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=10, temperature=0)
    assert made.choices[0].message.content == expected.text
    assert made.choices[0].message.role == "assistant"
    pieces = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_completion_tokens=10, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == expected.text
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.total_tokens == expected.prompt_tokens + len(expected.tokens)


def test_a_stop_text_ends_the_answer_before_it(client: OpenAI, pair: tuple[Any, Any]) -> None:
    whole = generate(*pair, PROMPT, max_new_tokens=40).text
    stop = whole[7:10]
    options: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stop": [stop, "never"]}
    made = client.completions.create(**options)
    assert made.choices[0].text == whole[: whole.find(stop)]
    assert made.choices[0].finish_reason == "stop"
    assert made.usage is not None
    assert made.usage.completion_tokens < 40
    assert "".join(p.choices[0].text for p in client.completions.create(**options, stream=True)) == made.choices[0].text


def test_logprobs_are_those_of_one_pass(client: OpenAI, pair: tuple[Any, Any]) -> None:
    """Of prompt and answer, as a text and as ids: lm-eval sends these."""
    ids = pair[1](PROMPT)["input_ids"]
    expected = generate(*pair, PROMPT, max_new_tokens=4)
    with torch.no_grad():
        whole = pair[0](input_ids=torch.tensor([[*ids, *expected.tokens]])).logits[0].float().log_softmax(-1)
    want = [float(whole[i, token]) for i, token in enumerate([*ids[1:], *expected.tokens])]
    options: Any = {"model": "tiny", "max_tokens": 4, "temperature": 0, "logprobs": 2}
    for prompt in (PROMPT, ids, [ids]):
        made = client.completions.create(prompt=prompt, echo=True, **options).choices[0]
        assert made.text == PROMPT + expected.text
        found: Any = made.logprobs
        assert found.token_logprobs[0] is found.top_logprobs[0] is None
        assert found.token_logprobs[1:] == pytest.approx(want, abs=1e-4)
        assert "".join(found.tokens[: len(ids)]) == PROMPT
        assert found.text_offset[len(ids)] == len(PROMPT)
        for i, top in enumerate(found.top_logprobs[1:]):
            assert max(top.values()) == pytest.approx(float(whole[i].max()), abs=1e-4)
            assert 1 <= len(top) <= 3  # bytes that are no character share a name
    answer: Any = client.completions.create(prompt=PROMPT, **options).choices[0].logprobs
    assert answer.token_logprobs == pytest.approx(want[-4:], abs=1e-4)
    assert (
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, echo=True)
        .choices[0]
        .text.startswith(PROMPT)
    )


def test_models_health_and_metrics(client: OpenAI, port: int) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert raw(port, "GET", "/health")[0] == 200
    before = metric(port, "mopeq_generated_tokens_total")
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, temperature=0)
    assert metric(port, "mopeq_generated_tokens_total") == before + 4
    assert metric(port, "mopeq_first_text_seconds_count") >= 1


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b'{"model": "tiny", "messages": "hi"}', 400),
        ("POST", "/v1/completions", b'{"model": "tiny", "prompt": "a", "max_tokens": 100000}', 400),
        ("POST", "/v1/completions", b'{"model": "tiny", "prompt": [1, 264]}', 400),
        ("POST", "/v1/completions", b'{"model": "other", "prompt": "a"}', 404),
        ("POST", "/v1/completions", b'"' + b"a" * 5000 + b'"', 413),
        ("GET", "/v1/completions", None, 405),
        ("POST", "/v1/embeddings", b"{}", 404),
    ],
)
def test_bad_requests_get_openais_error(port: int, method: str, path: str, body: bytes | None, status: int) -> None:
    got, answer = raw(port, method, path, body)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_errors_reach_the_client_as_its_exceptions(client: OpenAI) -> None:
    image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}]
    with pytest.raises(openai.BadRequestError, match="this model takes text alone"):
        client.chat.completions.create(model="tiny", messages=image)
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="at most 512"):
        client.completions.create(model="tiny", prompt="a", max_tokens=600, stream=True)


def test_messages_that_the_template_refuses(
    client: OpenAI, pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair[1], "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(openai.BadRequestError, match="template refuses the messages: roles must alternate"):
        client.chat.completions.create(model="tiny", messages=MESSAGES)


def test_a_key_is_asked_for_under_v1(pair: tuple[Any, Any]) -> None:
    with serving(pair, api_key="secret") as port:
        with asking(port, "secret") as right, asking(port, "guess") as wrong:
            assert right.models.list().data
            with pytest.raises(openai.AuthenticationError):
                wrong.models.list()
        assert raw(port, "GET", "/health")[0] == 200


@pytest.fixture
def slow(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A model that takes 50 ms a token, and never ends by itself."""

    def slowly(model: Any, prompt: Any, most: int, stops: Any, *more: Any, **named: Any) -> Iterator[int]:
        for token in decode(model, prompt, most, frozenset(), *more, **named):
            time.sleep(0.05)
            yield token

    monkeypatch.setattr(sys.modules["mopeq.runtime.generate"], "decode", slowly)
    return pair


def long(client: OpenAI, **more: Any) -> Any:
    return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=400, temperature=0, **more)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_generation(slow: tuple[Any, Any], stream: bool) -> None:
    with serving(slow) as port:
        if stream:
            with asking(port) as client:
                answer = long(client, stream=True)
                next(iter(answer))
                answer.close()
        else:
            with asking(port) as client, pytest.raises(openai.APITimeoutError):
                long(client, timeout=0.5)
        begun = time.monotonic()
        with asking(port) as client:
            client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1, temperature=0)
        assert time.monotonic() - begun < 5  # all 400 tokens would take 20 s
        assert metric(port, "mopeq_requests_present") == 0


def test_limits_of_time_and_of_waiting(slow: tuple[Any, Any]) -> None:
    with serving(slow, Limits(answer_seconds=1.5, waiting=0, body_seconds=0.5)) as port, asking(port) as client:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(long, client)
            while not metric(port, "mopeq_requests_present"):
                time.sleep(0.02)
            with pytest.raises(openai.RateLimitError):
                long(client)
            with pytest.raises(openai.APIStatusError) as late:
                first.result()
            assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(long(client, stream=True))
        with socket.create_connection(("127.0.0.1", port)) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
            half.settimeout(10)
            assert b"408" in half.recv(4096).split(b"\r\n")[0]


def test_a_stopping_server_ends_what_is_in_progress(slow: tuple[Any, Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        with serving(slow) as port:
            answer = pool.submit(lambda: long(asking(port)))
            while not metric(port, "mopeq_requests_present"):
                time.sleep(0.02)
        with pytest.raises(openai.APIError):
            answer.result()


def test_the_command_serves_and_stops_when_asked(folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = "import sys; from mopeq.cli import main; sys.exit(main(sys.argv[1:]))"
    command = ["serve", str(folder), "--engine", "native", "--port", str(port)]
    server = subprocess.Popen([sys.executable, "-c", start, *command], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        with asking(port) as client:
            for _ in range(300):
                assert server.poll() is None
                try:
                    assert client.models.list().data[0].id == "tiny"
                    break
                except openai.APIConnectionError:
                    time.sleep(0.2)
            assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3).usage
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()


def test_what_the_command_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, says in (
        (["--port", "0"], "port 0"),
        (["--max-seconds", "0"], "expected above 0"),
        (["--engine", "native", "--vllm=--max-model-len 9"], "is for vLLM"),
    ):
        assert main(["serve", str(folder), *flags]) == 2
        assert says in capsys.readouterr().err


def test_vllms_command_names_model_and_address() -> None:
    command = vllm_command("DIR", "127.0.0.1", 80, "tiny", "float32", ["--enforce-eager"])
    assert command[:4] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert command[-3:] == ["--dtype", "float32", "--enforce-eager"]
