"""Images over the native server, asked by the real ``openai`` client."""

from __future__ import annotations

import base64
import http.server
import io
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from PIL import Image
from transformers import AriaProcessor, AutoTokenizer
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

import packing
import tiny
from mopeq.load import load, load_processor
from mopeq.runtime.generate import generate
from mopeq.serve import Limits
from reference import DEEPSEEK, MOLMOE, PROCESSORS, cases, folder_of, loaded
from serving import asking, raw, serving

WIDE = PROCESSORS / "images" / "img_a_wide.png"
TALL = PROCESSORS / "images" / "img_b_tall.png"


def data(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def asked(text: str, *urls: str) -> Any:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def answer(client: OpenAI, messages: Any, **more: Any) -> str:
    made = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0, **more)
    return made.choices[0].message.content or ""


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return loaded(DEEPSEEK[0]), load_processor(folder_of(DEEPSEEK[0], tmp_path_factory.mktemp("vlm")))


@pytest.fixture(scope="module")
def client(deepseek: tuple[Any, Any]) -> Iterator[OpenAI]:
    with serving(deepseek, Limits(images=4, pixels=200_000)) as port, asking(port) as made:
        yield made


def test_answers_are_the_published_codes(client: OpenAI, deepseek: tuple[Any, Any]) -> None:
    """The fixture's tokens, whole and streamed; and a text between images gets what it gets by itself."""
    expected = deepseek[1].decode(cases(DEEPSEEK[0])["one_wide"].greedy[0][:8], skip_special_tokens=True)
    said = asked("Describe this image.", data(WIDE.read_bytes()))
    assert answer(client, said) == expected
    pieces = client.chat.completions.create(model="tiny", messages=said, max_tokens=8, temperature=0, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == expected
    text = [{"role": "user", "content": "Describe this image."}]
    assert answer(client, text) == generate(*deepseek, text, max_new_tokens=8).text != expected
    assert answer(client, asked("Describe this image.", data(TALL.read_bytes()))) != expected


def test_images_in_several_turns(client: OpenAI, deepseek: tuple[Any, Any]) -> None:
    first, second = data(WIDE.read_bytes()), data(TALL.read_bytes())
    talk = [*asked("This?", first), {"role": "assistant", "content": "A"}, *asked("And these?", second, first)]
    parts = [[{"type": "image", "path": path} for path in paths] for paths in ((WIDE,), (TALL, WIDE))]
    same = [
        {"role": "user", "content": [*parts[0], {"type": "text", "text": "This?"}]},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": [*parts[1], {"type": "text", "text": "And these?"}]},
    ]
    assert answer(client, talk) == generate(*deepseek, same, max_new_tokens=8).text


def test_molmoe_with_an_image(tmp_path: Path) -> None:
    processor = load_processor(folder_of(MOLMOE, tmp_path))
    pair = loaded(MOLMOE), processor
    same = [{"role": "user", "content": [{"type": "image", "path": TALL}, {"type": "text", "text": "What?"}]}]
    with serving(pair) as port, asking(port) as client:
        got = answer(client, asked("What?", data(TALL.read_bytes())))
        assert got == generate(*pair, same, max_new_tokens=8).text
        with pytest.raises(openai.BadRequestError, match="MolmoE takes one"):
            answer(client, asked("What?", data(TALL.read_bytes()), data(WIDE.read_bytes())))


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endif %}\n"
    "{% endfor %}assistant: "
)


