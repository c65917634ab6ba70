"""Packing tiny models by rounding to nearest, and the dense model that a packed one must equal."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from mopeq.adapters import describe, inventory_of
from mopeq.checkpoint import PackedWriter, linear_precisions, packed_config, read_packed
from mopeq.precision import FULL, GROUPS, LEFT_OUT, MATRICES, Precision, PrecisionMap
from mopeq.qtensor import QTensor, dequantize, pack, pack_full
from mopeq.quantizers import rtn, rtn_mse
from mopeq.source import open_source, read_kept, read_matrix, read_tensor
from mopeq.spec import Inventory, WeightRef

KINDS = ((32, False), (64, True), (-1, False))
MIX = (FULL, FULL, *(Precision(bits, size, symmetric) for bits in (2, 3, 4, 5, 6, 8) for size, symmetric in KINDS))
REST = {"attention": Precision(8, 32, True), "dense_mlp": Precision(6, 64), "shared_experts": Precision(5, -1),
        "lm_head": Precision(8, 64, True)}  # fmt: skip


def mixed_map(model: Inventory, seed: int = 0) -> PrecisionMap:
    """Every unit at a random precision; the first experts of the first layer at 16 bits and symmetric ones."""
    draw = random.Random(seed)
    experts = {g: {k: tuple(draw.choice(MIX) for _ in range(n)) for k, n in model.experts.items()} for g in GROUPS}
    first = min(model.experts)
    for group in GROUPS:
        row = list(experts[group][first])
        row[:2] = [FULL, Precision(4, 32, True)] if group == "gate_up" else [Precision(3, 64, True), FULL]
        experts[group][first] = tuple(row)
    return PrecisionMap(experts, REST, {"method": "random", "seed": seed, "bulk": [1, 2, 3]})


def packed_matrix(weight: Tensor, precision: Precision) -> QTensor:
    if precision == FULL:
        return pack_full(weight)
    return pack((rtn_mse if precision.codebook else rtn)(weight.float()[None], precision)[0])


def pack_model(folder: Path, out: Path, precisions: PrecisionMap | None = None, **options: int) -> PrecisionMap:
    """Pack a saved model; the map is a mixed one unless given."""
    source = open_source(folder)
    spec = describe(source)
    model = inventory_of(source, spec)
    precisions = precisions or mixed_map(model)
    with PackedWriter(out, needed_bytes=model.total_bytes(precisions), **options) as writer:
        for expert in spec.experts():
            for group in GROUPS:
                precision = precisions.of(expert.id.layer, expert.id.expert, group)
                if precision == LEFT_OUT:
                    continue
                for matrix, ref in zip(MATRICES[group], expert.refs(group), strict=True):
                    writer.add(expert.names[matrix], packed_matrix(read_matrix(source, ref), precision))
        for ref, precision in linear_precisions(spec, precisions).items():
            weight = read_matrix(source, ref.weight)
            if precision == FULL:
                writer.add_tensor(f"{ref.name}.weight", weight.bfloat16())
            else:
                writer.add(ref.name, packed_matrix(weight, precision))
        for kept in spec.kept:
            writer.add_tensor(kept.key, read_kept(source, kept))
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            if (folder / file).exists():
                writer.copy_file(folder / file)
        written = writer.finish(
            packed_config(source.config, spec, precisions, model), {"precision.json": precisions.to_json()}
        )
    assert written <= model.total_bytes(precisions)
    return precisions


def open_tensors(packed: Path) -> dict[str, Tensor]:
    """All stored tensors of a folder, copied out of its files."""
    files = sorted(packed.glob("*.safetensors"))
    return {key: tensor.clone() for file in files for key, tensor in load_file(file).items()}


def dequantized(folder: Path, packed: Path, out: Path) -> Path:
    """The original model, in its own layout, with each packed weight in place of its own."""
    source = open_source(folder)
    spec = describe(source)
    weights = {key: read_tensor(source, key).clone() for key in source.shapes}
    linears = json.loads((packed / "config.json").read_text())["quantization_config"]["linears"]

    def place(ref: WeightRef, value: Tensor) -> None:
        slab = weights[ref.key] if ref.expert is None else weights[ref.key][ref.expert]
        matrix = slab.T if ref.transposed else slab
        (matrix if ref.rows is None else matrix[slice(*ref.rows)]).copy_(value)

    for expert in spec.experts():
        for matrix in ("gate", "up", "down"):
            place(getattr(expert, matrix), dequantize(read_packed(packed, expert.names[matrix])))
    for ref in spec.linears:
        if linears[ref.module]["precision"] == "16":
            place(ref.weight, read_matrix(source, ref.weight).bfloat16())
        else:
            place(ref.weight, dequantize(read_packed(packed, ref.name)))
    for kept in spec.kept:
        weights[kept.key].copy_(read_kept(source, kept))
    out.mkdir()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for file in folder.iterdir():
        if file.suffix in (".json", ".jinja") and "safetensors" not in file.name:
            shutil.copy(file, out)
    return out
