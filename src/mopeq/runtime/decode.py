"""Token after token of one sequence: the prompt by the model's own forward pass, then step by step.

The tokens are those of transformers' ``generate`` with the same settings and random state. What is left out is what one
sequence does not need: beams, padding, the copying of the whole cache for every token. A step is native where
``step.py`` knows the family, else the model's own pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopeq.runtime.step import step_of

__all__ = ["Sampling", "decode"]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest one at temperature 0, else at random.

    ``top_k`` likeliest tokens only (0: all), and of these the smallest set with the probability ``top_p``.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


def decode(
    model: Any,
    prompt: Tensor,
    most: int,
    stops: frozenset[int],
    sampling: Sampling,
    images: Mapping[str, Tensor] | None = None,
    heard: Callable[[Tensor], None] | None = None,
) -> Iterator[int]:
    """At most ``most`` tokens after ``prompt`` (1, tokens), the last one of ``stops`` where one of them comes.

    ``images`` are tensors that the model takes with the prompt, by name. ``heard`` gets the logits (positions,
    vocabulary) of the whole prompt before the first token, and those of one position before each further token.
    Random numbers are torch's own: seed them before the first token is asked for. Run it without gradients.
    """
    choose, count = _chooser(sampling), prompt.shape[1]
    cache = _cache(model, count + most)
    _forget(model)
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    kept = 1 if heard is None else 0  # 0: all
    logits = model(input_ids=prompt, **options | {"logits_to_keep": kept}, **(images or {})).logits
    if heard is not None:
        heard(logits[0])
    logits = logits[:, -1].clone()  # the others of the prompt may go
    step = step_of(model, cache)
    for number in range(most):
        token = choose(prompt, logits.float())
        yield (value := int(token))
        if value in stops or number + 1 == most:
            return
        if step is not None:
            logits = step(token.view(1, 1), count + number)
        else:
            logits = model(input_ids=token.view(1, 1), **options).logits[:, -1]
        if heard is not None:
            heard(logits)


def _forget(model: Any) -> None:
    """Make a model forget the positions of the images of its last prompt, which GLM-4V and Qwen3-VL keep."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


def _chooser(sampling: Sampling) -> Any:
    """(tokens so far, logits (1, vocabulary)) to a token (1,), by the steps of transformers, in its order."""
    if sampling.temperature == 0:
        return lambda seen, logits: logits.argmax(-1)
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    steps: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))

    def choose(seen: Tensor, logits: Tensor) -> Tensor:
        for step in steps:
            logits = step(seen, logits)
        return torch.multinomial(torch.softmax(logits, -1), 1).squeeze(1)

    return choose


def _cache(model: Any, room: int) -> Any:
    """The model's own cache, with room for so many tokens from the start where a layer keeps them all."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    from mopeq.runtime.cache import Roomy

    cache = DynamicCache(config=model.config.get_text_config())
    cache.layers = [Roomy(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
