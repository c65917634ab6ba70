"""Whether the native server stays right and small under good, bad, slow and aborted requests for a long time.

The bundled vision-language model, packed at 3 bits, is served by ``mopeq serve`` in a process of its own. First the
same model, in this process, answers every good request by itself. Then clients send requests at random, and each must
get what it should: a good one, streamed or not, with images or without, sampled with a seed or not, exactly the text
(and, where asked for, the probabilities) known beforehand; a bad one its status. Slow ones send or read in small
pieces, or never end; aborted ones leave in the middle. A request with no answer in time is a hang. Every ten seconds
the server's memory, threads and open files are noted. At the end it must be idle, answer everything right once more,
and stop when asked.

    python benchmarks/soak.py --minutes 30

The exit code is 1 where an answer was wrong, a request hung, or memory, threads or files grew.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import arguments, store
from mopeq.data.conversations import read_questions
from mopeq.data.samples import bundled_images, bundled_vlm

NAME = "soak"
PATIENCE = 60.0
"""Seconds after which a request without an answer is a hang."""
START = "import sys; from mopeq.cli import main; sys.exit(main(sys.argv[1:]))"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GROWTH = 0.05
"""Most that memory may grow from the second tenth of the time to the last."""


@dataclass(frozen=True)
class Good:
    """A request and what it must get: the text, and the logarithms of probabilities if asked for."""

    path: str
    body: dict[str, Any]
    text: str
    logprobs: tuple[float, ...] = ()


def main() -> int:
    parser = arguments(__doc__ or "", "soak")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long")
    parser.add_argument("--clients", type=int, default=6, help="that send at the same time")
    parser.add_argument("--seed", type=int, default=0, help="of what they send")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    with tempfile.TemporaryDirectory() as temporary:
        packed = Path(temporary) / NAME
        subprocess.run(
            [sys.executable, "-c", START, "quantize", str(bundled_vlm()), "-o", str(packed), "--budget", "3bpw",
             "--data", str(bundled_images("calibration.jsonl")), "--samples", "32"], check=True,
        )  # fmt: skip
        good = _good_requests(packed, asked.threads)
        port = _free_port()
        server = subprocess.Popen(
            [sys.executable, "-c", START, "serve", str(packed), "--engine", "native", "--port", str(port)]
        )
        try:
            results = _soak(server, port, good, asked.minutes * 60, asked.clients, asked.seed)
            server.send_signal(signal.SIGTERM)
            results["exit_code"] = server.wait(60)
        finally:
            server.kill()
            server.wait()
    results |= {"minutes": asked.minutes, "clients": asked.clients, "verdict": _verdict(results)}
    store(asked.out, results)
    print(json.dumps(results, indent=1))
    return 0 if not results["verdict"] else 1


def _good_requests(packed: Path, threads: int) -> list[Good]:
    """Every kind of good request with the answer of the model in this process."""
    import torch

    from mopeq.load import load, load_processor
    from mopeq.runtime.generate import generate, text_ids

    torch.set_num_threads(threads)
    model, processor = load(packed), load_processor(packed)
    made = []
    for i, question in enumerate(read_questions(bundled_images("heldout.tsv"))[:24]):
        temperature = (0.0, 0.9)[i % 2]
        options = {"temperature": temperature, "seed": i, "max_tokens": 4 + i}
        same = {"temperature": temperature, "seed": i, "max_new_tokens": 4 + i}
        address = f"data:image/png;base64,{question.images[0]}"
        image = {"type": "image_url", "image_url": {"url": address}}
        text = {"type": "text", "text": question.text}
        images = [image] * (i % 3)
        said = [{"type": "image", "image": address}] * (i % 3)
        answer = generate(model, processor, [{"role": "user", "content": [*said, text]}], **same)
        body = {"messages": [{"role": "user", "content": [*images, text]}], **options}
        made.append(Good(CHAT, body, answer.text))
        ids = text_ids(processor, question.text)
        known = generate(model, processor, ids, **same, likeliest=1)
        body = {"prompt": question.text, **options}
        made.append(Good(COMPLETIONS, body, known.text))
        logprobs = tuple(score.logprob for score in known.scores)
        body = {**body, "prompt": ids.tolist(), "echo": True, "logprobs": 1}
        made.append(Good(COMPLETIONS, body, processor.tokenizer.decode(ids) + known.text, logprobs))
    return made


def _bad_requests() -> list[tuple[str, bytes, int]]:
    """Path, body and the status that it must get."""

    def chat(url: str) -> bytes:
        content = [{"type": "image_url", "image_url": {"url": url}}]
        return json.dumps({"model": NAME, "messages": [{"role": "user", "content": content}]}).encode()

    def text(**changes: Any) -> bytes:
        return json.dumps({"model": NAME, "prompt": "a", **changes}).encode()

    broken = base64.b64encode(
        base64.b64decode(read_questions(bundled_images("heldout.tsv"))[0].images[0])[:90]
    ).decode()
    return [
        (COMPLETIONS, b"{", 400),
        (COMPLETIONS, b"[" * 100_000, 400),
        (COMPLETIONS, b"\xff\xfe", 400),
        (COMPLETIONS, text(max_tokens=10**9), 400),
        (COMPLETIONS, text(prompt="a" * 200_000), 400),
        (COMPLETIONS, text(prompt=[10**9]), 400),
        (COMPLETIONS, text(prompt="<image>"), 400),
        (COMPLETIONS, text(n=3), 400),
        (COMPLETIONS, text(temperature="hot"), 400),
        (COMPLETIONS, text(model="other"), 404),
        (COMPLETIONS, b" " * (21 << 20), 413),
        (CHAT, chat("data:image/png;base64,####"), 400),
        (CHAT, chat(f"data:image/png;base64,{broken}"), 400),
        (CHAT, chat("/etc/passwd"), 400),
        (CHAT, chat("http://127.0.0.1/a.png"), 400),
        ("/v1/embeddings", b"{}", 404),
    ]


class _Clients:
    """What clients do, and what they have seen."""

    def __init__(self, port: int, good: list[Good]) -> None:
        self.port, self.good, self.bad = port, good, _bad_requests()
        self.seen, self.lock = Counter[str](), threading.Lock()
        self.wrong: list[str] = []

    def run(self, until: float, draw: random.Random) -> None:
        """One client until that time."""
        kinds: list[tuple[Callable[[random.Random], None], int]] = [
            (self.ask, 10), (self.stream, 8), (self.send_bad, 8), (self.leave, 5), (self.send_slowly, 2),
            (self.read_slowly, 2), (self.never_end, 1),
        ]  # fmt: skip
        while time.monotonic() < until:
            (kind,) = draw.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
            self.do(kind.__name__, lambda kind=kind: kind(draw))  # type: ignore[misc]

    def do(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
            self.count(name)
        except TimeoutError:
            self.count("hangs")
            self.note(f"{name}: no answer in {PATIENCE:g} s")
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            self.note(f"{name}: {type(error).__name__}: {error}")

    def count(self, name: str) -> None:
        with self.lock:
            self.seen[name] += 1

    def note(self, text: str) -> None:
        with self.lock:
            self.wrong.append(text[:300])

    def open(self, path: str, body: bytes, **headers: str) -> tuple[http.client.HTTPConnection, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("POST", path, body, {"content-type": "application/json", **headers})
        return connection, connection.getresponse()

    def judge(self, good: Good, text: str, logprobs: list[float | None] = []) -> None:  # noqa: B006
        if text != good.text:
            self.note(f"{good.path}: {text!r} instead of {good.text!r}")
        far = [abs(a - b) for a, b in zip(logprobs[1:], good.logprobs, strict=True)] if good.logprobs else []
        if max(far, default=0.0) > 1e-3:
            self.note(f"{good.path}: probabilities differ by {max(far)}")

    def ask(self, draw: random.Random, good: Good | None = None) -> None:
        good = good or draw.choice(self.good)
        connection, response = self.open(good.path, json.dumps({"model": NAME, **good.body}).encode())
        answer = json.loads(response.read())
        connection.close()
        if response.status != 200:
            return self.note(f"{good.path}: {response.status} {answer}")
        choice = answer["choices"][0]
        text = choice["text"] if good.path == COMPLETIONS else choice["message"]["content"]
        return self.judge(good, text, (choice["logprobs"] or {}).get("token_logprobs", []))

    def stream(self, draw: random.Random, pause: float = 0.0) -> None:
        good = draw.choice([one for one in self.good if not one.logprobs])
        connection, response = self.open(good.path, json.dumps({"model": NAME, **good.body, "stream": True}).encode())
        text, ended = "", False
        for line in response:
            time.sleep(pause)
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                text += choice["text"] if good.path == COMPLETIONS else choice["delta"].get("content", "")
            ended |= line.startswith(b"data: [DONE]")
        connection.close()
        self.judge(good, text if ended else f"no end after {text!r}")

    def read_slowly(self, draw: random.Random) -> None:
        self.stream(draw, pause=0.1)

    def send_bad(self, draw: random.Random) -> None:
        path, body, status = draw.choice(self.bad)
        try:
            connection, response = self.open(path, body)
        except (BrokenPipeError, ConnectionResetError):
            if status == 413:  # refused while it was sent
                return
            raise
        answer = json.loads(response.read())
        connection.close()
        if response.status != status or "message" not in answer["error"]:
            self.note(f"{path} {body[:80]!r}: {response.status} instead of {status}")

    def leave(self, draw: random.Random) -> None:
        """Close before the answer, in the middle of a stream, or in the middle of the request."""
        good = draw.choice([one for one in self.good if not one.logprobs])
        long = {"model": NAME, **good.body, "max_tokens": 400, "stream": draw.random() < 0.7}
        body = json.dumps(long).encode()
        head = f"POST {good.path} HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as link:
            if draw.random() < 0.3:
                link.sendall(head + body[: draw.randrange(len(body))])
                return
            link.sendall(head + body)
            for _ in range(draw.randrange(4)):
                link.recv(300)

    def send_slowly(self, draw: random.Random) -> None:
        good = draw.choice([one for one in self.good if one.path == COMPLETIONS and not one.logprobs])
        body = json.dumps({"model": NAME, **good.body}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.putrequest("POST", good.path)
        connection.putheader("content-length", str(len(body)))
        connection.endheaders()
        for begin in range(0, len(body), 16):
            connection.send(body[begin : begin + 16])
            time.sleep(0.1)
        answer = json.loads(connection.getresponse().read())
        connection.close()
        self.judge(good, answer["choices"][0]["text"])

    def never_end(self, draw: random.Random) -> None:
        """A body that stops in the middle gets 408."""
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as link:
            link.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
            line = link.recv(4096).split(b"\r\n")[0]
        if b"408" not in line:
            self.note(f"a body without its end: {line!r} instead of 408")


def _soak(
    server: subprocess.Popen[bytes], port: int, good: list[Good], seconds: float, clients: int, seed: int
) -> dict[str, Any]:
    _wait_for(server, port)
    work = _Clients(port, good)
    began = time.monotonic()
    until = began + seconds
    threads = [
        threading.Thread(target=work.run, args=(until, random.Random(seed * 1000 + i)), daemon=True)
        for i in range(clients)
    ]
    for thread in threads:
        thread.start()
    samples = []
    while any(thread.is_alive() for thread in threads):
        samples.append({"seconds": round(time.monotonic() - began, 1), **_state(server.pid)})
        if time.monotonic() > until + 3 * PATIENCE:
            work.note("clients did not come to an end")
            break
        time.sleep(10 if seconds > 120 else 1)
    time.sleep(2)
    present = _present(port)
    for one in good:  # after all that, everything once more
        work.do("once more", lambda one=one: work.ask(random.Random(0), one))  # type: ignore[misc]
    return {
        "requests": dict(work.seen), "wrong": work.wrong[:50], "wrong_count": len(work.wrong), "present": present,
        "before": samples[0], "after": _state(server.pid), "samples": samples,
    }  # fmt: skip


def _verdict(results: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    samples = results["samples"]
    tenth = max(1, len(samples) // 10)
    early, late = samples[tenth : 2 * tenth] or samples[:1], samples[-tenth:]
    found = []
    for name, room in (("resident_bytes", 0.0), ("threads", 2), ("files", 8)):
        before, after = (sum(s[name] for s in part) / len(part) for part in (early, late))
        if after > before * (1 + GROWTH) + room:
            found.append(f"{name} grew from {before:.0f} to {after:.0f}")
    if results["wrong_count"]:
        found.append(f"{results['wrong_count']} answers were wrong")
    if results["present"]:
        found.append(f"{results['present']:g} requests are still present")
    if results["exit_code"]:
        found.append(f"exit code {results['exit_code']}")
    return found


def _state(pid: int) -> dict[str, int]:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {
        "resident_bytes": int(status["VmRSS"].split()[0]) * 1024,
        "threads": int(status["Threads"]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
    }


def _present(port: int) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return next(float(line.split()[1]) for line in lines if line.startswith("mopeq_requests_present "))


def _wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    while True:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
