"""One run of a peer, in the environment that it is installed in: its quantized experts, dequantized, to a file.

    python benchmarks/peer_worker.py PEER SETTING --model MODEL --ids FILE -o OUT.safetensors

MODEL is a folder with the original; FILE holds the token ids of each calibration sequence, JSON. SETTING is a number of
bits, bits on average, or a type of llama.cpp's. OUT gets the experts' matrices under their names in the checkpoint,
float32. The last line of the output says in JSON what they take: ``bits`` per weight with scales and zero points, those
of each layer's matrices without, and seconds of the processor. Nothing of mopeq is imported here.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import peers_run

GROUP = 128
Made = tuple[dict[str, Tensor], dict[str, float]]
"""Matrices, and the bits per weight of each, everything counted."""
ROWS = 256
"""Weights of a super-block of llama.cpp's types."""
SHORT = "IQ4_NL"
"""What llama.cpp takes for rows that are no multiple of a super-block, where it is asked for IQ2 to Q3."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("setting")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("-o", "--out", required=True)
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    asked.group, started = GROUP, time.process_time()
    tensors, bits = PEERS[asked.peer](asked, json.loads(asked.ids.read_text()))
    weights = sum(tensor.numel() for tensor in tensors.values())
    mean = sum(bits[name] * tensor.numel() for name, tensor in tensors.items()) / weights
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, asked.out)
    layers: dict[str, set[int]] = {}
    for name, value in bits.items():
        layers.setdefault(name.split(".")[2], set()).add(int(value))
    told = {"bits": mean, "processor_seconds": round(time.process_time() - started, 1)}
    print("\n" + json.dumps({**told, "layer_bits": {layer: sorted(found) for layer, found in layers.items()}}))


def grouped(bits: int, zero: int) -> float:
    """Bits per weight in groups with a scale of 16 bits and a zero point."""
    return bits + (16 + zero) / GROUP


def named(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices by their names in the checkpoint, from ``layer.expert.matrix``."""
    parts = {name: name.split(".") for name in found}
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{matrix}_proj.weight": found[name]
        for name, (layer, expert, matrix) in parts.items()
    }


def uniform(asked: argparse.Namespace, ids: list[list[int]], prepare: Callable[..., Any]) -> Made:
    """One that ``peers_run.py`` knows, at the same bits everywhere."""
    asked.bits = int(asked.setting)
    made = named(peers_run.weights_of(prepare(asked, ids)()))
    return made, dict.fromkeys(made, grouped(asked.bits, asked.bits))


def gptqmodel_dynamic(asked: argparse.Namespace, ids: list[list[int]]) -> Made:
    """GPTQModel with rules of the kind that its ``dynamic`` is for, as it chooses none itself: more bits for down, and
    for all of the first layer. 2.5: down 3 bits. 3.0: down 4 bits, gate and up of the first layer 3. The rest 2.
    """
    asked.bits = 2
    rules = {"2.5": {r".*down_proj": 3}, "3.0": {r".*down_proj": 4, r".*layers\.0\..*(gate|up)_proj": 3}}[asked.setting]
    asked.dynamic = {rf"+:{name}": {"bits": bits} for name, bits in rules.items()}
    made = named(peers_run.weights_of(peers_run.gptqmodel(asked, ids)()))

    def bits(name: str) -> int:
        if name.endswith("down_proj.weight"):
            return rules[".*down_proj"]
        return 3 if asked.setting == "3.0" and ".layers.0." in name else 2

    return made, {name: grouped(bits(name), bits(name)) for name in made}


def auto_scheme(asked: argparse.Namespace, ids: list[list[int]], iters: int) -> Made:
    """AutoRound's choice among 2, 3 and 4 bits, which gives all experts of a layer the same, then its tuning; its RTN
    where that takes no iterations.
    """
    from auto_round import AutoRound, AutoScheme
    from auto_round.schemes import QuantizationScheme
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    # it takes the name of a file and no tokens here, and takes blanks out of that name
    out = Path(asked.out)
    text = str(out.with_name(out.stem.replace(" ", "-") + ".text.json"))
    Path(text).write_text(json.dumps([{"text": tokenizer.decode(row)} for row in ids]), encoding="utf-8")
    options = [
        QuantizationScheme.from_dict(
            {"bits": bits, "sym": False, "group_size": GROUP, "data_type": "int", "act_bits": 16}
        )
        for bits in (2, 3, 4)
    ]
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    kept = sum(p.numel() for name, p in model.named_parameters() if ".self_attn." in name and p.ndim == 2)
    kept += sum(p.numel() for name, p in model.named_parameters() if name.endswith(".mlp.gate.weight"))
    wanted = (float(asked.setting) * experts + 16 * kept) / (experts + kept)  # it counts what it is told to keep
    made = AutoRound(
        model, tokenizer, scheme=AutoScheme(avg_bits=wanted, options=options, dataset=text, nsamples=16), dataset=text,
        nsamples=len(ids), seqlen=len(ids[0]) - 1, batch_size=4, iters=iters, ignore_layers="self_attn,mlp.gate",
        device_map="cpu",
    )  # fmt: skip
    quantized, chosen = made.quantize()
    found = peers_run.weights_of(quantized)
    layers = {
        ".".join(peers_run.EXPERT.search(name).groups()): at for name, at in chosen.items() if ".experts." in name
    }
    bits = named({name: torch.tensor(grouped(at["bits"], at["bits"])) for name, at in layers.items()})
    return named(found), {name: float(value) for name, value in bits.items()}


