"""Logits of an exported model from a stock runtime, run by that runtime's own Python (tests/export/test_consumers.py).

Usage: read_export.py llama.cpp|words|auto-round|vllm|transformers PATH TOKENS.json OUT.json
TOKENS is a list of token numbers; OUT gets one row of logits for every token (of vLLM: log-probabilities of the last).
With ``words`` TOKENS is a text, and OUT gets the numbers of its tokens, as llama.cpp reads it.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Logits = list[list[float]]


def llama_cpp(path: str, tokens: list[int]) -> Logits:
    """llama.cpp, its cache in float32."""
    from llama_cpp import Llama

    model = Llama(path, n_ctx=len(tokens), logits_all=True, n_threads=1, type_k=0, type_v=0, verbose=False)
    model.eval(tokens)
    return [[float(v) for v in row] for row in model.scores[: len(tokens)]]


def words(path: str, text: str) -> list[int]:
    """llama.cpp's tokenizer."""
    from llama_cpp import Llama

    found: list[int] = Llama(path, vocab_only=True, verbose=False).tokenize(text.encode(), add_bos=False, special=True)
    return found


def transformers(path: str, tokens: list[int], dtype: str = "float32") -> Logits:
    """transformers, with whatever package the folder asks for."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    with torch.no_grad():
        found: Logits = model(input_ids=torch.tensor([tokens])).logits[0].float().tolist()
    return found


def vllm(path: str, tokens: list[int]) -> Logits:
    """Log-probabilities of the token after the last, by vLLM on a CPU."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
                   "VLLM_PLUGINS": "", "OMP_NUM_THREADS": "1"}  # fmt: skip
    from vllm import LLM, SamplingParams

    packed = "quantization_config" in json.loads((Path(path) / "config.json").read_text())
    dtype = "bfloat16" if packed else "float32"  # its CPU kernels for integers know no float32
    model = LLM(path, dtype=dtype, max_model_len=128, enforce_eager=True, max_num_seqs=1, max_logprobs=-1)
    try:
        asked = SamplingParams(max_tokens=1, temperature=0, logprobs=-1)
        (made,) = model.generate([{"prompt_token_ids": tokens}], asked, use_tqdm=False)
        found = made.outputs[0].logprobs[0]
        return [[found[token].logprob for token in sorted(found)]]
    finally:
        model.llm_engine.engine_core.shutdown()


READERS: dict[str, Callable[[str, Any], Any]] = {
    "llama.cpp": llama_cpp, "words": words, "auto-round": transformers, "transformers": transformers, "vllm": vllm,
}  # fmt: skip

if __name__ == "__main__":
    kind, path, tokens, out = sys.argv[1:]
    Path(out).write_text(json.dumps(READERS[kind](path, json.loads(Path(tokens).read_text()))))
