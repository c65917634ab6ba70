"""GGUF: one file for llama.cpp, with a block type for each of a layer's three stacks of experts.

Tensor names are those of the gguf package's own table. The types are those that hold the codes exactly
(gguf_blocks.py); where no type does, and for rows that are no multiple of 32, a stack or matrix is stored as floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopeq.errors import InputError
from mopeq.export.fields import Field, common
from mopeq.export.folder import PackedFolder
from mopeq.export.gguf_blocks import BLOCK, WIDTHS, Block, blocks
from mopeq.export.gguf_words import add_tokenizer
from mopeq.load import model_config
from mopeq.precision import GROUPS, MATRICES, Precision
from mopeq.qtensor import dequantize

__all__ = ["ARCHITECTURES", "plan", "types", "write"]

ARCHITECTURES = {"olmoe": "olmoe", "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
                 "deepseek_v2": "deepseek2"}  # fmt: skip
"""llama.cpp's name of each model type that can be written."""
NORMALIZED = {"olmoe": False, "mixtral": True, "qwen2_moe": False, "qwen3_moe": True}
"""Whether llama.cpp divides routing weights by their sum, which no entry of the file can change."""
FLOATS = {"bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16), "float32": ("F32", torch.float32)}


def plan(folder: PackedFolder, dtype: str) -> dict[str, Block | Field]:
    """:func:`types`, for models that llama.cpp knows and computes alike; others are an :class:`InputError`."""
    _check(folder)
    return types(folder, dtype)


def types(folder: PackedFolder, dtype: str) -> dict[str, Block | Field]:
    """``{base name: block type}`` of every packed matrix; floats of ``dtype`` where no type holds it exactly."""
    floats = Field(32 if dtype == "float32" else 16)

    def kind(precisions: set[Precision], inputs: int) -> Block | Field:
        field = common(precisions, WIDTHS)
        return floats if field is None or field.bits == 16 or inputs % BLOCK else Block(field.bits)

    made: dict[str, Block | Field] = {}
    for layer, places in folder.manifest.experts.items():
        for group in GROUPS:
            row = folder.manifest.precisions.experts[group][layer]
            inputs = folder.manifest.inventory.layers[layer].matrices(group)[0][1]
            bases = [places.base(expert, matrix) for matrix in MATRICES[group] for expert in range(len(row))]
            made |= dict.fromkeys(bases, kind(set(row), inputs))
    for linear in folder.manifest.linears.values():
        if linear.precision.bits != 16:
            made[linear.tensors] = kind({linear.precision}, linear.shape[1])
    return made


def _check(folder: PackedFolder) -> None:
    """Raise :class:`InputError` where llama.cpp has no such model, or its package is not there."""
    if find_spec("gguf") is None:
        raise InputError("the gguf package is not installed; install mopeq[export], or gguf itself")
    model = folder.manifest.inventory
    if model.model_type not in ARCHITECTURES:
        raise InputError(f"no GGUF of {model.model_type} models; mopeq writes {', '.join(ARCHITECTURES)}; "
                         f"use --format dequantized and llama.cpp's own converter")  # fmt: skip
    config = model_config(folder.path)
    kind = model.model_type
    rope = str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))
    first, usual = min(model.layers), NORMALIZED.get(kind)
    dense = set(range(config.num_hidden_layers)) - set(model.layers)
    odd = {
        "norm_topk_prob": usual is not None and getattr(config, "norm_topk_prob", usual) != usual,
        "clip_qkv": getattr(config, "clip_qkv", None) is not None,
        "layer_types": set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"},
        "sliding_window": kind == "mixtral" and getattr(config, "sliding_window", None) is not None,
        "rope_parameters": rope not in ("default", "yarn", "linear"),
        "topk_method": getattr(config, "topk_method", None) not in (None, "greedy"),
        "MoE layers": bool(dense) if kind != "deepseek_v2" else dense != set(range(first)),
        "hidden_act": getattr(config, "hidden_act", "silu") != "silu",
    }
    wrong = [f"{name} = {getattr(config, name, sorted(model.layers))}" for name, bad in odd.items() if bad]
    if wrong:
        raise InputError(f"this {kind} has {', '.join(wrong)}, which llama.cpp does not compute; run it with mopeq")


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: its name, GGUF type, shape in elements, and what makes its bytes or floats."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write(folder: PackedFolder, stored: Mapping[str, Any], dtype: str, path: Path) -> Iterator[str]:
    """Write the file, tensor by tensor; yields their names."""
    import gguf

    config = model_config(folder.path)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[folder.manifest.inventory.model_type])
    entries = _entries(folder, stored, dtype, config)
    _add_settings(writer, folder, config)
    rows = next(entry.shape[0] for entry in entries if entry.name == "token_embd.weight")
    add_tokenizer(writer, folder.path, rows)
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.kind]
        size = prod(gguf.quant_shape_to_byte_shape(entry.shape, kind))
        if entry.kind == "F32":
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=kind)
        else:
            bytes_ = gguf.quant_shape_to_byte_shape(entry.shape, kind)
            writer.add_tensor_info(entry.name, bytes_, np.dtype(np.uint8), size, raw_dtype=kind)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.make().contiguous().view(torch.uint8).numpy())
            yield entry.name


