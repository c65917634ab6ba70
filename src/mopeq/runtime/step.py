"""One token through a packed model on the CPU, with two native calls a layer: attention, and router with experts.

For families whose layers are x += attention(norm(x)); x += mlp(norm(x)) with plain grouped-query attention. Shared
experts, and routers of other kinds than a softmax with their experts, stay the model's modules, as do embedding,
rotation, last norm and head. The sum that runs
through the layers stays in float32, where the model rounds it to its own type after every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mopeq.kernels import GroupLayout, PackedGroup, selected
from mopeq.kernels.attention import PROJECTIONS, Attention, Shape, Stream
from mopeq.kernels.cpu import TYPES
from mopeq.kernels.routing import Moe, Router
from mopeq.precision import FULL
from mopeq.runtime.linear import QLinear
from mopeq.seam import gate_of

__all__ = ["Step", "body_of", "step_of"]

LAYERS = {
    **{f"{name}DecoderLayer": f"{name}ForCausalLM" for name in ("Olmoe", "Mixtral", "Qwen2Moe", "Qwen3Moe", "Glm4Moe")},
    "DeepseekOcr2TextDecoderLayer": "DeepseekVL2ForConditionalGeneration",  # of DeepSeek-VL2-tiny
}
"""Classes with such layers, and their models. Whoever adds one here has tests/runtime/test_step.py judge it."""
ROUTED = tuple(f"{name}SparseMoeBlock" for name in ("Olmoe", "Mixtral", "Qwen2Moe", "Qwen3Moe"))
"""Classes whose router is a softmax over ``gate.weight``; a ``shared_expert`` is added by a gate of its own."""


class Step:
    """Token after token of the sequence whose keys and values ``caches`` hold, each (1, heads, room, size)."""

    def __init__(
        self, base: Any, head: Any, caches: Sequence[Sequence[Tensor]],
        mlp_of: Callable[[Any, Stream], Callable[[Tensor], Tensor]],
    ) -> None:  # fmt: skip
        """``base``: the model below its ``head``; ``mlp_of``: what ``h`` (1, 1, hidden) goes through in a layer."""
        first, dtype = base.layers[0], base.embed_tokens.weight.dtype
        self.embed, self.rotary, self.norm, self.head = base.embed_tokens, base.rotary_emb, base.norm, head
        rotated = self.rotary(torch.zeros(1, dtype=dtype), torch.zeros(1, 1, dtype=torch.int64))[0].shape[-1]
        self.stream = Stream(first.input_layernorm.weight.shape[0], rotated, dtype)
        self.layers = [(_attention(layer, self.stream, *held), mlp_of(layer, self.stream))
                       for layer, held in zip(base.layers, caches, strict=True)]  # fmt: skip

    def __call__(self, token: Tensor, position: int) -> Tensor:
        """Logits (1, vocabulary) after ``token`` (1, 1), the one at ``position`` of the sequence."""
        stream = self.stream
        add: Any = None
        embedded = self.embed(token)
        stream.x.copy_(embedded.view(-1))
        for held, made in zip((stream.cos, stream.sin), self.rotary(embedded, torch.tensor([[position]])), strict=True):
            held.copy_(made.view(-1))
        for attention, mlp in self.layers:
            add = mlp(attention(add, position))
        total = stream.x + add.view(-1)
        logits: Tensor = self.head(self.norm(total.to(stream.h.dtype).view(1, 1, -1)))
        return logits[:, -1]


def step_of(model: Any, cache: Any) -> Step | None:
    """A :class:`Step` for a model whose ``cache`` holds a prompt, or None where the model must run by itself."""
    caches: list[Any] = [getattr(layer, "held", None) for layer in cache.layers]
    body = body_of(model)
    if selected().name != "cpu" or not all(caches) or body is None or not _suits(model, body.model):
        return None
    return Step(body.model, body.lm_head, caches, lambda layer, stream: _mlp(layer.mlp, stream))


def body_of(model: Any) -> Any:
    """What has the ``model`` of such layers and its ``lm_head``, the model or a part of it; None if there is none."""
    body = getattr(model, "language", model)
    layers: Any = getattr(getattr(body, "model", None), "layers", ())
    suits = len(layers) > 0 and LAYERS.get(type(layers[0]).__name__) == type(model).__name__
    return body if suits else None


def _suits(model: Any, base: Any) -> bool:
    config = base.config
    return (
        not (_hooked(model) or _hooked(base))
        and all(type(layer).__name__ in LAYERS and _plain(layer) for layer in base.layers)
        and getattr(config, "clip_qkv", None) is None
        and config._attn_implementation in ("sdpa", "eager")
        and base.embed_tokens.weight.dtype in TYPES
        and {t.device.type for t in base.parameters()} == {"cpu"}
    )


def _plain(layer: Any) -> bool:
    """No hooks or adapters in what a step replaces, and matrices that the kernel reads."""
    replaced = [layer, layer.input_layernorm, layer.post_attention_layernorm, *layer.self_attn.modules()]
    return not any(map(_hooked, replaced)) and all(
        _group(getattr(layer.self_attn, f"{name}_proj")) is not None for name in PROJECTIONS
    )


def _hooked(module: nn.Module) -> bool:
    replaced = "forward" in module.__dict__ and not hasattr(module.forward, "mopeq_steps")
    return bool(module._forward_hooks or module._forward_pre_hooks or replaced)


def _group(linear: nn.Module) -> PackedGroup | None:
    """The matrix of a linear for the kernel: packed, or as it is where it is bfloat16."""
    if type(linear) is QLinear:
        return linear.packed() if linear.mopeq_form == "panels" else None
    if type(linear) is nn.Linear and linear.weight.dtype == torch.bfloat16 and linear.weight.is_contiguous():
        out, inp = linear.weight.shape
        if out % 8 == 0 and inp % 32 == 0:
            codes = linear.weight.detach().view(-1).view(torch.uint8)
            return PackedGroup(GroupLayout((FULL,), ((out, inp),)), codes, None, None, "panels")
    return None


def _attention(layer: Any, stream: Stream, keys: Tensor, values: Tensor) -> Attention:
    own, groups = layer.self_attn, {}
    vectors = {"norm_before": layer.input_layernorm.weight, "norm_after": layer.post_attention_layernorm.weight}
    for name in PROJECTIONS:
        linear = getattr(own, f"{name}_proj")
        group = _group(linear)
        assert group is not None  # _plain has seen it
        groups[name] = group
        if linear.bias is not None:
            vectors[f"{name}_bias"] = linear.bias
        if hasattr(own, f"{name}_norm"):
            vectors[f"{name}_norm"] = getattr(own, f"{name}_norm").weight
    shape = Shape(groups["q"].out_features // own.head_dim, keys.shape[1], own.head_dim, own.scaling,
                  layer.input_layernorm.variance_epsilon)  # fmt: skip
    return Attention(stream, shape, groups, vectors, keys, values)


def _mlp(block: Any, stream: Stream) -> Callable[[Tensor], Tensor]:
    """What a layer does after its attention: from ``h`` (1, 1, hidden) to what is added."""
    from mopeq.runtime.experts import MixedExperts  # which imports Dynamo

    name = type(block).__name__
    if name not in ROUTED or any(map(_hooked, (block, block.gate, block.experts))):
        return block  # type: ignore[no-any-return]
    gate, experts = gate_of(block.experts), block.experts
    if not isinstance(experts, MixedExperts) or experts.mopeq_form != "panels" or gate is None:
        return block  # type: ignore[no-any-return]
    if experts.mopeq_layouts["down"].left_out is not None:  # the module deals out their share
        return block  # type: ignore[no-any-return]
    mixtral = name.startswith("Mixtral")
    router = Router(block.gate.weight, block.gate.top_k, mixtral or block.gate.norm_topk_prob, not mixtral)
    moe = Moe(stream, router, experts.packed("gate_up"), experts.packed("down"), gate)
    shared = getattr(block, "shared_expert", None)
    if shared is None:
        return lambda h: moe()
    return lambda h: moe() + functional.sigmoid(block.shared_expert_gate(h)) * shared(h)
