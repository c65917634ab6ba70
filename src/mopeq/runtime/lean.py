"""A packed model without transformers: its prompt on torch, its tokens by :class:`mopeq.runtime.step.Step`.

For one sequence of a family whose layers are x += attention(norm(x)); x += experts(norm(x)). Importing transformers'
modelling takes longer than reading a model of 3 GB; what it computes for such a sequence is here, operation by
operation, and gives the same bits. lean_load.py says which checkpoints it is for, and fills it in the background.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mopeq.kernels import PackedGroup, experts
from mopeq.kernels.attention import Stream
from mopeq.kernels.routing import Moe, Router
from mopeq.runtime.step import Step
from mopeq.seam import Gate

__all__ = ["Lean", "Norm", "Rotary", "Shape"]


@dataclass(frozen=True)
class Shape:
    """What a configuration says of attention and router: heads of queries, of keys and values, numbers of a head,
    epsilon and base of the rotation, experts of a token, and how their weights are made (:class:`Router`).
    """

    heads: int
    kv_heads: int
    size: int
    eps: float
    theta: float
    k: int
    normalized: bool
    rounded: bool


class Norm:
    """RMSNorm over the last axis: in float32, rounded, then weighed."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.variance_epsilon = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        """The shape and type of ``x``."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class Rotary:
    """Cosine and sine (1, tokens, size) of positions int64 (1, tokens), in the type of ``x``."""

    def __init__(self, theta: float, size: int) -> None:
        self.inverse = 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float) / size))

    def __call__(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        half = positions[..., None].float() * self.inverse
        both = torch.cat((half, half), dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


class Embedding:
    """Rows of ``weight`` (vocabulary, hidden)."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, ids: Tensor) -> Tensor:
        """Ids int64 (1, tokens) to (1, tokens, hidden)."""
        return functional.embedding(ids, self.weight)


@dataclass(frozen=True)
class Layer:
    """A layer under the names that :class:`Step` knows; ``router`` (experts, hidden), experts' matrices in panels."""

    input_layernorm: Norm
    self_attn: SimpleNamespace
    post_attention_layernorm: Norm
    router: Tensor
    gate_up: PackedGroup
    down: PackedGroup


class Lean:
    """A model that :mod:`mopeq.runtime.decode` runs, and nothing else.

    ``config``, ``generation_config`` and ``get_input_embeddings`` are the parts of transformers' models that generating
    asks for. ``filled`` ends when its weights are there; ``tensors`` are those by name, where they are its own.
    """

    def __init__(
        self, shape: Shape, embed: Tensor, layers: Sequence[Layer], norm: Norm, head: Callable[[Tensor], Tensor],
        filled: Future[None], positions: int, stops: Any, tensors: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        self.shape, self.layers, self.norm, self.lm_head, self.filled = shape, layers, norm, head, filled
        self.tensors = tensors
        self.embed_tokens, self.rotary_emb = Embedding(embed), Rotary(shape.theta, shape.size)
        own = SimpleNamespace(vocab_size=len(embed), max_position_embeddings=positions)
        own.get_text_config = lambda: own
        self.config, self.generation_config = own, SimpleNamespace(eos_token_id=stops)

    def get_input_embeddings(self) -> Embedding:
        """Whose ``weight`` says where the model is."""
        return self.embed_tokens

    def begin(self, prompt: Tensor, room: int, whole: bool) -> tuple[Tensor, Step]:
        """Logits after a prompt int64 (1, tokens), of all its tokens or only the last (1, 1 or tokens, vocabulary), and
        what gives those after each further token, up to ``room`` tokens in all.
        """
        self.filled.result()
        x = self.embed_tokens(prompt)
        rotation = [t.unsqueeze(1) for t in self.rotary_emb(x, torch.arange(prompt.shape[1]).unsqueeze(0))]
        caches = [[x.new_empty(1, self.shape.kv_heads, room, self.shape.size) for _ in range(2)] for _ in self.layers]
        for layer, cache in zip(self.layers, caches, strict=True):
            x = x + self._attended(layer.self_attn, layer.input_layernorm(x), rotation, cache)
            x = x + self._mixed(layer, layer.post_attention_layernorm(x))
        logits = self.lm_head(self.norm(x)[:, 0 if whole else -1 :])
        return logits, Step(self, self.lm_head, caches, self._moe)

    def _attended(self, own: Any, h: Tensor, rotation: Sequence[Tensor], cache: Sequence[Tensor]) -> Tensor:
        """Attention of the whole prompt h (1, tokens, hidden), whose keys and values go into the cache."""
        tokens, heads = h.shape[1], (*h.shape[:2], -1, self.shape.size)
        q, k, v = own.q_proj(h), own.k_proj(h), own.v_proj(h)
        if hasattr(own, "q_norm"):  # of each head, or of all together
            q, k = (norm(t.view(heads) if len(norm.weight) == self.shape.size else t)
                    for norm, t in ((own.q_norm, q), (own.k_norm, k)))  # fmt: skip
        q, k, v = (t.view(heads).transpose(1, 2) for t in (q, k, v))
        for held, states in zip(cache, (_rotated(k, *rotation), v), strict=True):
            held[:, :, :tokens] = states
        k, v = (held[:, :, :tokens] for held in cache)
        out = functional.scaled_dot_product_attention(
            _rotated(q, *rotation), k, v, is_causal=tokens > 1, scale=own.scaling,
            enable_gqa=self.shape.heads > self.shape.kv_heads,
        )  # fmt: skip
        done: Tensor = own.o_proj(out.transpose(1, 2).reshape(1, tokens, -1).contiguous())
        return done

    def _mixed(self, layer: Layer, h: Tensor) -> Tensor:
        """Router and experts for h (1, tokens, hidden)."""
        rows = h.view(-1, h.shape[-1])
        scores = functional.linear(rows, layer.router)
        weights, index = scores.softmax(-1, dtype=torch.float).topk(self.shape.k, dim=-1)
        if self.shape.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.shape.rounded:
            weights = weights.to(scores.dtype)
        done = experts(rows, index, weights, layer.gate_up, layer.down, Gate())
        assert done is not None  # lean_load.py has seen that the kernel takes them
        return done.view(h.shape)

    def _moe(self, layer: Layer, stream: Stream) -> Callable[[Tensor], Tensor]:
        router = Router(layer.router, self.shape.k, self.shape.normalized, self.shape.rounded)
        moe = Moe(stream, router, layer.gate_up, layer.down, Gate())
        return lambda h: moe()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Halves of heads (1, heads, tokens, size) turned by cos and sin (1, 1, tokens, size)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)
