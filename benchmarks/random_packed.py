"""A packed model of published sizes and random codes, written without an original: speed does not depend on weights.

    python benchmarks/random_packed.py OUT --bits 3 [--rest 4]
    python benchmarks/random_packed.py OUT --bits 2,3,4,8      # each expert one of these, at random
    python benchmarks/random_packed.py OUT --model deepseek-vl2-tiny

The shapes come from an original whose files have headers and no data (they are sparse, and deleted afterwards).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.adapters import describe, inventory_of
from mopeq.checkpoint import PackedWriter, linear_precisions, packed_config
from mopeq.precision import FULL, GROUPS, MATRICES, Precision, PrecisionMap
from mopeq.qtensor import QTensor, packed_shapes
from mopeq.source import open_source
from mopeq.spec import DEFAULT_GROUPS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from published_shapes import CONFIGS, cut
from random_checkpoint import write

__all__ = ["CONFIGS", "OLMOE_1B_7B", "cut", "random_packed", "write", "write_random"]
OLMOE_1B_7B = CONFIGS["olmoe-1b-7b"]


def random_packed(shape: tuple[int, int], precision: Precision, draw: torch.Generator) -> QTensor:
    """Random codes and zero points; the scale gives weights a deviation of about 0.02."""
    if precision == FULL:
        dense = torch.randn(shape, generator=draw).mul(0.02).bfloat16()
        return QTensor(dense.view(torch.uint8), dense.new_empty(shape[0], 0, dtype=torch.float16), None, shape, FULL)
    made: dict[str, Tensor] = {}
    for part, (size, dtype) in packed_shapes(shape, precision).items():
        if dtype == torch.float16:
            made[part] = torch.full(size, 0.05 / 2**precision.bits, dtype=dtype)
        else:
            made[part] = torch.randint(0, 256, size, dtype=torch.uint8, generator=draw)
    return QTensor(made["qweight"], made["scales"], made.get("zeros"), shape, precision)


def write_random(
    out: Path, bits: tuple[int, ...], rest: int = 4, group: int = 64, config: dict[str, Any] = OLMOE_1B_7B
) -> int:
    """Write the checkpoint; returns its bytes. Linears outside experts get ``rest`` bits."""
    draw, choose = torch.Generator().manual_seed(0), random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / "original", config, torch.bfloat16, seed=None)
        source = open_source(Path(scratch) / "original")
        spec = describe(source)
        model = inventory_of(source, spec)
        rows = {g: {layer: tuple(Precision(choose.choice(bits), group) for _ in range(n))
                    for layer, n in model.experts.items()} for g in GROUPS}  # fmt: skip
        precisions = PrecisionMap(rows, dict.fromkeys(DEFAULT_GROUPS, Precision(rest, group)))
        with PackedWriter(out, needed_bytes=model.total_bytes(precisions)) as writer:
            for expert in spec.experts():
                for g in GROUPS:
                    precision = precisions.of(expert.id.layer, expert.id.expert, g)
                    for matrix, ref in zip(MATRICES[g], expert.refs(g), strict=True):
                        writer.add(expert.names[matrix], random_packed(ref.shape, precision, draw))
            for linear, precision in linear_precisions(spec, precisions).items():
                writer.add(linear.name, random_packed(linear.shape, precision, draw))
            for kept in spec.kept:
                one = torch.ones(kept.shape) if len(kept.shape) == 1 else torch.randn(kept.shape, generator=draw) * 0.02
                writer.add_tensor(kept.key, one.bfloat16())
            return writer.finish(
                packed_config(source.config, spec, precisions, model), {"precision.json": precisions.to_json()}
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="olmoe-1b-7b", choices=CONFIGS)
    parser.add_argument("--bits", default="3", help="widths of experts, separated by commas")
    parser.add_argument("--rest", type=int, default=4, help="width of attention, shared experts, dense layers and head")
    args = parser.parse_args()
    written = write_random(args.out, tuple(int(b) for b in args.bits.split(",")), args.rest, config=CONFIGS[args.model])
    print(f"{args.out}: {written / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
