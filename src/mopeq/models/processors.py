"""Importing this module tells transformers' ``AutoProcessor`` about the processors here (autoload.py does it)."""

from __future__ import annotations

from transformers import AutoProcessor

from mopeq.models.configuration import DeepseekVL2Config, MolmoEConfig
from mopeq.models.processing_deepseek_vl2 import DeepseekVLV2Processor
from mopeq.models.processing_molmoe import MolmoProcessor

AutoProcessor.register(DeepseekVL2Config, DeepseekVLV2Processor, exist_ok=True)
AutoProcessor.register(MolmoEConfig, MolmoProcessor, exist_ok=True)
