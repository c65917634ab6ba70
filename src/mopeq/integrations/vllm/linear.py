"""A packed linear of vLLM: alone, or several joined to one (q, k and v; gate and up), or the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from mopeq.checkpoint import PackedLinear
from mopeq.integrations.vllm.parts import Cut, Filling
from mopeq.kernels import GroupLayout
from mopeq.kernels.layout import PARTS

__all__ = ["PackedLinearMethod"]


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Keeps the matrices packed, one after the other in one buffer of each part."""

    def __init__(self, name: str, parts: Sequence[PackedLinear]) -> None:
        super().__init__()
        self.name, self.parts = name, parts

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """Parameters ``qweight``, ``scales``, ``zeros`` for this worker's share, which load themselves."""
        precision = self.parts[0].precision
        self.dtype = params_dtype
        self.cuts = []
        for number, (part, rows) in enumerate(zip(self.parts, output_partition_sizes, strict=True)):
            cut = _cut(layer, number, part.shape, (rows, input_size_per_partition))
            cut.check(part.tensors, part.shape, precision)
            self.cuts.append(cut)
        shapes = tuple((rows, input_size_per_partition) for rows in output_partition_sizes)
        self.filling = Filling(self.name, layer, "", GroupLayout((precision,), shapes))
        for stored in PARTS:
            if hasattr(layer, stored):
                getattr(layer, stored).weight_loader = _Loader(self, stored)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that all came, and lay it out for the kernel."""
        layer.mopeq_packed = self.filling.finish(self.dtype)  # type: ignore[assignment]

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) to (..., out)."""
        y: Tensor = layer.mopeq_packed.linear(x)  # type: ignore[union-attr, operator]
        return y if bias is None else y + bias


class _Loader:
    """vLLM's ``weight_loader`` of one parameter. ``loaded_shard_id`` says which of the joined matrices comes."""

    def __init__(self, method: PackedLinearMethod, part: str) -> None:
        self.method, self.part = method, part

    def __call__(self, param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: str | int | None = None) -> None:
        shard = loaded_shard_id or 0
        number = "qkv".index(shard) if isinstance(shard, str) else shard
        method = self.method
        method.filling.put(0, number, self.part, loaded_weight, method.cuts[number], method.parts[number].shape)


def _cut(layer: Any, number: int, whole: tuple[int, int], held: tuple[int, int]) -> Cut:
    """This worker's share of a matrix: a range of rows or of inputs, told from the size that vLLM gives it."""
    if isinstance(layer, ParallelLMHead):  # rows are padded behind the last word
        words = layer.shard_indices
        return Cut((words.org_vocab_start_index, words.org_vocab_end_index), (0, whole[1]))
    rank = layer.tp_rank
    row = rank // layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and number else rank
    first, begin = (0 if held[i] == whole[i] else r * held[i] for i, r in enumerate((row, rank)))
    return Cut((first, first + held[0]), (begin, begin + held[1]))
