"""Inputs and outputs of the published DeepSeek-VL2 and MolmoE code (fixtures/README.md), as batches for models."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

FOLDER = Path(__file__).parent / "fixtures"
DEEPSEEK = ("deepseek_vl2_tiny_arch", "deepseek_vl2_mla_arch", "deepseek_vl2_mla_sigmoid_arch")
MOLMOE = "molmoe_arch"
NAMES = (*DEEPSEEK, MOLMOE)
PROCESSORS = FOLDER / "processors"
FILES = {DEEPSEEK[0]: "deepseek_vl2", MOLMOE: "molmoe"}
"""Where a fixture's processor is."""
SIDE = 72
"""Pixels of a DeepSeek tile here."""


@dataclass(frozen=True)
class Case:
    """``inputs`` of the model, all of one sequence; ``routers`` by layer, (tokens, k) sorted choices."""

    inputs: Mapping[str, Tensor]
    logits: Tensor
    greedy: Tensor
    steps: Tensor
    routers: Mapping[int, Tensor]


@cache
def loaded(name: str, attention: str = "sdpa") -> Any:
    """The fixture's model, shared: leave it as it is."""
    return fresh(name, attn_implementation=attention)


def folder_of(name: str, tmp_path: Path) -> Path:
    """A whole model folder: the fixture's model and the processor's files."""
    folder = tmp_path / name
    shutil.copytree(FOLDER / name, folder)
    shutil.copytree(PROCESSORS / FILES[name], folder, dirs_exist_ok=True)
    return folder


def fresh(name: str, **options: Any) -> Any:
    """The fixture's model."""
    return AutoModelForImageTextToText.from_pretrained(FOLDER / name, **options).eval()


@cache
def cases(name: str) -> dict[str, Case]:
    """All cases of a fixture by name."""
    stored: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(FOLDER / name / "cases.safetensors").items():
        case, _, part = key.partition(".")
        stored.setdefault(case, {})[part] = value
    return {case: _case(name, case, parts) for case, parts in stored.items()}


def _case(name: str, case: str, parts: dict[str, Tensor]) -> Case:
    inputs = {"input_ids": parts["input_ids"].long()}
    if name == MOLMOE:
        inputs |= {k: parts[k].long() if k == "image_input_idx" else parts[k] for k in MOLMOE_IMAGES if k in parts}
    else:
        inputs["images_seq_mask"] = parts["images_seq_mask"].bool()
        inputs["images_spatial_crop"] = parts["images_spatial_crop"].long()
        inputs["images"] = _tiles().get(case, torch.zeros(1, 1, 3, SIDE, SIDE))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    routers = {int(k.split(".")[1]): v.long() for k, v in parts.items() if k.startswith("router.")}
    return Case(inputs, parts["logits"], parts["greedy_ids"].long(), parts["greedy_step_logits"], routers)


MOLMOE_IMAGES = ("images", "image_masks", "image_input_idx")


@cache
def _tiles() -> dict[str, Tensor]:
    stored = load_file(FOLDER / "deepseek_vl2_tiles.safetensors")
    return {case: (tiles.float() / 255 - 0.5) / 0.5 for case, tiles in stored.items()}


def batch(name: str, *names: str, side: str = "left") -> tuple[dict[str, Tensor], list[Case]]:
    """Several cases in one batch, padded as the published processors do, and the cases."""
    members = [cases(name)[case] for case in names]
    length = max(case.inputs["input_ids"].shape[1] for case in members)
    fill = -1 if name == MOLMOE else 0
    joined: dict[str, list[Tensor]] = {}
    keys = {key for case in members for key in case.inputs}
    for case in members:
        short = length - case.inputs["input_ids"].shape[1]
        pad = (short, 0) if side == "left" else (0, short)
        for key in keys:
            value = case.inputs.get(key)
            like = next(c.inputs[key] for c in members if key in c.inputs)
            most = max(c.inputs[key].shape[1] for c in members if key in c.inputs)
            if value is None:
                value = torch.full((1, most, *like.shape[2:]), fill, dtype=like.dtype)
            if key in ("input_ids", "attention_mask", "images_seq_mask"):
                value = torch.nn.functional.pad(value, pad, value=fill if key == "input_ids" else 0)
            else:
                if key == "image_input_idx" and side == "left":
                    value = torch.where(value >= 0, value + short, value)
                more = torch.full((1, most - value.shape[1], *value.shape[2:]), fill, dtype=value.dtype)
                value = torch.cat([value, more], dim=1)
            joined.setdefault(key, []).append(value)
    return {key: torch.cat(values) for key, values in joined.items()}, members
