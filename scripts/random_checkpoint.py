"""Write a checkpoint of random weights with the names, shapes and types of a published model (published_shapes.py).

Sizes are the published ones, so memory, disk and time are those of the real model; quality means nothing. One tensor is
in memory at a time.

    python scripts/random_checkpoint.py olmoe-1b-7b build/olmoe
    python scripts/random_checkpoint.py qwen3-30b-a3b build/qwen3 --layers 4
    python scripts/random_checkpoint.py deepseek-vl2 build/vl2 --headers && mopeq describe build/vl2
    python scripts/random_checkpoint.py olmoe-1b-7b build/layer --layers 1 --set num_experts=8 num_experts_per_tok=1

``--layers`` writes the first layers only, and says so in ``config.json``, where ``--set`` puts other sizes.
``--headers`` writes no weights: the files are holes of the right size, which take no room on the disk. Tokenizers are
those of the bundled models, whose ids every vocabulary here has; image processors are the published ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from published_shapes import CONFIGS, FLOAT32, PROCESSORS, cut, shapes

SHARD = 4_000_000_000
"""Bytes of a file, as the published ones have."""
MOLMOE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")

Shapes = dict[str, tuple[int, ...]]


def shards(tensors: Shapes, itemsize: int, most: int) -> Iterator[Shapes]:
    """Tensors in runs of at most ``most`` bytes."""
    run: Shapes = {}
    total = 0
    for name, shape in tensors.items():
        nbytes = itemsize * prod(shape)
        if run and total + nbytes > most:
            yield run
            run, total = {}, 0
        run[name] = shape
        total += nbytes
    yield run


def drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype, draw: torch.Generator) -> torch.Tensor:
    """Norms of ones, biases of zeros, everything else normal with a variance of one over its inputs."""
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    if len(shape) == 1 and name.endswith(".weight"):
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(0, prod(shape[1:] or shape) ** -0.5, generator=draw)


def write_shard(path: Path, tensors: Shapes, dtype: torch.dtype, draw: torch.Generator | None) -> int:
    """A safetensors file of random tensors, or a hole where ``draw`` is None; returns the bytes of its tensors."""
    kind = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + dtype.itemsize * prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if draw is None:
            file.truncate(file.tell() + end)
            return end
        for name, shape in tensors.items():
            file.write(drawn(name, shape, dtype, draw).view(torch.uint8).numpy().data)
    return end


def write(
    out: Path, config: dict[str, Any], dtype: torch.dtype, *, seed: int | None = 0, shard_bytes: int = SHARD
) -> int:
    """Configuration and weights, of holes where ``seed`` is None; returns the bytes of the tensors."""
    out.mkdir(parents=True)
    draw = None if seed is None else torch.Generator().manual_seed(seed)
    runs = list(shards(shapes(config), dtype.itemsize, shard_bytes))
    where: dict[str, str] = {}
    total = 0
    for number, run in enumerate(runs, 1):
        file = f"model-{number:05}-of-{len(runs):05}.safetensors"
        total += write_shard(out / file, run, dtype, draw)
        where |= dict.fromkeys(run, file)
        print(f"{file}: {total / 1e9:.2f} GB so far", flush=True)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_words(name: str, out: Path) -> None:
    """Tokenizer and image processor."""
    from transformers import AutoTokenizer

    from mopeq.data.samples import bundled_model, bundled_vlm

    tokenizer = AutoTokenizer.from_pretrained(bundled_vlm() if name.startswith("deepseek") else bundled_model())
    if name.startswith("molmoe"):
        tokenizer.add_tokens(list(MOLMOE_TOKENS), special_tokens=True)
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(out)
    if name in PROCESSORS:
        file, settings = PROCESSORS[name]
        (out / file).write_text(json.dumps(settings, indent=1))


def _size(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    return name, int(number)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--layers", type=int, help="write the first layers only")
    parser.add_argument(
        "--set", type=_size, nargs="+", default=[], metavar="NAME=NUMBER", help="other sizes in the configuration"
    )
    parser.add_argument("--headers", action="store_true", help="names, shapes and types without weights")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    config = CONFIGS[asked.model] if asked.layers is None else cut(CONFIGS[asked.model], asked.layers)
    if unknown := [name for name, _ in asked.set if name not in config]:
        parser.error(f"--set {unknown[0]}: {asked.model} has no such size; expected a name in its config.json")
    config = {**config, **dict(asked.set)}
    dtype = torch.float32 if asked.model in FLOAT32 else torch.bfloat16
    started = time.perf_counter()
    total = write(asked.out, config, dtype, seed=None if asked.headers else asked.seed)
    write_words(asked.model, asked.out)
    print(f"wrote {asked.out}: {total / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
