"""compressed-tensors, format ``pack-quantized``: symmetric integers of 4 or 8 bits, for vLLM and transformers.

The format knows zero points, transformers does not read them for fused experts, and vLLM not on every device; other
widths are packed differently by different versions of its library. So codes are stored without zero points in the
narrower of the two widths that holds them exactly (fields.py). vLLM takes one scheme for all matrices of a layer's
experts, transformers one for all experts of a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mopeq.errors import InputError
from mopeq.export.fields import Field, centred, common, regrouped
from mopeq.export.folder import PackedFolder
from mopeq.precision import GROUPS, Precision
from mopeq.qtensor import QTensor, pack_bits

__all__ = ["packed", "plan", "quantization_config"]

WIDTHS = (4, 8)
FORMAT = "pack-quantized"


def plan(folder: PackedFolder, uniform: str) -> dict[str, Field]:
    """``{base name: field}`` of every packed matrix; experts share one in a ``layer`` or in the ``model``.

    Matrices outside the experts that no field holds are dequantized (16 bits). Raises :class:`InputError` for experts.
    """
    manifest = folder.manifest
    maps = manifest.precisions.experts
    layers = {layer: {p for group in GROUPS for p in maps[group][layer]} for layer in manifest.experts}
    if uniform == "model":
        every = set().union(*layers.values())
        layers = dict.fromkeys(layers, every)
    chosen: dict[int, Field] = {}
    for layer, precisions in layers.items():
        field = common(precisions, WIDTHS)
        if field is None:
            raise InputError(_refusal(f"layer {layer}" if uniform == "layer" else "the model", precisions))
        chosen[layer] = field
    made: dict[str, Field] = {}
    for layer, places in manifest.experts.items():
        for expert in range(manifest.inventory.layers[layer].experts):
            made |= {places.base(expert, matrix): chosen[layer] for matrix in ("gate", "up", "down")}
    for linear in manifest.linears.values():
        if linear.precision.bits != 16:
            made[linear.tensors] = common([linear.precision], WIDTHS) or Field(16)
    return made


def _refusal(where: str, precisions: set[Precision]) -> str:
    wide = sorted(str(p) for p in precisions if common([p], WIDTHS) in (None, Field(16)))
    return (
        f"the experts of {where} are at {', '.join(map(str, sorted(precisions)))}; compressed-tensors holds all of "
        f"them as 4-bit or 8-bit integers, which {', '.join(wide)} cannot become without rounding; "
        f"leave {'it' if len(wide) == 1 else 'them'} out of the map, or use --format dequantized"
    )


def packed(matrix: QTensor, field: Field) -> dict[str, Tensor]:
    """``{suffix: tensor}``: ``weight_packed`` int32 (out, in * bits / 32), ``weight_scale``, ``weight_shape``.

    Stored is ``k + 2^(bits-1)``, the first value of a row in the lowest bits of its first word (pack_quantized of
    compressed-tensors).
    """
    integers, scales = centred(matrix)
    words = pack_bits((integers + (1 << (field.bits - 1))).to(torch.uint8), field.bits).view(torch.int32)
    return {
        "weight_packed": words,
        "weight_scale": regrouped(scales, matrix.shape[1], field.group_size),
        "weight_shape": torch.tensor(matrix.shape, dtype=torch.int64),
    }


def quantization_config(folder: PackedFolder, plan: Mapping[str, Field]) -> dict[str, Any]:
    """The block of ``config.json``: experts by patterns, the others by name, and what is not quantized."""
    manifest = folder.manifest
    experts: dict[Field, list[str]] = {}  # the first groups: transformers takes the first one that names experts
    rest: dict[Field, list[str]] = {}
    for places in manifest.experts.values():
        pattern = rf"re:.*{re.escape(places.tensors)}\.\d+\.({'|'.join(map(re.escape, places.names))})$"
        experts.setdefault(plan[places.base(0, "gate")], []).append(pattern)
    for linear in manifest.linears.values():
        if linear.precision.bits != 16:
            rest.setdefault(plan[linear.tensors], []).append(linear.tensors)
    ignored = [*experts.pop(Field(16), []), *rest.pop(Field(16), []), *folder.plain_modules()]
    groups = [*experts.items(), *rest.items()]
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _group(*entry) for i, entry in enumerate(groups)},
        "ignore": sorted(ignored),
    }


def _group(field: Field, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": field.bits, "type": "int", "symmetric": True, "dynamic": False}
    grouped = field.group_size != -1
    weights |= {"strategy": "group", "group_size": field.group_size} if grouped else {"strategy": "channel"}
    return {"targets": targets, "weights": weights, "format": FORMAT}
