"""Routed experts that stay packed: a class mixed in front of the model's own experts class.

The original module keeps its configuration, gate function and biases; its two 3-D parameters give way to flat buffers
``<gate_up|down>_<qweight|scales|zeros>`` (kernels/layout.py), and its ``forward`` to one that groups tokens by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor, nn

from mopeq.errors import CheckpointError
from mopeq.kernels import GroupLayout, PackedGroup, experts, grouped_linear
from mopeq.kernels.layout import PARTS
from mopeq.precision import GROUPS, Precision, ProjectionGroup
from mopeq.qtensor import QTensor
from mopeq.runtime.packed import PackedModule
from mopeq.seam import activate, down_bias, gate_of, gate_up_bias, is_experts, weighs_input

__all__ = ["MixedExperts", "Units", "bounds", "fill_experts", "mix", "pack_experts", "without"]

Units = Callable[[int, ProjectionGroup, Precision], Sequence[QTensor]]
"""The packed matrices of an expert's group at a precision: gate and up, or down; none where it is left out."""


class MixedExperts(PackedModule):
    """Mixed in front of an experts class of transformers by :func:`pack_experts`; not made by itself."""

    mopeq_layer: int
    mopeq_layouts: Mapping[ProjectionGroup, GroupLayout]
    mopeq_faults: list[str]
    """What went wrong while its buffers were filled."""

    def packed(self, group: ProjectionGroup) -> PackedGroup:
        """The packed weights of one projection group."""
        qweight, scales, zeros = (self._buffers[f"{group}_{part}"] for part in PARTS)
        assert qweight is not None
        return PackedGroup(self.mopeq_layouts[group], qweight, scales, zeros, self.mopeq_form)

    def packed_groups(self) -> list[PackedGroup]:
        """Those of gate and up, and of down."""
        return [self.packed(group) for group in GROUPS]

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """As the class behind it: (tokens, H), (tokens, k), (tokens, k) to (tokens, H). Unknown expert ids are skipped.

        Llama 4 gives (experts * tokens, H), already weighted, and gets as many rows back.
        """
        if top_k_index is None or top_k_weights is None:
            return cast(Tensor, self._every_expert(hidden_states))
        if (left_out := self.mopeq_layouts["down"].left_out) is not None:
            top_k_index, top_k_weights = without(top_k_index, top_k_weights, left_out.to(top_k_index.device))
        gate, biases = gate_of(self), (gate_up_bias(self, ...), down_bias(self, ...))
        if gate is not None:
            groups = self.packed("gate_up"), self.packed("down")
            done = experts(hidden_states, top_k_index, top_k_weights, *groups, gate, biases)
            if done is not None:
                return done
        return cast(Tensor, self._on_torch(hidden_states, top_k_index, top_k_weights))

    # how many tokens an expert gets is data: torch.compile would make a graph for every count, so it goes around
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _on_torch(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What :func:`mopeq.kernels.experts` computes, in steps that have gradients: the definition."""
        return mix(hidden_states, top_k_index, top_k_weights, self._experts, self._run)

    @property
    def _experts(self) -> int:
        return len(self.mopeq_layouts["down"].precisions)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _every_expert(self, hidden_states: Tensor) -> Tensor:
        """Rows (experts * tokens, H), expert after expert. Rows of zeros, tokens not routed there, stay zeros."""
        ids = torch.arange(self._experts, device=hidden_states.device).repeat_interleave(
            hidden_states.shape[0] // self._experts
        )
        routed = hidden_states.abs().amax(-1).nonzero().squeeze(-1)
        result = torch.zeros_like(hidden_states)
        result[routed] = self._run(hidden_states[routed], ids[routed])
        return result

    def _run(self, x: Tensor, ids: Tensor) -> Tensor:
        """Rows ``x`` (rows, H), sorted by expert, each through its expert of ``ids`` (rows,), if that is known."""
        offsets = bounds(ids, self._experts)
        known = ids.clamp(0, self._experts - 1)
        gate_up = grouped_linear(x, self.packed("gate_up"), offsets)
        rows = grouped_linear(activate(self, gate_up, known), self.packed("down"), offsets)
        bias = down_bias(self, known)
        return rows if bias is None else rows + bias.to(rows.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by the class behind it, because its own was made when it was packed."""
        return _remake, (type(self).__bases__[1],), self.__dict__

    def extra_repr(self) -> str:
        """Experts at each precision."""
        counts = {
            g: {str(p): layout.precisions.count(p) for p in sorted(set(layout.precisions))}
            for g, layout in self.mopeq_layouts.items()
        }
        return f"layer={self.mopeq_layer}, precisions={counts}"


def mix(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: int,
    run: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Each token's sum of its experts' outputs by routing weight: (tokens, H), (tokens, k), (tokens, k) to (tokens, H).

    ``run(x (rows, H), ids (rows,))`` gives the experts' outputs (rows, H); ids ascend. Ids outside ``range(experts)``
    count nothing.
    """
    tokens, k = top_k_index.shape
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
    rows = run(hidden_states[order // k], ids)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    back, inside = back.view(tokens, k), (top_k_index >= 0) & (top_k_index < experts)
    # float32, in the router's order: reproducible on every device, rounded once (docs/numerics.md)
    total = hidden_states.new_zeros(hidden_states.shape, dtype=torch.float32)
    for slot in range(k):
        weight = torch.where(inside[:, slot], top_k_weights[:, slot].float(), 0.0)
        total = total + rows[back[:, slot]].float() * weight.unsqueeze(-1)
    return total.to(hidden_states.dtype)


def without(top_k_index: Tensor, top_k_weights: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor]:
    """The routing (tokens, k) without some experts, bool (experts,): index -1 in their slots, and float32 weights.

    A token's other experts get its whole weight, each by its own; a token that has no other gets nothing.
    """
    known = (top_k_index >= 0) & (top_k_index < len(left_out))
    kept = known & ~left_out[top_k_index.clamp(0, len(left_out) - 1)]
    weights = torch.where(known, top_k_weights.float(), 0.0)
    rest = torch.where(kept, weights, 0.0)
    total, left = (w.sum(-1, keepdim=True) for w in (weights, rest))
    scale = torch.where(left > 0, total / left.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    return torch.where(kept, top_k_index, -1), rest * scale


def bounds(ids: Tensor, experts: int) -> Tensor:
    """Ascending ids to ``offsets`` (experts + 1,), as :mod:`mopeq.kernels` takes them."""
    return torch.searchsorted(ids, torch.arange(experts + 1, device=ids.device, dtype=ids.dtype))


@cache
def _mixed(cls: Any) -> type[nn.Module]:
    return type(f"Mopeq{cls.__name__}", (MixedExperts, cls), {"__module__": __name__})


def _remake(cls: Any) -> nn.Module:
    """An empty module, as unpickling wants it."""
    mixed = _mixed(cls)
    return mixed.__new__(mixed)


def pack_experts(module: nn.Module, layer: int, layouts: Mapping[ProjectionGroup, GroupLayout]) -> None:
    """Turn an experts module of transformers, on any device or none, into :class:`MixedExperts` in place.

    Its weights are dropped and its buffers are not yet filled. Raises :class:`CheckpointError` where the module is no
    experts module or has other shapes.
    """
    name = type(module).__name__
    if not is_experts(module) or isinstance(module, MixedExperts):
        raise CheckpointError(
            f"layer {layer}: {name} is no experts module of transformers {version('transformers')} with gate_up_proj "
            "and down_proj; a newer transformers may have one"
        )
    m: Any = module
    if getattr(m, "has_post_expert_norm", False) or not getattr(m, "has_gate", True):
        raise CheckpointError(
            f"layer {layer}: {name} has a norm after its experts or no gate; mopeq does not run such experts"
        )
    if layouts["down"].left_out is not None and weighs_input(m):
        raise CheckpointError(
            f"layer {layer}: {name} scales the input of its experts, and some are left out; expected all of them"
        )
    device = m.down_proj.device
    for group in GROUPS:
        weight, layout = getattr(m, f"{group}_proj"), layouts[group]
        out, inp = sum(out for out, _ in layout.shapes), layout.shapes[0][1]
        transposed = getattr(m, "is_transposed", weighs_input(m))
        expected = (len(layout.precisions), *((inp, out) if transposed else (out, inp)))
        if tuple(weight.shape) != expected:
            raise CheckpointError(
                f"layer {layer}: {name}.{group}_proj is {tuple(weight.shape)}, the checkpoint has {expected}"
            )
    for group in GROUPS:
        delattr(m, f"{group}_proj")
        for part, dtype in PARTS.items():
            size = layouts[group].size(part)
            m.register_buffer(f"{group}_{part}", torch.empty(size, dtype=dtype, device=device) if size else None)
    m.mopeq_layer, m.mopeq_layouts, m.mopeq_faults = layer, dict(layouts), []
    # transformers would initialise the module by its class and look for the parameters dropped here
    m._is_hf_initialized = True
    m.__class__ = _mixed(cast(Hashable, type(module)))


def fill_experts(module: nn.Module, group: ProjectionGroup, units: Units) -> None:
    """New buffers, in plain form, of a projection group of :class:`MixedExperts`."""
    m: Any = module
    layout: GroupLayout = m.mopeq_layouts[group]
    buffers: dict[str, Any] = {part: torch.empty(layout.size(part), dtype=dtype) for part, dtype in PARTS.items()}
    for expert, precision in enumerate(layout.precisions):
        matrices = units(expert, group, precision)
        for part, buffer in buffers.items():
            for view, matrix in zip(layout.views(buffer, part, expert), matrices, strict=False):  # 16 bits: no scales
                view.copy_(getattr(matrix, part))
    for part, buffer in buffers.items():
        module._buffers[f"{group}_{part}"] = buffer if buffer.numel() else None