def _entries(folder: PackedFolder, stored: Mapping[str, Any], dtype: str, config: Any) -> list[_Entry]:
    import gguf

    manifest = folder.manifest
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[manifest.inventory.model_type].upper()]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)

    def named(key: str) -> str:
        found = names.get_name(key, (".weight", ".bias"))
        if found is None:
            raise InputError(f"tensor {key} has no name in llama.cpp's {architecture.name}; run this model with mopeq")
        return str(found)

    packed = {base: (shape, precision) for base, shape, precision in manifest.matrices()}

    def data(base: str) -> Tensor:
        matrix, kind = folder.matrix(base, *packed[base]), stored[base]
        rows = blocks(matrix, kind.bits) if isinstance(kind, Block) else dequantize(matrix, FLOATS[dtype][1])
        return _order(base, manifest.inventory.model_type, config)(rows)

    def type_of(base: str) -> str:
        return str(stored[base]) if isinstance(stored[base], Block) else FLOATS[dtype][0]

    def stack(bases: list[str]) -> Tensor:
        return torch.stack([data(base) for base in bases])

    made: list[_Entry] = []
    for layer, places in manifest.experts.items():
        count = manifest.inventory.layers[layer].experts
        for matrix in ("gate", "up", "down"):
            bases = [places.base(expert, matrix) for expert in range(count)]
            _, _, last = bases[0].rpartition(".")
            shape = (count, *packed[bases[0]][0])
            name = named(f"{places.tensors}.{last}.weight")
            made.append(_Entry(name, type_of(bases[0]), shape, partial(stack, bases)))
    for linear in manifest.linears.values():
        if linear.precision.bits != 16:
            base = linear.tensors
            made.append(_Entry(named(f"{base}.weight"), type_of(base), linear.shape, partial(data, base)))
    return made + [_kept(folder, key, named(key), config) for key in folder.others()]


def _kept(folder: PackedFolder, key: str, name: str, config: Any) -> _Entry:
    """A tensor that is no packed matrix: vectors and routers in float32, matrices as they are stored."""
    shape = tuple(n for n in folder.shapes[key] if n != 1) or (1,)
    tensor = folder.tensor(key)
    kind = "F32" if len(shape) == 1 or "_inp" in name else {
        torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[tensor.dtype]  # fmt: skip

    def make() -> Tensor:
        found = _order(key, folder.manifest.inventory.model_type, config)(folder.tensor(key).reshape(shape))
        return found.float() if kind == "F32" else found

    return _Entry(name, kind, shape, make)


def _order(name: str, model_type: str, config: Any) -> Callable[[Tensor], Tensor]:
    """Queries and keys of Mixtral: llama.cpp rotates neighbours, transformers the halves of a head; rows alternate."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(last)
    if model_type != "mixtral" or heads is None:
        return lambda rows: rows
    return lambda rows: rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)


def _add_settings(writer: Any, folder: PackedFolder, config: Any) -> None:
    """The numbers of the architecture."""
    import gguf

    model = folder.manifest.inventory
    first = model.layers[min(model.layers)]
    writer.add_name(folder.path.resolve().name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_expert_count(first.experts)
    writer.add_expert_used_count(first.top_k)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(int(gguf.LlamaFileType.GUESSED))
    _add_rope(writer, config.rope_parameters or {}, gguf)
    if model.model_type == "deepseek_v2":
        rope, plain = config.qk_rope_head_dim, config.qk_nope_head_dim
        writer.add_leading_dense_block_count(min(model.layers))
        if config.q_lora_rank is not None:
            writer.add_q_lora_rank(config.q_lora_rank)
        writer.add_kv_lora_rank(config.kv_lora_rank)
        writer.add_key_length(plain + rope)
        writer.add_value_length(config.v_head_dim)
        writer.add_rope_dimension_count(rope)
        writer.add_expert_feed_forward_length(first.intermediate_size)
        writer.add_expert_shared_count(config.n_shared_experts or 0)
        writer.add_expert_weights_scale(float(config.routed_scaling_factor))
        writer.add_expert_weights_norm(bool(config.norm_topk_prob))
        return
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    if model.model_type in ("qwen2_moe", "qwen3_moe"):
        writer.add_expert_feed_forward_length(first.intermediate_size)
    if model.model_type == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _add_rope(writer: Any, rope: Mapping[str, Any], gguf: Any) -> None:
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        if rope.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(0.1 * float(rope["mscale_all_dim"]))
