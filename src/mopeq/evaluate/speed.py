"""How fast a model runs and how much memory it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mopeq.errors import InputError
from mopeq.progress import Track, silent

__all__ = ["Speed", "measure_speed", "process_bytes", "resident_bytes"]


@dataclass(frozen=True)
class Speed:
    """Medians over repeated runs. Prefill reads a prompt, decode adds one token at a time to a cache of it.

    prefill, decode: tokens per second of the whole batch; threads: CPU threads of torch; device: where it ran.
    """

    prefill: float
    decode: float
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int
    device: str
    dtype: str
    threads: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Speed:
        """Inverse of ``dataclasses.asdict``."""
        return cls(**{field.name: data[field.name] for field in fields(cls)})


def measure_speed(
    model: nn.Module,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
    track: Track = silent,
) -> Speed:
    """Tokens per second on a random prompt, which reaches more experts than text does.

    Args:
        model: a transformers causal language model.
        prompt_tokens: length of the prompt.
        new_tokens: tokens decoded greedily after it.
        batch_size: prompts that are run together.
        repeats: timed runs, of which the median is taken.
        warmup: runs before them that are not counted.
        seed: of the prompt.
        track: progress.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("repeats", repeats)):
        if value < 1:
            raise InputError(f"{name} is {value}; expected at least 1")
    first = next(model.parameters())
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator).to(first.device)
    wait = _waiter(first.device)
    prefill, decode = [], []
    with torch.inference_mode():
        for run in track(range(warmup + repeats), "speed", warmup + repeats):
            wait()
            started = time.perf_counter()
            out = model(input_ids=prompt, use_cache=True)
            wait()
            read = time.perf_counter()
            for _ in range(new_tokens):
                token = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            wait()
            done = time.perf_counter()
            if run >= warmup:
                prefill.append(batch_size * prompt_tokens / (read - started))
                decode.append(batch_size * new_tokens / (done - read))
    return Speed(
        prefill=statistics.median(prefill),
        decode=statistics.median(decode),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        repeats=repeats,
        device=str(first.device),
        dtype=str(first.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def _waiter(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done its work."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def resident_bytes(model: nn.Module) -> int:
    """Bytes that a model's parameters and buffers hold; tensors that share storage count once."""
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        if tensor.device.type != "meta":
            storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def process_bytes() -> int | None:
    """Resident memory of this process, interpreter and libraries included; None where the system has no ``/proc``."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), None)
