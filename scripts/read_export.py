"""Logits of an exported model from a stock runtime, run by that runtime's own Python (tests/export/test_consumers.py).

Usage: read_export.py llama.cpp|words|auto-round|vllm|transformers PATH TOKENS.json OUT.json
TOKENS is a list of token numbers; OUT gets one row of logits for every token (of vLLM: log-probabilities of the last).
With ``words`` TOKENS is a text, and OUT gets the numbers of its tokens, as llama.cpp reads it.
"""

import json
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
    """VLLM on a CPU, in bfloat16."""
    from vllm import LLM, SamplingParams, TokensPrompt

    model = LLM(path, dtype="bfloat16", max_model_len=64, enforce_eager=True, max_logprobs=-1, seed=0)
    made = model.generate(
        [TokensPrompt(prompt_token_ids=tokens)], SamplingParams(max_tokens=1, temperature=0, logprobs=-1)
    )
    found = made[0].outputs[0].logprobs[0]
    return [[found[token].logprob for token in range(len(found))]]


READERS: dict[str, Callable[[str, Any], Any]] = {
    "llama.cpp": llama_cpp, "words": words, "auto-round": transformers, "transformers": transformers, "vllm": vllm,
}  # fmt: skip

if __name__ == "__main__":
    kind, path, tokens, out = sys.argv[1:]
    Path(out).write_text(json.dumps(READERS[kind](path, json.loads(Path(tokens).read_text()))))
