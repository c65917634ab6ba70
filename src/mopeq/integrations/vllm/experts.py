"""Packed routed experts of vLLM, each with its own precisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from mopeq.errors import InputError
from mopeq.integrations.vllm.parts import Cut, Filling
from mopeq.kernels import GroupLayout, Ready
from mopeq.kernels.layout import PARTS
from mopeq.precision import GROUPS, Precision, ProjectionGroup
from mopeq.runtime.experts import bounds, mix
from mopeq.spec import LayerShape

__all__ = ["PackedExpertsMethod"]

PREFIXES: dict[ProjectionGroup, str] = {"gate_up": "w13_", "down": "w2_"}
"""vLLM's names of the projection groups."""
SHARDS: dict[str, tuple[ProjectionGroup, int]] = {"w1": ("gate_up", 0), "w3": ("gate_up", 1), "w2": ("down", 0)}
"""vLLM's names of gate, up and down."""
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu, "gelu": gelu, "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}  # fmt: skip


class PackedExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Keeps one layer's experts packed. vLLM routes, adds shared experts, and sums over workers."""

    def __init__(
        self, moe: Any, name: str, shape: LayerShape, precisions: Mapping[ProjectionGroup, tuple[Precision, ...]],
        renormalize: bool,
    ) -> None:  # fmt: skip
        super().__init__(moe)
        self.name, self.shape, self.precisions, self.renormalize = name, shape, precisions, renormalize

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """Flat parameters ``w13_*`` and ``w2_*`` for this worker's experts and rows, which load themselves."""
        self._refuse(layer)
        width, rank = intermediate_size_per_partition, self.moe.tp_rank
        self.dtype, layer.mopeq_experts = params_dtype, num_experts
        first = 0 if width == self.shape.intermediate_size else rank * width
        here = [layer._map_global_expert_id_to_local_expert_id(e) for e in range(self.shape.experts)]
        self.fillings: dict[ProjectionGroup, Filling] = {}
        self.cuts: dict[ProjectionGroup, Cut] = {}
        for group in GROUPS:
            inner, outer = (first, first + width), (0, hidden_size)
            cut = Cut(inner, outer) if group == "gate_up" else Cut(outer, inner)
            whole = self.shape.matrices(group)
            local = {slot: self.precisions[group][expert] for expert, slot in enumerate(here) if slot != -1}
            for precision in sorted(set(local.values())):
                cut.check(f"{self.name}, {group}", whole[0], precision)
            layout = GroupLayout(tuple(local[slot] for slot in range(num_experts)), (cut.shape,) * len(whole))
            self.cuts[group] = cut
            self.fillings[group] = Filling(self.name, layer, PREFIXES[group], layout)
            for part in PARTS:
                if hasattr(layer, f"{PREFIXES[group]}{part}"):
                    getattr(layer, f"{PREFIXES[group]}{part}").weight_loader = _Loader(self, layer, part)

    def _refuse(self, layer: Any) -> None:
        special = {
            "the activation " + layer.activation.value: layer.activation.value not in GATES,
            "routing weights on the input": layer.apply_router_weight_on_input,
            "a clamped activation": layer.swiglu_limit is not None,
            "biases": getattr(self.moe, "has_bias", False),
        }
        for what, found in special.items():
            if found:
                raise InputError(
                    f"{self.name} has {what}, which mopeq does not run under vLLM; serve it with --engine native"
                )

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """None: vLLM's own kernels are not used."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that all came, and lay it out for the kernel."""
        layer.mopeq_packed = {group: filling.finish(self.dtype) for group, filling in self.fillings.items()}  # type: ignore[assignment]

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **shared: Any) -> Tensor:
        """(tokens, H), (tokens, k), (tokens, k) to (tokens, H); other workers' experts count nothing."""
        if self.renormalize:
            topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
        out: Tensor = torch.ops.mopeq.vllm_experts(x, topk_weights, topk_ids, layer.layer_name)
        return out


class _Loader:
    """vLLM's ``weight_loader`` of one parameter, called for the experts of all workers."""

    def __init__(self, method: PackedExpertsMethod, layer: Any, part: str) -> None:
        self.method, self.layer, self.part = method, layer, part

    def __call__(
        self, param: nn.Parameter, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int,
        return_success: bool = False,
    ) -> bool | None:  # fmt: skip
        slot = self.layer._map_global_expert_id_to_local_expert_id(expert_id)
        if slot != -1:
            group, matrix = SHARDS[shard_id]
            method = self.method
            method.fillings[group].put(
                slot, matrix, self.part, loaded_weight, method.cuts[group], method.shape.matrices(group)[matrix]
            )
        return slot != -1 if return_success else None


def _experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    layer = get_forward_context().no_compile_layers[layer_name].routed_experts
    packed: dict[ProjectionGroup, Ready] = layer.mopeq_packed
    gate = GATES[layer.activation.value]
    experts: int = layer.mopeq_experts

    def run(rows: Tensor, ids: Tensor) -> Tensor:
        offsets = bounds(ids, experts)
        first, second = packed["gate_up"](rows, offsets).chunk(2, dim=-1)
        return packed["down"](gate(first) * second, offsets)

    ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
    return mix(x, ids, topk_weights, experts, run)


# how many tokens an expert gets is data: in a compiled graph this must be one opaque operator
_LIBRARY: Any = torch.library.Library("mopeq", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("vllm_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, str layer_name) -> Tensor")
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("vllm_experts", torch.compiler.disable(_experts), _device)  # type: ignore[no-untyped-call]


@torch.library.register_fake("mopeq::vllm_experts", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _shape(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)
