"""The experts seam of transformers 5: what differs between experts modules, in one place.

An experts module is called ``experts(hidden (tokens, H), top_k_index (tokens, k), top_k_weights (tokens, k))`` and
adds up ``weight * down(activate(gate_up(x)))``. Families differ in how gate and up are laid out (concatenated or
interleaved), in biases, and in the gate function; mopeq keeps matrices canonical (gate rows, then up rows; (out, in))
and asks the module for the rest. Llama 4 alone weighs the input instead of the output and calls its experts with all
tokens for every expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Gate", "activate", "dealt", "down_bias", "gate_of", "gate_up_bias", "is_experts", "weighs_input"]


@dataclass(frozen=True)
class Gate:
    """The gate function ``(u + shift) * g * sigmoid(alpha * g)`` as numbers, for kernels that compute it themselves.

    g is at most ``limit``, u within ``limit`` of zero. ``interleaved``: the bias has g0 u0 g1 u1 ..., not gates first.
    """

    alpha: float = 1.0
    limit: float = float("inf")
    shift: float = 0.0
    interleaved: bool = False


def gate_of(module: nn.Module) -> Gate | None:
    """What :func:`activate` computes for this module, or None where it is none of those functions."""
    m: Any = module
    interleaved = not getattr(m, "is_concatenated", True)
    if any(cls.__name__ == "GptOssExperts" for cls in type(module).__mro__):
        return Gate(float(m.alpha), float(m.limit), 1.0, interleaved)
    own = getattr(type(module), "_apply_gate", None)
    usual = own is None or own.__name__ == "_default_apply_gate"
    silu = type(getattr(m, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    return Gate(interleaved=interleaved) if usual and silu else None


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a routed-experts module of transformers 5, packed by mopeq or not."""
    return hasattr(module, "mopeq_layer") or (
        isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
        and isinstance(getattr(module, "down_proj", None), nn.Parameter)
    )


def weighs_input(module: nn.Module) -> bool:
    """Whether routing weights scale the experts' input (Llama 4) rather than their output."""
    return any(cls.__name__ == "Llama4TextExperts" for cls in type(module).__mro__)


def dealt(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], images: bool) -> tuple[Tensor, Tensor]:
    """What the block of ERNIE 4.5 VL was called with: hidden states (sequences, length, H), and which of their tokens,
    bool (tokens,), it gives to its experts for images, or to the others.
    """
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    hidden, kinds = given["hidden_states"], given.get("moe_mm_token_type_ids")
    vision = torch.zeros(hidden.shape[:2], dtype=torch.bool) if kinds is None else kinds.bool().cpu()
    return hidden, (vision if images else ~vision).flatten()


def gate_up_bias(module: nn.Module, expert: Any) -> Tensor | None:
    """Bias of gate and up in the module's own order, (2I,) of one expert or (tokens, 2I) of each token's, or None."""
    bias: Any = getattr(module, "gate_up_proj_bias", None)
    return None if bias is None else bias[expert]


def down_bias(module: nn.Module, expert: Any) -> Tensor | None:
    """Bias of down, (H,) of one expert or (tokens, H) of each token's, or None."""
    bias: Any = getattr(module, "down_proj_bias", None)
    return None if bias is None else bias[expert]


def activate(module: nn.Module, gate_up: Tensor, expert: int | Tensor) -> Tensor:
    """Hidden activations (tokens, I) of one expert from its gate and up outputs (tokens, 2I), gate first, no bias."""
    m: Any = module
    if not getattr(module, "is_concatenated", True):
        gate, up = gate_up.chunk(2, dim=-1)
        gate_up = torch.stack((gate, up), dim=-1).flatten(-2)
    bias = gate_up_bias(module, expert)
    if bias is not None:
        gate_up = gate_up + bias.to(gate_up)
    if hasattr(module, "_apply_gate"):
        out: Tensor = m._apply_gate(gate_up)
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    product: Tensor = m.act_fn(gate) * up
    return product
