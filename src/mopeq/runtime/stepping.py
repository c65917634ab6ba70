"""transformers' ``generate`` at the speed of native steps: a packed model's ``forward`` takes them where it can.

The model's own pass costs a token some fifteen calls of torch a layer; a step costs two of the kernel. ``del
model.forward`` gives the model's own pass back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from mopeq.runtime.cache import Roomy
from mopeq.runtime.step import Step, body_of, step_of

__all__ = ["Stepping", "take_steps"]

UNDERSTOOD = frozenset(("input_ids", "past_key_values", "attention_mask", "position_ids", "cache_position", "use_cache",
                        "return_dict", "logits_to_keep"))  # fmt: skip
"""Arguments that a step can do, if they are as generating a single sequence has them."""
OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")


class Stepping:
    """Stands in a model for its ``forward``: one token of one sequence behind a cache is a step, all else its own pass.

    The cache's layers become :class:`Roomy`; to others it is the cache that it was.
    """

    mopeq_steps = True
    """For step.py, which leaves models alone whose ``forward`` another has replaced."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._made: Any = None  # the class of what its own pass returns
        self._steps: WeakKeyDictionary[Any, tuple[Step | None, list[Any]]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return Stepping, (self.model,)  # a copy of the model steps for itself

    @functools.cached_property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.model).forward, self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own ``forward``."""
        logits = None if args or self._made is None else self._step(kwargs)
        if logits is not None:
            return self._made(logits=logits[:, None], past_key_values=kwargs["past_key_values"])
        done = type(self.model).forward(self.model, *args, **kwargs)
        self._made = self._made if isinstance(done, tuple) else type(done)
        return done

    def _step(self, given: Mapping[str, Any]) -> Tensor | None:
        """Logits (1, vocabulary), or None where the model has to run by itself."""
        token = given.get("input_ids")
        cache: Any = given.get("past_key_values")
        if token is None or token.shape != (1, 1) or type(cache) is not DynamicCache or not self._may(given):
            return None
        length = cache.get_seq_length()
        layers: list[Any] = cache.layers
        if not length or not _alone(given, length) or not all(type(layer) in (DynamicLayer, Roomy) for layer in layers):
            return None
        layers[:] = [layer if type(layer) is Roomy else Roomy.of(layer) for layer in layers]
        places = [layer.place(1) for layer in layers]
        step, known = self._steps.get(cache, (None, []))
        if len(known) != len(places) or any(a is not b for a, b in zip(known, places, strict=True)):
            step = step_of(self.model, cache)
            self._steps[cache] = step, places
        if step is None:
            return None
        logits = step(token, length)
        for layer in layers:
            layer.show(length + 1)
        return logits

    def _may(self, given: Mapping[str, Any]) -> bool:
        """Whether nothing but the logits of inference is asked for."""
        return not (
            torch.is_grad_enabled()
            or self.model.training
            or torch.compiler.is_compiling()
            or any(given.get(name) is False for name in ("use_cache", "return_dict"))
            or any(value is not None and value is not False and name not in UNDERSTOOD for name, value in given.items())
            or any(getattr(self.model.config, name, False) for name in OUTPUTS)
        )


def _alone(given: Mapping[str, Any], length: int) -> bool:
    """Whether the token comes behind ``length`` others, all of which it may see."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None and not (
        isinstance(mask, Tensor) and mask.shape == (1, length + 1) and bool((mask == 1).all())
    ):  # fmt: skip
        return False
    return positions is None or (positions.shape == (1, 1) and int(positions) == length)


def take_steps(model: Any) -> None:
    """Let a packed model's ``forward`` take native steps, if it is of a family that step.py knows."""
    if body_of(model) is not None:
        model.forward = Stepping(model)
