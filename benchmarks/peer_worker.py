"""One run of a peer, in the environment that it is installed in: its quantized experts, dequantized, to a file.

    python benchmarks/peer_worker.py PEER --model MODEL --ids FILE --bits N --group-size N -o OUT.safetensors

MODEL is a folder with the original; FILE holds the token ids of each calibration sequence, JSON. OUT gets the experts'
matrices under their names in the checkpoint, float32. The last line of the output says in JSON what they take: ``bits``
per weight with scales and zero points, and seconds. Nothing of mopeq is imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import peers_run

SAME_RUN = {"auto-round": "AutoRound, 200 iterations", "gptqmodel": "GPTQModel", "llm-compressor": "llm-compressor"}
"""Those that ``peers_run.py`` knows, by what it calls them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peer", choices=(*SAME_RUN, *OTHERS))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=64, dest="group")
    parser.add_argument("-o", "--out", required=True)
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    started = time.process_time()
    if asked.peer in OTHERS:
        tensors, zero = OTHERS[asked.peer](asked)
    else:
        _, prepare = peers_run.PEERS[SAME_RUN[asked.peer]]
        tensors, zero = named(peers_run.weights_of(prepare(asked, json.loads(asked.ids.read_text()))())), asked.bits
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, asked.out)
    bits = asked.bits + (16 + zero) / asked.group
    print("\n" + json.dumps({"bits": bits, "processor_seconds": round(time.process_time() - started, 1)}))


def named(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices by their names in the checkpoint, from ``layer.expert.matrix``."""
    parts = {name: name.split(".") for name in found}
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{matrix}_proj.weight": found[name]
        for name, (layer, expert, matrix) in parts.items()
    }


def hqq(asked: argparse.Namespace) -> tuple[dict[str, Tensor], int]:
    """dropbox/hqq, which uses no data; its zero points are 16-bit floats."""
    from hqq.core.quantize import Quantizer

    made: dict[str, Tensor] = {}
    for file in Path(asked.model).glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  (no dictionary)
                if ".experts." in name:
                    codes, meta = Quantizer.quantize(
                        stored.get_tensor(name).float(), nbits=asked.bits, group_size=asked.group, axis=1,
                        bitpack=False, device="cpu", compute_dtype=torch.float32,
                    )  # fmt: skip
                    made[name] = Quantizer.dequantize(codes, meta)
    return made, 16


OTHERS: dict[str, Callable[[Any], tuple[dict[str, Tensor], int]]] = {"hqq": hqq}
"""Matrices by name, and bits of a zero point."""


if __name__ == "__main__":
    main()
