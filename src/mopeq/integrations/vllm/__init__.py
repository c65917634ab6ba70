"""vLLM serves packed checkpoints: its plugin (entry point group ``vllm.general_plugins``), written for vLLM 0.32.

The weights stay packed in memory, in the same flat buffers and with the same kernels as under transformers. Tensor and
expert parallelism cut packed matrices where that can be done, and refuse with a sentence where it cannot.
"""

__all__ = ["register"]


def register() -> None:
    """Make vLLM know ``quant_method`` mopeq. vLLM calls it in each of its processes, in some more than once."""
    from vllm import ModelRegistry

    from mopeq.integrations.vllm import config  # noqa: F401  (its decorator registers)

    ModelRegistry.register_model("DeepseekVLV2ForCausalLM", "mopeq.integrations.vllm.deepseek_vl2:DeepseekVL2")
    for name in ("OLMoForCausalLM", "MolmoEForConditionalGeneration"):  # as published, as saved by transformers
        ModelRegistry.register_model(name, "mopeq.integrations.vllm.molmoe:MolmoE")
