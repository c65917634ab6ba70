"""Write a checkpoint of random weights with the names, shapes and types of a published model.

Sizes are the published ones, so memory, disk and time are those of the real model; quality means nothing. One tensor is
in memory at a time.

    python scripts/random_checkpoint.py olmoe-1b-7b build/olmoe
    python scripts/random_checkpoint.py qwen3-30b-a3b build/qwen3 --layers 4

``--layers`` writes the first layers only, and says so in ``config.json``. The tokenizer is that of the bundled model,
whose ids every vocabulary here has.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROPE = {"rope_type": "default"}
CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 50304, "max_position_embeddings": 4096, "hidden_act": "silu",
        "norm_topk_prob": False, "tie_word_embeddings": False, "attention_bias": False, "rms_norm_eps": 1e-5,
        "rope_parameters": {**ROPE, "rope_theta": 10000.0}, "eos_token_id": 50279, "pad_token_id": 1,
        "dtype": "bfloat16",
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_experts": 128,
        "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151936, "max_position_embeddings": 40960, "hidden_act": "silu", "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False, "attention_bias": False,
        "rms_norm_eps": 1e-6, "rope_parameters": {**ROPE, "rope_theta": 1000000.0}, "eos_token_id": 151645,
        "bos_token_id": 151643, "dtype": "bfloat16",
    },
}  # fmt: skip
"""``config.json`` of each model, in the names of transformers 5."""
SHARD = 4_000_000_000
"""Bytes of a file, as the published ones have."""

Shapes = dict[str, tuple[int, ...]]


def layer_shapes(config: dict[str, Any], number: int) -> Shapes:
    """Tensors of one decoder layer, in the order of the published files."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim", hidden // heads)
    query, key = heads * size, config["num_key_value_heads"] * size
    norms = (query, key) if config["model_type"] == "olmoe" else (size, size)  # OLMoE norms all heads together
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    found: Shapes = {"input_layernorm.weight": (hidden,)}
    for expert in range(config["num_experts"]):
        at = f"mlp.experts.{expert}."
        found |= {f"{at}gate_proj.weight": (width, hidden), f"{at}up_proj.weight": (width, hidden)}
        found |= {f"{at}down_proj.weight": (hidden, width)}
    found |= {"mlp.gate.weight": (config["num_experts"], hidden), "post_attention_layernorm.weight": (hidden,)}
    found |= {"self_attn.q_proj.weight": (query, hidden), "self_attn.k_proj.weight": (key, hidden)}
    found |= {"self_attn.v_proj.weight": (key, hidden), "self_attn.o_proj.weight": (hidden, query)}
    found |= {"self_attn.q_norm.weight": norms[:1], "self_attn.k_norm.weight": norms[1:]}
    return {f"model.layers.{number}.{name}": shape for name, shape in found.items()}


def shapes(config: dict[str, Any]) -> Shapes:
    """All tensors of a model."""
    outside = (config["vocab_size"], config["hidden_size"])
    found: Shapes = {"model.embed_tokens.weight": outside}
    for number in range(config["num_hidden_layers"]):
        found |= layer_shapes(config, number)
    return found | {"model.norm.weight": outside[1:], "lm_head.weight": outside}


def shards(tensors: Shapes, most: int) -> Iterator[Shapes]:
    """Tensors in runs of at most ``most`` bytes."""
    run: Shapes = {}
    total = 0
    for name, shape in tensors.items():
        nbytes = 2 * torch.Size(shape).numel()
        if run and total + nbytes > most:
            yield run
            run, total = {}, 0
        run[name] = shape
        total += nbytes
    yield run


def write_shard(path: Path, tensors: Shapes, draw: torch.Generator) -> int:
    """A safetensors file of random bfloat16 tensors, norms of ones; returns the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            tensor = torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) > 1:
                tensor.normal_(0, shape[1] ** -0.5, generator=draw)
            file.write(tensor.view(torch.uint8).numpy().data)
    return end


def write(name: str, out: Path, layers: int | None, seed: int, tokenizer: Path, shard_bytes: int = SHARD) -> int:
    """The whole folder; returns the bytes of its tensors."""
    config = {**CONFIGS[name]}
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    out.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    runs = list(shards(shapes(config), shard_bytes))
    where: dict[str, str] = {}
    total = 0
    for number, run in enumerate(runs, 1):
        file = f"model-{number:05}-of-{len(runs):05}.safetensors"
        total += write_shard(out / file, run, draw)
        where |= dict.fromkeys(run, file)
        print(f"{file}: {total / 1e9:.2f} GB so far", flush=True)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tokenizer / file).is_file():
            shutil.copy(tokenizer / file, out / file)
    return total


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--layers", type=int, help="write the first layers only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="folder with a tokenizer (default: the bundled model's)")
    asked = parser.parse_args()
    if asked.tokenizer is None:
        from mopeq.data.samples import bundled_model

        asked.tokenizer = bundled_model()
    started = time.perf_counter()
    total = write(asked.model, asked.out, asked.layers, asked.seed, asked.tokenizer)
    print(f"wrote {asked.out}: {total / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
