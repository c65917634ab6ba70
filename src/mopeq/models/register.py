"""Importing this module tells transformers about the models here: configurations, classes, tensors' names."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from mopeq.models.configuration import DeepseekVL2Config, MolmoEConfig
from mopeq.models.conversion import CONVERSIONS
from mopeq.models.deepseek_vl2 import DeepseekVL2ForConditionalGeneration
from mopeq.models.molmoe import MolmoEForConditionalGeneration

_MODELS = (
    (DeepseekVL2Config, DeepseekVL2ForConditionalGeneration),
    (MolmoEConfig, MolmoEForConditionalGeneration),
)
for _config, _model in _MODELS:
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForImageTextToText.register(_config, _model, exist_ok=True)
for _name, _make in CONVERSIONS.items():
    register_checkpoint_conversion_mapping(_name, _make(), overwrite=True)
