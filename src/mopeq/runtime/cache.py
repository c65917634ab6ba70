"""Keys and values of a sequence in a place of their own, which native steps write into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

__all__ = ["Roomy"]

LEAST = 256
"""Tokens for which a place has room at least when it is full and made anew."""


class Roomy(DynamicLayer):
    """A layer that writes into its place what transformers' own appends to a copy.

    ``held`` is the place, keys and values (batch, heads, room, size); ``keys`` and ``values`` are its beginning.
    """

    def __init__(self, room: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room, self.held = room, list[Tensor]()

    @classmethod
    def of(cls, layer: DynamicLayer) -> Roomy:
        """What a layer holds."""
        made = cls()
        keys, values = _shown(layer)
        made.lazy_initialization(keys, values)
        made.keys, made.values = keys, values
        return made

    def place(self, more: int) -> list[Tensor]:
        """``held``, with room for ``more`` tokens: another list when it was too small, or no longer what is shown."""
        length, shown = self.get_seq_length(), _shown(self)
        end = length + more
        if not all(map(_begins, self.held, shown)) or not self.held or end > self.held[0].shape[2]:
            self.room = self.room if end <= self.room else end + max(LEAST, end // 2)
            self.held = [t.new_empty(*t.shape[:2], self.room, t.shape[3]) for t in shown]
            for held, states in zip(self.held, shown, strict=True):
                held[:, :, :length] = states
            self.show(length)
        return self.held

    def show(self, length: int) -> None:
        """So many tokens are there."""
        self.keys, self.values = (held[:, :, :length] for held in self.held)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, heads, tokens, size) behind those before; all of them."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)  # what has gradients is not written over
        new = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*new)
        if not self.get_seq_length():
            self.keys, self.values = (t[:, :, :0] for t in new)
        begin, count = self.get_seq_length(), key_states.shape[2]
        for held, states in zip(self.place(count), new, strict=True):
            held[:, :, begin : begin + count] = states
        self.show(begin + count)
        return _shown(self)


def _shown(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer that has some."""
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def _begins(held: Tensor, shown: Tensor) -> bool:
    """Whether ``shown`` is the beginning of ``held``."""
    return held.data_ptr() == shown.data_ptr() and held.stride() == shown.stride() and len(held) == len(shown)
