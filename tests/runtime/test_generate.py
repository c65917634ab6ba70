"""Text from prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import packing
from mopeq.errors import InputError
from mopeq.load import load, load_tokenizer
from mopeq.runtime.generate import generate, render


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> tuple[Any, Any]:
    out = tmp_path_factory.mktemp("packed") / "model"
    packing.pack_model(tiny_model("olmoe"), out)
    return load(out), load_tokenizer(out)


def test_greedy_is_argmax_step_by_step(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    made = generate(model, tokenizer, "def f(", max_new_tokens=8)
    ids = tokenizer("def f(", return_tensors="pt")["input_ids"]
    assert made.prompt_tokens == ids.shape[1] == 6
    expected = []
    with torch.no_grad():
        for _ in range(8):
            following = model(ids).logits[0, -1].argmax()
            expected.append(int(following))
            if expected[-1] == model.generation_config.eos_token_id:
                break
            ids = torch.cat([ids, following.view(1, 1)], -1)
    assert list(made.tokens) == expected
    assert made.text == tokenizer.decode(made.tokens, skip_special_tokens=True)
    assert made.seconds > 0
    assert made.tokens_per_second == len(made.tokens) / made.seconds


def test_sampling_repeats_with_its_seed_and_leaves_ours_alone(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second, third = (
        generate(model, tokenizer, "a", max_new_tokens=16, temperature=1.5, top_p=0.95, seed=seed) for seed in (1, 1, 2)
    )
    assert first.tokens == second.tokens != third.tokens
    assert torch.equal(torch.get_rng_state(), state)


def test_it_ends_where_it_is_told_and_at_the_last_position(pair: tuple[Any, Any]) -> None:
    whole = generate(*pair, "abc", max_new_tokens=12)
    asked = iter([False, False, True])
    assert generate(*pair, "abc", max_new_tokens=12, stopped=lambda: next(asked)).tokens == whole.tokens[:3]
    made = generate(*pair, "a" * 500, max_new_tokens=None)
    assert len(made.tokens) <= 12
    assert made.prompt_tokens == 500


def test_stream_gives_the_text_in_pieces(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    pieces: list[str] = []
    made = generate(model, tokenizer, "abc", max_new_tokens=12, stream=pieces.append)
    assert "".join(pieces) == made.text
    assert len(pieces) > 1


def test_conversations(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    talk = [{"role": "user", "content": "hi"}]
    assert render(tokenizer, talk) == "user: hi\nassistant: "
    assert generate(model, tokenizer, talk, max_new_tokens=4).tokens == generate(
        model, tokenizer, "user: hi\nassistant: ", max_new_tokens=4).tokens  # fmt: skip
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        assert render(tokenizer, [*talk, {"role": "assistant", "content": "yes"}]) == "hi\nyes\n"
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"temperature": float("nan")},
        {"top_k": -1},
    ],
)
def test_numbers_out_of_range(pair: tuple[Any, Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected at least 1, at least 0, above 0 up to 1, and at least 0"):
        generate(*pair, "a", **wrong)


def test_empty_prompt(pair: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        generate(*pair, "")
