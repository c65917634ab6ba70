"""A tiny dense Llama, and what other quantizers make of it: compressed-tensors and GGUF, both at 8 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tiny import save_tokenizer

HEADS, LAYERS = 4, 2
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GGUF_OUTSIDE = {"lm_head": "output", "model.embed_tokens": "token_embd", "model.norm": "output_norm"}


def save_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, max_position_embeddings=512, pad_token_id=256, bos_token_id=257, eos_token_id=258,
    )  # fmt: skip
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def _companions(base: Path, folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)


def save_compressed(base: Path, folder: Path) -> Path:
    """Packed by compressed-tensors' own compressor: 8 bits, one scale a row."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    config = QuantizationConfig(config_groups={"all": scheme}, format="pack-quantized", ignore=["lm_head"])
    model = LlamaForCausalLM.from_pretrained(base)
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.detach().abs().amax(1, keepdim=True) / 127
    ModelCompressor(quantization_config=config).compress_model(model)
    folder.mkdir()
    _companions(base, folder)
    save_file(
        {k: t.contiguous() for k, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    settings = json.loads((base / "config.json").read_text())
    settings["quantization_config"] = {**config.model_dump(mode="json"), "quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def save_gguf(base: Path, folder: Path) -> Path:
    """Q8_0, written by gguf's own writer; its rotary halves are interleaved."""
    import gguf

    folder.mkdir()
    _companions(base, folder)
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), "llama")
    for add, value in (
        ("block_count", LAYERS), ("context_length", 512), ("embedding_length", 64), ("feed_forward_length", 128),
        ("head_count", HEADS), ("head_count_kv", HEADS), ("layer_norm_rms_eps", 1e-6), ("vocab_size", 264),
        ("rope_freq_base", 10000.0), ("rope_dimension_count", 16),
    ):  # fmt: skip
        getattr(writer, f"add_{add}")(value)
    for key, tensor in load_file(base / "model.safetensors").items():
        name, values = key.removesuffix(".weight"), tensor.numpy()
        if name in GGUF_OUTSIDE:
            target = GGUF_OUTSIDE[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            target = f"blk.{layer}.{GGUF_NAMES[rest]}"
            values = _interleaved(values) if rest.endswith(("q_proj", "k_proj")) else values
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{target}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{target}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def _interleaved(values: NDArray[np.float32]) -> NDArray[np.float32]:
    split = values.reshape(HEADS, 2, len(values) // HEADS // 2, -1)
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))


def save_awq(base: Path, folder: Path) -> Path:
    """Packed by AWQ's definition (gemm): 4 bits, groups of 32, eight columns a word in the order 0 2 4 6 1 3 5 7."""
    folder.mkdir()
    _companions(base, folder)
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = tensor
            continue
        weight = tensor.T.reshape(-1, 32, len(tensor))  # groups, inputs, out
        low, high = weight.amin(1), weight.amax(1)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
        codes = (weight / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15).flatten(0, 1)
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.qweight": _awq(codes), f"{stem}.qzeros": _awq(zeros), f"{stem}.scales": scales}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _awq(numbers: torch.Tensor) -> torch.Tensor:
    """(rows, out) numbers of 4 bits to int32 (rows, out / 8)."""
    eight = numbers.long().reshape(len(numbers), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    words = (eight << torch.arange(0, 32, 4)).sum(-1)
    return (words - ((words >> 31) << 32)).int()
