"""Token after token of one sequence: the prompt by the model's own forward pass, then step by step.

The tokens are those of transformers' ``generate`` with the same settings and random state. What is left out is what one
sequence does not need: beams, padding, the copying of the whole cache for every token. A step is native where
``step.py`` knows the family, else the model's own pass; the prompt of a :class:`Lean` is its own too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopeq.runtime.lean import Lean
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
    begin = model.begin if isinstance(model, Lean) else functools.partial(_begin, model, images=images or {})
    logits, step = begin(prompt, count + most, heard is not None)
    if heard is not None:
        heard(logits[0])
    logits = logits[:, -1].clone()  # the others of the prompt may go
    for number in range(most):
        token = choose(logits.float())
        yield (value := int(token))
        if value in stops or number + 1 == most:
            return
        logits = step(token.view(1, 1), count + number)
        if heard is not None:
            heard(logits)


def _begin(
    model: Any, prompt: Tensor, room: int, whole: bool, images: Mapping[str, Tensor]
) -> tuple[Tensor, Callable[[Tensor, int], Tensor]]:  # fmt: skip
    """:meth:`Lean.begin` of a model of transformers."""
    cache = _cache(model, room)
    _forget(model)
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 0 if whole else 1}  # 0: all
    logits = model(input_ids=prompt, **options, **images).logits

    def own(token: Tensor, position: int) -> Tensor:
        done: Tensor = model(input_ids=token, **options).logits[:, -1]
        return done

    return logits, step_of(model, cache) or own


def _forget(model: Any) -> None:
    """Make a model forget the positions of the images of its last prompt, which GLM-4V and Qwen3-VL keep."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


def _chooser(sampling: Sampling) -> Callable[[Tensor], Tensor]:
    """Logits (1, vocabulary) to a token (1,), by the steps of transformers, in its order."""
    if sampling.temperature == 0:
        return lambda logits: logits.argmax(-1)

    def choose(logits: Tensor) -> Tensor:
        logits = logits / sampling.temperature
        if sampling.top_k:
            least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if sampling.top_p < 1:
            rising, order = logits.sort(descending=False)
            gone = rising.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
            gone[:, -1] = False
            logits = logits.masked_fill(gone.scatter(1, order, gone), float("-inf"))
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
