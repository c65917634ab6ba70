"""Speed and memory."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import nn

from mopeq.errors import InputError
from mopeq.evaluate import measure_speed, process_bytes, resident_bytes
from mopeq.evaluate.speed import Speed
from tiny import tiny_model as make


def test_speed_of_a_tiny_model() -> None:
    found = measure_speed(make("olmoe"), prompt_tokens=16, new_tokens=4, batch_size=2, repeats=2)
    assert found.prefill > found.decode > 0
    assert (found.device, found.dtype, found.repeats) == ("cpu", "float32", 2)
    assert Speed.from_json(asdict(found)) == found


def test_speed_decodes_with_a_cache() -> None:
    model = make("olmoe")
    lengths: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, ids, __: lengths.append(ids[0].shape[1]))
    measure_speed(model, prompt_tokens=8, new_tokens=3, repeats=1, warmup=0)
    assert lengths == [8, 1, 1, 1]


def test_speed_refuses_nothing_to_do() -> None:
    with pytest.raises(InputError, match="new_tokens is 0; expected at least 1"):
        measure_speed(make("olmoe"), new_tokens=0)


def test_resident_bytes_counts_shared_storage_once() -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(10, 10))
    model.b = model.a
    model.c = nn.Parameter(model.a[:5])
    model.register_buffer("d", torch.zeros(7, dtype=torch.uint8))
    model.register_buffer("e", torch.zeros(1000, device="meta"))
    assert resident_bytes(model) == 400 + 7


def test_process_bytes_is_that_of_a_process_with_torch() -> None:
    found = process_bytes()
    assert found is None or 5e7 < found < 1e12
