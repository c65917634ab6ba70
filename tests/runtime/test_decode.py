"""Tokens of the lean loop against transformers' ``generate``."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import tiny
from mopeq.runtime.decode import Sampling, decode

PROMPT = torch.randint(0, 250, (1, 40), generator=torch.Generator().manual_seed(0))
WAYS = {
    "greedy": Sampling(),
    "temperature": Sampling(1.3),
    "nucleus": Sampling(0.8, top_p=0.9),
    "both": Sampling(1.5, top_p=0.8, top_k=20),
}


@cache
def model_of(family: str) -> Any:
    return tiny.tiny_model(family)


def by_transformers(model: Any, prompt: torch.Tensor, most: int, how: Sampling, stops: list[int]) -> list[int]:
    sampling = {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k} if how.temperature else {}
    settings = GenerationConfig(
        max_new_tokens=most, do_sample=how.temperature > 0, eos_token_id=stops, pad_token_id=tiny.PAD, **sampling
    )
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    return list(out[0, prompt.shape[1] :].tolist())


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_the_tokens_of_transformers(family: str, way: str) -> None:
    """Past the sliding window of 32 and the chunk of 64 tokens that some families have."""
    model = model_of(family)
    torch.manual_seed(1)
    want = by_transformers(model, PROMPT, 30, WAYS[way], [tiny.EOS])
    torch.manual_seed(1)
    assert list(decode(model, PROMPT, 30, frozenset([tiny.EOS]), WAYS[way])) == want


@torch.no_grad()
def test_stops() -> None:
    model = model_of("olmoe")
    free = list(decode(model, PROMPT, 12, frozenset(), Sampling()))
    stops = [free[4], tiny.EOS]
    ended = list(decode(model, PROMPT, 12, frozenset(stops), Sampling()))
    assert ended == free[: free.index(free[4]) + 1] == by_transformers(model, PROMPT, 12, Sampling(), stops)
    assert list(decode(model, PROMPT[:, :1], 1, frozenset(), Sampling())) == by_transformers(
        model, PROMPT[:, :1], 1, Sampling(), [tiny.EOS]
    )


@torch.no_grad()
def test_the_cache_is_written_in_place() -> None:
    model = model_of("olmoe")
    seen: list[int] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        seen.append(k.data_ptr())
        return real(q, k, v, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        list(decode(model, PROMPT, 6, frozenset(), Sampling()))
    assert len(seen) == 12
    assert len(set(seen)) == 2  # one place for each layer