def test_a_model_of_transformers_own_with_its_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aria, packed, against transformers' generate on what its processor makes."""
    tower = {**tiny.FAMILIES["aria"]["vision_config"], "image_size": 980, "patch_size": 245}
    monkeypatch.setitem(tiny.FAMILIES["aria"], "vision_config", tower)
    packing.pack_model(tiny.save_tiny("aria", tmp_path / "original"), tmp_path / "packed")
    model = load(tmp_path / "packed", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "packed", extra_special_tokens={"image_token": "<image>"})
    processor = AriaProcessor(AriaImageProcessorPil(), tokenizer, TEMPLATE, size_conversion={980: 4})
    same = [{"role": "user", "content": [{"type": "image", "image": Image.open(WIDE)}, {"type": "text", "text": "a"}]}]
    inputs = processor.apply_chat_template(same, tokenize=True, return_dict=True, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    with serving((model, processor)) as port, asking(port) as client:
        assert answer(client, asked("a", data(WIDE.read_bytes()))) == tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer(client, [{"role": "user", "content": "a"}])
        for words in ("<image>", "<image> <image> b"):  # what the model reads as an image is none of the client's
            with pytest.raises(openai.BadRequestError, match=r"image token|processor cannot use"):
                answer(client, [{"role": "user", "content": words}])
            with pytest.raises(openai.BadRequestError, match=r"image token|processor cannot use"):
                client.completions.create(model="tiny", prompt=words)
        with pytest.raises(openai.BadRequestError, match="processor cannot use"):
            answer(client, asked("<image><image>", data(WIDE.read_bytes())))


def noisy(width: int, height: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.frombytes(mode, (width, height), random.Random(0).randbytes(width * height * len(mode))).save(file, kind)
    return file.getvalue()


BAD = [
    ("data:image/png;base64,", "no image"),
    ("data:image/png;base64,####", "no base64"),
    ("data:image/png;base64,é", "no base64"),
    ("data:image/png,abc", "expected data:image/png;base64"),
    ("data:text/plain;base64,aGVsbG8=", "no image that Pillow can read"),
    (data(WIDE.read_bytes()[:200]), "damaged or truncated"),
    (data(noisy(600, 400)), "expected at most 200000 in all"),
    (data(noisy(2000, 1)), "sides at most"),
    ("", "expected data:image"),
    ("/etc/hostname", "expected data:image"),
    ("file:///etc/hostname", "expected data:image"),
    ("ftp://example.org/a.png", "expected data:image"),
    ("http://[1/a.png", "has the address"),
    ("https://user:word@example.org/a.png", "expected data:image"),
    ("https://example.org/a.png", "is on example.org; this server takes none from there"),
    ("http://127.0.0.1/a.png", "is on 127.0.0.1"),
]


@pytest.mark.parametrize(("url", "says"), BAD, ids=range(len(BAD)))
def test_bad_images_are_the_clients_fault(client: OpenAI, url: str, says: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=says) as caught:
            client.chat.completions.create(model="tiny", messages=asked("a", url), max_tokens=1, stream=stream)
        assert "messages[0].content[0]" in str(caught.value)


def test_limits_of_all_images_together(client: OpenAI) -> None:
    part = data(noisy(300, 400, "JPEG"))
    assert isinstance(answer(client, asked("a", part)), str)
    with pytest.raises(openai.BadRequestError, match="expected at most 80000 in all"):
        answer(client, asked("a", part, part))
    with pytest.raises(openai.BadRequestError, match="at most 4 in a request"):
        answer(client, asked("a", *["data:,"] * 5))


def test_a_body_with_images_may_be_larger(deepseek: tuple[Any, Any]) -> None:
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "%s"}], "max_tokens": 1}' % (b"a " * (1 << 20))
    with serving(deepseek) as port:
        status, said = raw(port, "POST", "/v1/chat/completions", body)
    assert (status, "at most 4096" in said["error"]["message"]) == (400, True)
    assert Limits().most_bytes(images=True) > len(body) > Limits().most_bytes(images=False)


def test_texts_for_a_model_with_images(client: OpenAI, deepseek: tuple[Any, Any]) -> None:
    """A completion's text is no conversation."""
    model, processor = deepseek
    ids = processor(text="hello")["input_ids"][0]
    made = client.completions.create(model="tiny", prompt="hello", max_tokens=4, temperature=0)
    assert made.choices[0].text == generate(model, processor, ids, max_new_tokens=4).text
    for prompt in ("<image>", [processor.image_token_id]):
        with pytest.raises(openai.BadRequestError, match="image"):
            client.completions.create(model="tiny", prompt=prompt)


@pytest.fixture
def web() -> Iterator[int]:
    """A web server: an image, an address that leads elsewhere, one that is no image, and none."""

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            pages = {"/a.png": (200, WIDE.read_bytes()), "/to": (302, b""), "/no": (200, b"hello")}
            status, body = pages.get(self.path, (404, b""))
            self.send_response(status)
            self.send_header("location", "http://localhost/a.png")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_images_from_machines_that_are_allowed(deepseek: tuple[Any, Any], web: int) -> None:
    limits = Limits(image_hosts=frozenset({"127.0.0.1"}))
    with serving(deepseek, limits) as port, asking(port) as client:
        base = f"http://127.0.0.1:{web}"
        got = answer(client, asked("Describe this image.", f"{base}/a.png"))
        assert got == answer(client, asked("Describe this image.", data(WIDE.read_bytes())))
        for page, says in (("gone", "404"), ("to", "302"), ("no", "no image that Pillow can read")):
            with pytest.raises(openai.BadRequestError, match=says):
                answer(client, asked("a", f"{base}/{page}"))
        with pytest.raises(openai.BadRequestError, match="is on localhost"):
            answer(client, asked("a", f"http://localhost:{web}/a.png"))
