"""A packed checkpoint without any model: two layers of experts, two linears, two other tensors, all from formulas.

``python tests/handmade.py`` writes it to tests/golden/packed, whose bytes are committed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.checkpoint import PackedWriter, packed_config
from mopeq.precision import FULL, GROUPS, MATRICES, Precision, PrecisionMap
from mopeq.qtensor import Codes, QTensor, pack, pack_full
from mopeq.spec import Expert, ExpertId, KeptRef, LinearRef, MoELayer, MoESpec, WeightRef

GOLDEN = Path(__file__).parent / "golden" / "packed"
HIDDEN, WIDTH, EXPERTS = 32, 64, 3


def spec() -> MoESpec:
    def layer(index: int) -> MoELayer:
        path = f"model.layers.{index}.block_sparse_moe.experts"

        def ref(e: int, name: str, *shape: int) -> WeightRef:
            return WeightRef(f"{path}.{e}.{name}.weight", (shape[0], shape[1]))

        experts = tuple(
            Expert(
                ExpertId(index, e),
                ref(e, "w1", WIDTH, HIDDEN),
                ref(e, "w3", WIDTH, HIDDEN),
                ref(e, "w2", HIDDEN, WIDTH),
                {"gate": f"{path}.{e}.w1", "up": f"{path}.{e}.w3", "down": f"{path}.{e}.w2"},
            )
            for e in range(EXPERTS)
        )
        module = f"model.layers.{index}.mlp"
        return MoELayer(index, f"{module}.experts", f"{module}.gate", experts, 2, HIDDEN, WIDTH)

    return MoESpec(
        "handmade",
        (layer(0), layer(1)),
        (
            LinearRef("model.layers.0.attn.q", "model.layers.0.attn.q.weight", (HIDDEN, HIDDEN), "attention"),
            LinearRef("lm_head", "lm_head.weight", (12, HIDDEN), "lm_head"),
        ),
        (KeptRef("model.embed.weight", (12, HIDDEN), "embedding"), KeptRef("model.norm.weight", (HIDDEN,), "norm")),
    )


def precisions() -> PrecisionMap:
    """All widths, symmetric and not, 16 bits among others; the head's 12 rows fit nothing below 16 bits."""
    up = (
        (Precision(2, 32), Precision(3, 32, True), FULL),
        (Precision(4, -1), Precision(5, 32), Precision(6, 32, True)),
    )
    down = ((Precision(8, 64), FULL, Precision(3, 64)), (Precision(2, 32, True),) * 3)
    return PrecisionMap({"gate_up": dict(enumerate(up)), "down": dict(enumerate(down))},
                        {"attention": Precision(8, 128, True), "lm_head": Precision(4, 64)},
                        {"method": "by hand", "bulk": [1, 2]})  # fmt: skip


def matrix(shape: tuple[int, int], precision: Precision, seed: int) -> QTensor:
    """Codes, scales and zero points from integer arithmetic: the same on every machine."""
    out, inp = shape
    numbers = torch.arange(out * inp).reshape(out, inp)
    if precision == FULL:
        return pack_full(((numbers * 37 + seed) % 255 - 127).float() / 64)
    groups = precision.group_count(inp)
    scales = ((torch.arange(out * groups).reshape(out, groups) * 5 + seed) % 31 + 1).half() / 1024
    zeros = None if precision.symmetric else ((scales * 1024).int() * 3 % precision.levels).to(torch.uint8)
    return pack(Codes(((numbers * 29 + seed) % precision.levels).to(torch.uint8), scales, zeros, precision))


def matrices() -> dict[str, QTensor]:
    """Every packed matrix by base name."""
    s, p, made = spec(), precisions(), {}
    for expert in s.experts():
        for group in GROUPS:
            precision = p.of(expert.id.layer, expert.id.expert, group)
            for name, ref in zip(MATRICES[group], expert.refs(group), strict=True):
                made[expert.names[name]] = matrix(ref.shape, precision, len(made))
    made["model.layers.0.attn.q"] = matrix((HIDDEN, HIDDEN), Precision(8, 32, True), len(made))
    return made


def others() -> dict[str, Tensor]:
    """Tensors that are not packed."""
    return {
        "lm_head.weight": (torch.arange(12 * HIDDEN).reshape(12, HIDDEN) / 128).bfloat16(),
        "model.embed.weight": torch.arange(12 * HIDDEN).reshape(12, HIDDEN).float() / 7,
        "model.norm.weight": torch.arange(HIDDEN).half() / 8,
    }


def config() -> dict[str, Any]:
    model = spec().inventory(kept_bytes=12 * HIDDEN * 4 + HIDDEN * 2, header_bytes=20_000)
    return packed_config({"model_type": "handmade", "hidden_size": HIDDEN}, spec(), precisions(), model)


def write(out: Path, without: str | None = None, **options: Any) -> int:
    with PackedWriter(out, **options) as writer:
        for name, packed in matrices().items():
            if name != without:
                writer.add(name, packed)
        for name, tensor in others().items():
            if name != without:
                writer.add_tensor(name, tensor)
        return writer.finish(config(), {"precision.json": precisions().to_json()})


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    write(GOLDEN)
