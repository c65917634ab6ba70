"""An OpenAI-compatible server: vLLM where it is installed, else a small one on the native runtime (docs/serving.md)."""

from mopeq.serve.launch import serve, vllm_command
from mopeq.serve.limits import Limits

__all__ = ["Limits", "serve", "vllm_command"]
