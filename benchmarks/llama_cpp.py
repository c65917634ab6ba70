"""mopeq beside llama.cpp on the CPU: decode and prefill of an OLMoE-1B-7B of random weights.

    python benchmarks/llama_cpp.py --tools llama.cpp/build/bin --threads 2 --scratch models

``--tools`` is where llama-bench and llama-quantize are, built from the sources that come with llama-cpp-python
(``cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON``, targets llama-bench and llama-quantize). A GGUF file of
random bfloat16 weights is quantized by llama-quantize to every type; mopeq's models, groups of 128, have random codes,
for speed does not depend on them: ``2,3-4`` has experts of 2 and 3 bits, attention and head of 4. A round takes, one
after the other, every type of llama.cpp and every model of mopeq, each with a plain read of as many bytes; medians of
rounds are compared. ``one digit`` is mopeq with `MOPEQ_COARSE=4`: activations as int8, as llama.cpp has them.
``--scratch`` keeps the models for another run; ``--layers`` makes all smaller. Rounds that the results file has, of
the same sizes, stay there, so that a long comparison can be made in pieces.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import torch

import mopeq
from common import arguments, store, table
from cpu_runtime import NEW, active_bytes, decoded, read, timed
from mopeq.kernels import cpu
from random_packed import OLMOE_1B_7B, write_random

TYPES = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q8_0")
MODELS = ("2-4", "2,3-3", "2,3-4", "3-3", "3-4", "4-4", "8-8")
GROUP = 128
PROMPT = 512
STEP = 1 << 24


def write_gguf(
    path: Path, config: dict[str, Any], tokenizer: dict[str, Any] | None = None, *, quantized: bool = False
) -> None:
    """An OLMoE of random weights, bfloat16 or Q4_0; ``tokenizer`` is a tokenizer.json, None is no vocabulary."""
    hidden, inner, experts = (config[k] for k in ("hidden_size", "intermediate_size", "num_experts"))
    words = config["vocab_size"]
    shapes = {"token_embd": (words, hidden), "output_norm": (hidden,), "output": (words, hidden)}
    for layer in range(config["num_hidden_layers"]):
        norms = ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm")
        parts: dict[str, tuple[int, ...]] = dict.fromkeys(norms, (hidden,))
        parts |= {f"attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
        parts |= {"ffn_gate_inp": (experts, hidden), "ffn_gate_exps": (experts, inner, hidden),
                  "ffn_up_exps": (experts, inner, hidden), "ffn_down_exps": (experts, hidden, inner)}  # fmt: skip
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    made = gguf.GGUFWriter(path, "olmoe")
    made.add_block_count(config["num_hidden_layers"])
    made.add_context_length(4096)
    made.add_embedding_length(hidden)
    made.add_feed_forward_length(inner)
    made.add_head_count(config["num_attention_heads"])
    made.add_head_count_kv(config["num_key_value_heads"])
    made.add_layer_norm_rms_eps(1e-5)
    made.add_rope_freq_base(10000.0)
    made.add_expert_count(experts)
    made.add_expert_used_count(config["num_experts_per_tok"])
    made.add_vocab_size(words)
    made.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0 if quantized else gguf.LlamaFileType.MOSTLY_BF16)
    kind = gguf.GGMLQuantizationType.Q4_0 if quantized else gguf.GGMLQuantizationType.BF16
    if tokenizer is None:
        made.add_tokenizer_model("no_vocab")
    else:
        known = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
        special = {token["content"] for token in tokenizer["added_tokens"]}
        made.add_tokenizer_model("gpt2")
        made.add_tokenizer_pre("gpt-2")
        made.add_token_list(known)
        made.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in known])
        made.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
        made.add_eos_token_id(config["eos_token_id"])
        made.add_add_bos_token(False)
    made.add_quantization_version(gguf.GGML_QUANT_VERSION)
    wide = {name: len(shape) == 1 or name.endswith("gate_inp") for name, shape in shapes.items()}
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        if wide[name]:
            made.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float32), 4 * count)
        else:
            size = shape[-1] // 32 * 18 if quantized else 2 * shape[-1]
            made.add_tensor_info(f"{name}.weight", (*shape[:-1], size), np.dtype(np.uint8), count // shape[-1] * size,
                                 raw_dtype=kind)  # fmt: skip
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_ti_data_to_file()
    draw = np.random.default_rng(0)
    for name, shape in shapes.items():
        if len(shape) == 1:
            made.write_tensor_data(np.ones(shape, np.float32))
        elif wide[name]:
            made.write_tensor_data(draw.standard_normal(shape, dtype=np.float32) / 50)
        else:
            made.write_tensor_data(_four(draw, shape) if quantized else _brain(draw, shape))
    made.close()


def _brain(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal bfloat16 numbers of deviation 1/50, as bytes."""
    flat = np.empty(int(np.prod(shape)), np.uint16)
    for first in range(0, len(flat), STEP):
        wide = draw.standard_normal(min(STEP, len(flat) - first), dtype=np.float32) / 50
        flat[first : first + STEP] = wide.view(np.uint32) >> 16
    return flat.reshape(shape).view(np.uint8)


