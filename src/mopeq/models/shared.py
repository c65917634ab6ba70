"""What both models do alike around their decoder: outputs, the head with its loss, images in generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

__all__ = ["ImagesInPrompt", "VisionLanguageOutput", "padded_mask", "with_head"]


@dataclass
class VisionLanguageOutput(ModelOutput):
    """Loss where labels were given, logits (sequences, length, vocabulary), and what else was asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


def with_head(
    model: Any, head: nn.Linear, outputs: Any, labels: Tensor | None, logits_to_keep: int | Tensor, **kwargs: Any
) -> VisionLanguageOutput:
    """Logits of the positions kept (all where 0), and transformers' loss of ``labels``, which it shifts itself."""
    hidden = outputs.last_hidden_state
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = head(hidden[:, kept])
    loss = None
    if labels is not None:
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=head.out_features, **kwargs)
    return VisionLanguageOutput(
        loss=loss,
        logits=logits,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        router_logits=getattr(outputs, "router_logits", None),
    )


class ImagesInPrompt(GenerationMixin):
    """Generation in which images belong to the prompt: later steps get none, unless they read it anew.

    transformers looks for ``GenerationMixin`` among the bases themselves; name it beside this one.
    """

    image_inputs: tuple[str, ...] = ()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', without images after the first step where there is a cache."""
        again = kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True)
        kept = {name: value for name, value in kwargs.items() if again or name not in self.image_inputs}
        return super().prepare_inputs_for_generation(*args, **kept)  # type: ignore[misc]


def padded_mask(mask: Tensor, length: int) -> Tensor:
    """Boolean (sequences, length) of a mask that may end before the tokens that were generated since."""
    return torch.nn.functional.pad(mask.bool(), (0, length - mask.shape[1]))