def stored(model: Path) -> Iterator[tuple[str, Tensor]]:
    """The experts' matrices as they are stored, float32."""
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no dictionary)
                if ".experts." in name:
                    yield name, opened.get_tensor(name).float()


def hqq(asked: argparse.Namespace, ids: list[list[int]]) -> Made:
    """dropbox/hqq, which uses no data; its zero points are 16-bit floats."""
    from hqq.core.quantize import Quantizer

    made: dict[str, Tensor] = {}
    bits = int(asked.setting)
    for name, weight in stored(asked.model):
        codes, meta = Quantizer.quantize(
            weight, nbits=bits, group_size=GROUP, axis=1, bitpack=False, device="cpu", compute_dtype=torch.float32
        )
        made[name] = Quantizer.dequantize(codes, meta)
    return made, dict.fromkeys(made, grouped(bits, 16))


def ggml(asked: argparse.Namespace, ids: list[list[int]]) -> Made:
    """llama.cpp's types, by its own library (``GGML_LIBRARY``) and with the importance matrix that llama-imatrix sums
    up: squares of every matrix's inputs over the tokens of its expert.

    Most types take rows of a multiple of 256 weights. ``TYPE`` joins neighbouring rows where they are shorter, which
    llama.cpp does not do; ``TYPE+IQ4_NL`` takes for these what llama.cpp does.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize
    from gguf.constants import GGML_QUANT_SIZES

    library = ctypes.CDLL(os.environ["GGML_LIBRARY"])
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    kind, _, short = asked.setting.partition("+")
    inputs = importance(asked.model, ids)
    made: dict[str, Tensor] = {}
    taken: dict[str, float] = {}
    for name, weight in stored(asked.model):
        important, shape = inputs[name], weight.shape
        fits = shape[1] % ROWS == 0
        chosen = GGMLQuantizationType[kind if fits or not short else SHORT]
        block, size = GGML_QUANT_SIZES[chosen]
        if shape[1] % block:
            weight = weight.reshape(-1, ROWS)
            important = important.repeat(ROWS // shape[1])
        rows, columns = weight.shape
        source, importances = (np.ascontiguousarray(t.numpy(), dtype=np.float32) for t in (weight, important))
        packed = np.zeros((rows, columns // block * size), dtype=np.uint8)
        library.ggml_quantize_init(ctypes.c_int(chosen.value))
        floats = ctypes.POINTER(ctypes.c_float)
        library.ggml_quantize_chunk(
            ctypes.c_int(chosen.value), source.ctypes.data_as(floats), packed.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(columns), importances.ctypes.data_as(floats),
        )  # fmt: skip
        made[name] = torch.from_numpy(dequantize(packed, chosen)).reshape(shape)
        taken[name] = 8 * size / block
    return made, taken


def importance(model: Path, ids: list[list[int]]) -> dict[str, Tensor]:
    """Mean squares (in,) of the inputs of every expert's matrices over its tokens; 1 where it has none."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, x: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(x.shape[-1])) + x.square().sum(0)
        counts[name] = counts.get(name, 0) + len(x)

    def hook(layer: int) -> Callable[..., None]:
        def called(module: Any, args: tuple[Tensor, ...]) -> None:
            hidden, index = args[0].reshape(-1, args[0].shape[-1]), args[1]
            for expert in range(len(module.gate_up_proj)):
                x = hidden[(index == expert).any(-1)]
                gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, -1)
                before = f"model.layers.{layer}.mlp.experts.{expert}."
                for matrix in ("gate", "up"):
                    add(f"{before}{matrix}_proj.weight", x)
                add(f"{before}down_proj.weight", module.act_fn(gate) * up)

        return called

    for number, layer in enumerate(loaded.model.layers):
        layer.mlp.experts.register_forward_pre_hook(hook(number))
    with torch.no_grad():
        for part in torch.tensor(ids).split(8):
            loaded.model(part)
    return {name: total / counts[name] if counts[name] else torch.ones_like(total) for name, total in sums.items()}


PEERS: dict[str, Callable[[argparse.Namespace, list[list[int]]], Made]] = {
    "auto-round": lambda asked, ids: uniform(asked, ids, lambda a, i: peers_run.autoround(a, i, 200)),
    "auto-scheme": lambda asked, ids: auto_scheme(asked, ids, 200),
    "auto-scheme-rtn": lambda asked, ids: auto_scheme(asked, ids, 0),
    "gptqmodel": lambda asked, ids: uniform(asked, ids, peers_run.gptqmodel),
    "gptqmodel-dynamic": gptqmodel_dynamic,
    "llm-compressor": lambda asked, ids: uniform(asked, ids, peers_run.llmcompressor),
    "hqq": hqq,
    "ggml": ggml,
}


if __name__ == "__main__":
    main()
