"""Exports read by the runtimes they are for, each in an environment of its own: ``make test-export``.

``MOPEQ_LLAMA_CPP``, ``MOPEQ_AUTO_ROUND`` and ``MOPEQ_VLLM`` name their Pythons; without, the tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import packed, with_merges, with_pieces
from torch import Tensor
from torch.nn import functional

from mopeq import load
from mopeq.export import plan_export, write_export
from mopeq.load import load_tokenizer
from mopeq.precision import DEFAULT_REST, Precision

Make = Callable[..., Path]
SCRIPT = Path(__file__).parents[2] / "scripts" / "read_export.py"
PYTHONS = {
    "llama.cpp": "MOPEQ_LLAMA_CPP",
    "words": "MOPEQ_LLAMA_CPP",
    "auto-round": "MOPEQ_AUTO_ROUND",
    "vllm": "MOPEQ_VLLM",
}
TOKENS = [(7 * i * i + 3 * i) % 250 for i in range(48)]
MODELS: dict[str, dict[str, Any]] = {
    "olmoe": {},
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": [], "num_hidden_layers": 2},
    "qwen3_moe": {"norm_topk_prob": True},
    "deepseek_v2": {"q_lora_rank": 32},
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
ROTATED = {
    "qwen3_moe": MODELS["qwen3_moe"] | {"rope_parameters": YARN},
    "olmoe": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
    "deepseek_v2": MODELS["deepseek_v2"] | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
}
"""What llama.cpp can compute of each family."""


def runs(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(PYTHONS[kind] not in os.environ, reason=f"{PYTHONS[kind]} is not set: make test-export")


def read(kind: str, path: Path, tmp_path: Path, given: object = TOKENS) -> Tensor:
    """Logits (tokens, vocabulary) of the runtime; of ``words``, tokens."""
    asked, out = tmp_path / "tokens.json", tmp_path / "logits.json"
    asked.write_text(json.dumps(given))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [os.environ[PYTHONS[kind]], str(SCRIPT), kind, str(path), str(asked), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return torch.tensor(json.loads(out.read_text()))


def expected(folder: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = load(folder, torch.float32)(input_ids=torch.tensor([TOKENS])).logits[0].float()
    return found


def away(found: Tensor, wanted: Tensor) -> float:
    """Median over tokens of the relative distance; rounding may send a single token to another expert."""
    assert found.shape == wanted.shape
    assert bool(found.isfinite().all())
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


@runs("llama.cpp")
@pytest.mark.parametrize(("family", "changes"), [*MODELS.items(), *ROTATED.items()])
def test_llama_cpp_computes_the_same_model(
    family: str, changes: dict[str, Any], tiny_model: Make, tmp_path: Path
) -> None:
    """8-bit codes with zero points fit no block type: all is float32, and only names and settings can be wrong."""
    rest = dict.fromkeys(DEFAULT_REST, Precision(8, 32))
    folder = with_merges(packed(tiny_model, tmp_path, family, "8g32", rest=rest, **changes))
    write_export(plan_export(folder, "gguf", dtype="float32"), tmp_path / "out.gguf")
    assert away(read("llama.cpp", tmp_path / "out.gguf", tmp_path), expected(folder)) < 1e-4


@runs("llama.cpp")
@pytest.mark.parametrize("family", MODELS)
def test_llama_cpp_reads_the_blocks(family: str, tiny_model: Make, tmp_path: Path) -> None:
    """llama.cpp rounds the inputs of quantized matrices to 8 bits, which its own float32 weights do not."""
    folder = with_merges(packed(tiny_model, tmp_path, family, "3g32", "2g64", "4g-1s", **MODELS[family]))
    write_export(plan_export(folder, "gguf"), tmp_path / "out.gguf")
    assert away(read("llama.cpp", tmp_path / "out.gguf", tmp_path), expected(folder)) < 0.03


@runs("llama.cpp")
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_llama_cpp_reads_text_alike(kind: str, tiny_model: Make, tmp_path: Path) -> None:
    folder = packed(tiny_model, tmp_path, "mixtral", "3g32", vocab_size=320)
    folder = with_merges(folder) if kind == "bytes" else with_pieces(folder)
    write_export(plan_export(folder, "gguf"), tmp_path / "out.gguf")
    text = "the other thing: the\n hat, 12 été the </s>that"
    tokens = load_tokenizer(folder)(text, add_special_tokens=False)["input_ids"]
    assert read("words", tmp_path / "out.gguf", tmp_path, text).tolist() == tokens
    assert len(tokens) < len(text)


@runs("auto-round")
@pytest.mark.parametrize("family", MODELS)
def test_auto_round_reads_mixed_layers(family: str, tiny_model: Make, tmp_path: Path) -> None:
    folder = packed(tiny_model, tmp_path, family, "2g32", "3g64s", "4g-1", "5g32", "6g64", "8g32", "8g32s")
    write_export(plan_export(folder, "auto-round"), tmp_path / "out")
    assert away(read("auto-round", tmp_path / "out", tmp_path), expected(folder)) < 5e-3  # it computes in float16


@runs("vllm")
@pytest.mark.parametrize(
    ("kind", "dtype", "row", "rest", "bound"),
    [
        ("dequantized", "float32", ("3g32", "4g32s"), Precision(8, 32, True), 1e-4),
        # vLLM's CPU kernels know 4-bit linears; 4-bit experts want a processor with AMX
        ("compressed-tensors", "bfloat16", ("16",), Precision(4, 32, True), 5e-3),
    ],
)
def test_vllm_reads(
    kind: str, dtype: str, row: tuple[str, ...], rest: Precision, bound: float, tiny_model: Make, tmp_path: Path
) -> None:
    wide = dict.fromkeys(DEFAULT_REST, rest)  # its attention wants heads of 32
    folder = packed(tiny_model, tmp_path, "olmoe", *row, rest=wide, hidden_size=128)
    write_export(plan_export(folder, kind, dtype=dtype), tmp_path / "out")
    wanted = functional.log_softmax(expected(folder)[-1:], -1)
    assert away(read("vllm", tmp_path / "out", tmp_path), wanted) < bound
