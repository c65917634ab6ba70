"""Servers side by side: tokens a second, time to the first text, times of answers and memory at 1 to 16 clients.

    export MOPEQ_VLLM=.vllm/bin/python                    # made by `make test-vllm`
    python -m venv .llama && .llama/bin/pip install 'llama-cpp-python[server]==0.3.36'
    export MOPEQ_LLAMA_CPP=.llama/bin/python
    python benchmarks/serving.py

One model, an OLMoE-1B-7B of random weights cut to ``--layers`` layers: packed for ``mopeq serve`` with its own runtime
and with vLLM; in bfloat16 for vLLM; in Q4_0 for a server of llama.cpp. ``MOPEQ_VLLM`` is the Python of an environment
with vLLM and mopeq, ``MOPEQ_LLAMA_CPP`` of one with llama.cpp's server; where one is not set, its servers are left out,
which is said. vLLM runs eager. Random weights say nothing about answers. The servers run one after the other, each in a
process of its own, with the same requests: ``--requests`` for every client, streamed completions of ``--new`` tokens,
greedy, after 64 words that no other request has. A server's memory is that of all its processes, shared pages divided
among them, after the last request. ``busy`` is the processor time of the server over the time that passed: far below
its threads, others took the machine, and the times say little.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import ROOT, arguments, store, table

sys.path.insert(0, str(ROOT / "scripts"))

NAME, WORDS = "bench", 64
PYTHONS = ("MOPEQ_VLLM", "MOPEQ_LLAMA_CPP")
"""Variables that name the Pythons of other environments."""
PATIENCE = 600.0
START = "import sys; from mopeq.cli import main; sys.exit(main(sys.argv[1:]))"


def main() -> None:
    parser = arguments(__doc__ or "", "serving")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--bits", type=int, default=4, help="of the packed model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--scratch", type=Path, help="folder for the models (default: the system's)")
    asked = parser.parse_args()
    for name in PYTHONS:
        if name not in os.environ:
            print(f"{name} names no Python: its servers are left out")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server outlives this
    with tempfile.TemporaryDirectory(dir=asked.scratch) as temporary:
        scratch = Path(temporary)
        results: dict[str, Any] = {key: getattr(asked, key) for key in ("layers", "bits", "requests", "new", "threads")}
        results["servers"] = {}
        for name, (command, settings) in _servers(scratch, asked).items():
            results["servers"][name] = found = _measured(command, settings, asked)
            print(f"\n{name}: ready after {found['start']:.1f} s, {found['memory_bytes'] / 2**30:.2f} GiB")
            print(_rows(found), flush=True)
            store(asked.out, results)


def _rows(found: dict[str, Any]) -> str:
    cells = [
        [clients, *(f"{row[key]:.2f}" for key in ("tokens_per_second", "first_p50", "first_p99", "p50", "p99", "busy"))]
        for clients, row in found["clients"].items()
    ]
    head = ("clients", "tokens/s", "first text, s, p50", "p99", "answer, s, p50", "p99", "busy")
    return table(head, cells)


def _servers(scratch: Path, asked: Any) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Command, with ``{port}`` in it, and environment of each server; writes the models they need."""
    from random_checkpoint import CONFIGS, cut, write
    from random_packed import write_random

    config = cut(CONFIGS["olmoe-1b-7b"], asked.layers)
    packed, original, gguf = scratch / "packed", scratch / "original", scratch / "model.gguf"
    write_random(packed, (asked.bits,), asked.bits, config=config)
    _write_words(packed, config["vocab_size"])
    threads = {"OMP_NUM_THREADS": str(asked.threads), "HF_HUB_OFFLINE": "1"}
    ours = ["-c", START, "serve", "{model}", "--name", NAME, "--port", "{port}"]
    native = [sys.executable, *(word.format(model=packed, port="{port}") for word in ours), "--engine", "native"]
    made = {f"mopeq serve, {asked.bits} bits": (native, threads)}
    vllm, llama = map(os.environ.get, PYTHONS)
    if vllm:
        cores = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{asked.threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "1",
                 "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}  # fmt: skip
        flags = ["--engine", "vllm", "--vllm=--enforce-eager --max-model-len 1024 --max-num-seqs 16"]
        import torch

        write(original, config, torch.bfloat16)
        _write_words(original, config["vocab_size"])
        for name, model in ((f"vLLM, mopeq {asked.bits} bits", packed), ("vLLM, bfloat16", original)):
            words = [word.format(model=model, port="{port}") for word in ours]
            made[name] = [vllm, *words, *flags], threads | cores
    if llama:
        from llama_cpp import write_gguf  # benchmarks/llama_cpp.py

        write_gguf(gguf, config, _words(config["vocab_size"]), quantized=True)
        flags = ["--n_threads", str(asked.threads), "--n_ctx", "1024", "--interrupt_requests", "False"]
        made["llama.cpp, Q4_0"] = (
            [llama, "-m", "llama_cpp.server", "--model", str(gguf), "--port", "{port}", *flags],
            threads,
        )
    return made


def _words(vocabulary: int) -> dict[str, Any]:
    """The bundled tokenizer, with a word for every id of the model: random weights may choose any."""
    from mopeq.data.samples import bundled_model

    words: dict[str, Any] = json.loads((bundled_model() / "tokenizer.json").read_text(encoding="utf-8"))
    known = words["model"]["vocab"]
    known |= {f"word{i}": i for i in range(len(known), vocabulary)}
    return words


def _write_words(folder: Path, vocabulary: int) -> None:
    from mopeq.data.samples import bundled_model

    (folder / "tokenizer.json").write_text(json.dumps(_words(vocabulary)), encoding="utf-8")
    settings = json.loads((bundled_model() / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 4096}), encoding="utf-8")


