"""What a model may weigh on a device: its memory less cache, activations and the process, for the native runtime
with the compiled kernel.

Every row is a formula of the configuration; ``benchmarks/fit.py`` compares them with measured memory (docs/serving.md).
Sequences of a batch are taken to be equally long, so that attention needs no mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mopeq.allocate import parse_budget
from mopeq.errors import BudgetError
from mopeq.spec import Inventory

__all__ = ["Fit", "activation_bytes", "cache_bytes", "fit"]

PROCESS = 430 << 20
"""Resident bytes of Python, torch, transformers and mopeq on Linux before a model is loaded, and tables that the
compute libraries set up at first use (``benchmarks/fit.py``)."""
FLOATS = 1 << 24
"""Outputs of experts that the compiled kernel holds at a time (csrc/experts.cpp)."""
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Fit:
    """Bytes: of the device, and what is not for weights."""

    device: int
    cache: int
    activations: int
    process: int

    @property
    def weights(self) -> int:
        """What is left for the whole checkpoint: codes, scales, zero points and all that is not quantized."""
        return self.device - self.cache - self.activations - self.process

    def rows(self) -> list[tuple[str, int]]:
        """The table of the budget, the device last."""
        return [
            ("weights and scales, at most", self.weights),
            ("keys and values", self.cache),
            ("activations", self.activations),
            ("process", self.process),
            ("device", self.device),
        ]


def fit(device: str, config: Any, model: Inventory, context: int, batch: int, dtype: str) -> Fit:
    """The budget for a model with ``config`` (transformers') on a ``device`` of ``8GiB``, say.

    ``batch`` sequences of ``context`` tokens each, prompt and answer, are computed in ``dtype`` at a time. Raises
    :class:`BudgetError` where nothing is left for weights, or a number is out of range.
    """
    found = parse_budget(device)
    if found.kind != "bytes" or context < 1 or batch < 1:
        raise BudgetError(
            f"a device of {device}, context {context}, batch {batch}; expected a size such as 8GiB, and at least 1"
        )
    size = SIZES[dtype]
    made = Fit(
        int(found.amount),
        cache_bytes(config, context, batch, size),
        activation_bytes(config, model, context, batch, size),
        PROCESS,
    )
    if made.weights <= 0:
        told = ", ".join(f"{name} {count / 1e6:,.1f} MB" for name, count in made.rows()[1:-1])
        raise BudgetError(
            f"{device} leaves nothing for weights: {told}; lower --context or --batch, or give more memory"
        )
    return made


def cache_bytes(config: Any, context: int, batch: int, size: int) -> int:
    """Keys and values of all layers, as transformers' cache holds them, and a second copy of one while it grows.

    A token and layer has 2 x heads of keys x their width, or with latent attention (DeepSeek-V2, arXiv:2405.04434, 2.1)
    ``kv_lora_rank + qk_rope_head_dim``. Sliding and chunked layers keep their window.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    if getattr(text, "kv_lora_rank", None):
        width = text.kv_lora_rank + text.qk_rope_head_dim
    else:
        head = getattr(text, "head_dim", None) or text.hidden_size // heads
        width = 2 * (getattr(text, "num_key_value_heads", None) or heads) * head
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    windows = {
        "full_attention": context,
        "sliding_attention": getattr(text, "sliding_window", None) or context,
        "chunked_attention": getattr(text, "attention_chunk_size", None) or context,
    }
    unknown = sorted({*kinds} - {*windows})
    if unknown:
        raise BudgetError(f"{text.model_type} has layers of {unknown[0]}, whose cache mopeq cannot tell; give --budget")
    layers = [batch * min(context, windows[kind]) * width * size for kind in kinds]
    return int(sum(layers) + max(layers))


def activation_bytes(config: Any, model: Inventory, context: int, batch: int, size: int) -> int:
    """The most that lives at a time while prompts of the whole context are read, outside the cache.

    Beside the residual stream, its norm and the experts' input in ``size`` bytes (3 H a token): either the routed
    experts (csrc/experts.cpp: as many tokens at a time as make ``FLOATS`` outputs; float32 outputs of both products,
    and the inputs of both as float32 and digits), or attention (queries, keys and values, once more rotated, and the
    output), or its last projection (two others, the input as float32 and digits, the output as float32 and in
    ``size``). The head computes one token a sequence.
    """
    text = config.get_text_config()
    tokens, heads = batch * context, text.num_attention_heads
    digits = 3 if size == 4 else 2  # docs/kernels.md
    split = 4 + digits + (1 + digits) / 8  # bytes of an input: csrc/product.cpp
    if getattr(text, "kv_lora_rank", None):
        head = text.qk_nope_head_dim + text.qk_rope_head_dim
    else:
        head = getattr(text, "head_dim", None) or text.hidden_size // heads
    hidden = max(layer.hidden_size for layer in model.layers.values())
    last = 2 * size * heads * head + hidden * split + heads * head * (size + (4 if size < 4 else 0))
    most = tokens * max(7 * heads * head * size, last)
    for layer in model.layers.values():
        h, i = layer.hidden_size, layer.intermediate_size
        together = min(tokens, max(1, FLOATS // (layer.top_k * (2 * i + h))))
        rows = together * layer.top_k
        most = max(most, rows * (4 * (2 * i + h) + i * split) + together * h * split)
    return int(most + 3 * tokens * hidden * size + batch * text.vocab_size * (size + 4))