def _four(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random Q4_0 blocks of 32, the scales 1/200: numbers of deviation about 1/43, as bytes."""
    blocks = draw.integers(0, 256, (*shape[:-1], shape[-1] // 32, 18), np.uint8)
    blocks[..., :2] = np.frombuffer(np.float16(1 / 200).tobytes(), np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def quantized(tools: Path, scratch: Path, config: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Path]:
    """A GGUF file of each type, made where it is not there yet."""
    files = {kind: scratch / f"olmoe-{config['num_hidden_layers']}-{kind}.gguf" for kind in kinds}
    original = scratch / f"olmoe-{config['num_hidden_layers']}.gguf"
    for kind, file in files.items():
        if not file.exists():
            if not original.exists():
                write_gguf(original, config)
            partial = file.with_suffix(".partial")
            subprocess.run([tools / "llama-quantize", original, partial, kind, "2"], check=True, capture_output=True)
            partial.rename(file)
    original.unlink(missing_ok=True)
    return files


def token_bytes(file: Path, config: dict[str, Any]) -> int:
    """Bytes of weights that a token reads, of the embedding one row."""
    share = config["num_experts_per_tok"] / config["num_experts"]
    sizes = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(file).tensors if not t.name.startswith("token_embd")}
    return int(sum(size * (share if "_exps" in name else 1) for name, size in sizes.items()))


def bench(tools: Path, file: Path, threads: int) -> dict[str, float]:
    """Tokens a second of one run of llama-bench."""
    words = [tools / "llama-bench", "-m", file, "-t", threads, "-p", PROMPT, "-n", NEW, "-r", 1, "-o", "json"]
    done = subprocess.run([*map(str, words)], check=True, capture_output=True, text=True)
    rows = json.loads(done.stdout)
    return {"decode" if row["n_gen"] else "prefill": row["avg_ts"] for row in rows}


def rates(model: Any, prompt: torch.Tensor) -> dict[str, float]:
    """Tokens a second of decoding and of reading the prompt, each warmed up as llama-bench does it."""
    for _ in range(2):
        whole = timed(lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1))[0]
    for _ in range(2):
        one_token = decoded(model, prompt[:, :64], native=True)[0]
    return {"decode": 1 / one_token, "prefill": PROMPT / whole}


def main() -> None:
    parser = arguments(__doc__ or "", "llama_cpp")
    parser.add_argument("--tools", type=Path, required=True, help="folder of llama-bench and llama-quantize")
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="bits of experts - bits of the rest")
    parser.add_argument("--layers", type=int, default=OLMOE_1B_7B["num_hidden_layers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder for files (default: the system's, and deleted)")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    config = {**OLMOE_1B_7B, "num_hidden_layers": asked.layers}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = asked.scratch or Path(temporary)
        files = quantized(asked.tools, scratch, config, tuple(asked.types))
        folders = {model: packed(scratch, config, model) for model in asked.models}
        found: dict[str, Any] = {"layers": asked.layers, "prompt": PROMPT, "group": GROUP}
        found["rounds"] = kept(asked.out, found)
        for _ in range(asked.rounds):
            rows = {f"llama.cpp {kind}": one_type(asked, file, config) for kind, file in files.items()}
            for model, folder in folders.items():
                rows |= one_model(model, folder)
            found["rounds"].append({"threads": asked.threads, "rows": rows})
            store(asked.out, found)
            cells = [[name, *(f"{row[key]:.1f}" if key in row else "" for key in ("decode", "prefill"))]
                     for name, row in rows.items()]  # fmt: skip
            head = [f"{asked.threads} threads", "decode, tokens/s", "prefill, tokens/s"]
            print(table(head, cells), flush=True)


def packed(scratch: Path, config: dict[str, Any], model: str) -> Path:
    """The folder of a model such as ``2,3-4``, made where it is not there yet."""
    folder = scratch / f"olmoe-{config['num_hidden_layers']}-{model}-g{GROUP}"
    if not folder.exists():
        experts, rest = model.split("-")
        write_random(folder, tuple(int(b) for b in experts.split(",")), int(rest), GROUP, config)
    return folder


def kept(file: Path, head: dict[str, Any]) -> list[Any]:
    """The rounds of a results file of the same sizes, if there is one."""
    results = json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else {}
    same = all(results.get(key) == value for key, value in head.items())
    return list(results["rounds"]) if same else []


def one_type(asked: Any, file: Path, config: dict[str, Any]) -> dict[str, float]:
    """Bytes of a token and of the file, and tokens a second, of a type of llama.cpp."""
    sizes = {"bytes": token_bytes(file, config), "file bytes": file.stat().st_size}
    return {**sizes, **bench(asked.tools, file, asked.threads)}


@torch.no_grad()
def one_model(name: str, folder: Path) -> dict[str, dict[str, float]]:
    """The same of a model of mopeq, of a plain read of as many bytes, and of mopeq with one digit."""
    prompt = torch.randint(1000, 50000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    model: Any = mopeq.load(folder)
    sizes = {"bytes": active_bytes(model), "file bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors"))}
    rows = {f"plain read {name}": {**sizes, "decode": 1 / read(model, active_bytes(model))[0]}}
    rows[f"mopeq {name}"] = {**sizes, **rates(model, prompt)}
    with one_digit():
        rows[f"mopeq {name}, one digit"] = {**sizes, **rates(model, prompt)}
    return rows


@contextmanager
def one_digit() -> Iterator[None]:
    """int8 activations for widths up to 4."""
    with mock.patch.dict(os.environ, MOPEQ_COARSE="4"):
        cpu._coarse.cache_clear()
        yield
    cpu._coarse.cache_clear()


if __name__ == "__main__":
    main()