def _measured(command: list[str], settings: dict[str, str], asked: Any) -> dict[str, Any]:
    from soak import _free_port

    port, began = _free_port(), time.monotonic()
    words = [word.replace("{port}", str(port)) for word in command]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(words, env={**os.environ, **settings}, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(server, port, log)
            start = time.monotonic() - began
            _request(port, random.Random("warm"), asked.new)
            rows = {str(clients): _load(server.pid, port, clients, asked) for clients in asked.clients}
            memory = sum(_memory(pid) for pid in _family(server.pid))
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
    return {"start": start, "memory_bytes": memory, "clients": rows}


def _load(pid: int, port: int, clients: int, asked: Any) -> dict[str, float]:
    """What ``clients`` at the same time see."""
    seen: list[tuple[float, float, int]] = []
    broken: list[BaseException] = []

    def run(number: int) -> None:
        try:
            draws = (random.Random(f"{clients} {number} {turn}") for turn in range(asked.requests))
            seen.extend(_request(port, draw, asked.new) for draw in draws)
        except Exception as error:
            broken.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    began, used = time.monotonic(), _processor_seconds(pid)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if broken:
        raise broken[0]
    passed = time.monotonic() - began
    firsts, wholes = sorted(first for first, _, _ in seen), sorted(whole for _, whole, _ in seen)
    return {
        "requests": len(seen),
        "tokens_per_second": sum(count for _, _, count in seen) / passed,
        "first_p50": statistics.median(firsts), "first_p99": firsts[int(0.99 * len(firsts))],
        "p50": statistics.median(wholes), "p99": wholes[int(0.99 * len(wholes))],
        "busy": (_processor_seconds(pid) - used) / passed,
    }  # fmt: skip


def _request(port: int, draw: random.Random, new: int) -> tuple[float, float, int]:
    """Seconds to the first text and to the end, and tokens, of one streamed completion."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    prompt = " ".join("".join(draw.choices(letters, k=3)) for _ in range(WORDS))
    body = {"model": NAME, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    began, first, finish = time.monotonic(), 0.0, None
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{response.status}: {response.read()[:500]!r}")
    for line in response:
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:])["choices"]:
                finish = choice.get("finish_reason") or finish
                if choice["text"] and not first:
                    first = time.monotonic() - began
    connection.close()
    if finish != "length":
        raise SystemExit(f"an answer ended with {finish}; expected all {new} tokens")
    return first, time.monotonic() - began, new


def _wait_for(server: subprocess.Popen[bytes], port: int, log: Any) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        if server.poll() is not None or time.monotonic() > until:
            log.seek(0)
            raise SystemExit(f"the server did not start:\n{log.read()[-3000:].decode(errors='replace')}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/v1/models")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.2)


def _family(pid: int) -> list[int]:
    """A process and those it started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid, *(one for task in tasks for child in task.read_text().split() for one in _family(int(child)))]


def _memory(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _processor_seconds(pid: int) -> float:
    """Of a process and those it started."""
    ticks = 0
    for one in _family(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
