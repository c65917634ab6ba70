"""One run of a peer, in the environment that it is installed in: its quantized experts, dequantized, to a file.

    python benchmarks/peer_worker.py PEER --model MODEL --batches FILE --bits N --group-size N -o OUT.safetensors

MODEL is a folder with the original; FILE holds ``input_ids`` (sequences, length), the calibration. OUT gets the
experts' matrices under their names in the checkpoint, float32. The last line of the output says in JSON what they take:
``bits`` per weight with scales and zero points, and seconds. Nothing of mopeq is imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Found = tuple[dict[str, Tensor], float]
"""Matrices by name, and bits per weight."""
EXPERT = re.compile(r"(layers\.\d+\.mlp\.experts\.\d+\.(?:gate|up|down)_proj)$")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peer", choices=tuple(PEERS))
    parser.add_argument("--model", required=True)
    parser.add_argument("--batches", required=True)
    parser.add_argument("--bits", type=float, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("-o", "--out", required=True)
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    started = time.process_time()
    tensors, bits = PEERS[asked.peer](asked)
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, asked.out)
    print(json.dumps({"bits": bits, "processor_seconds": round(time.process_time() - started, 1)}))


def calibration(asked: argparse.Namespace) -> list[list[int]]:
    """Token ids of each sequence."""
    from safetensors.torch import load_file

    rows: list[list[int]] = load_file(asked.batches)["input_ids"].tolist()
    return rows


def original(asked: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(asked.model)


def experts(model: nn.Module) -> dict[str, Tensor]:
    """Matrices (out, in) of the experts' modules by their names in the checkpoint."""
    found = {}
    for name, module in model.named_modules():
        match = EXPERT.search(name)
        if match is not None:
            m: Any = module
            dense = m.dequantize_weight().T if hasattr(m, "dequantize_weight") else m.weight
            found[f"model.{match[1]}.weight"] = dense.detach()
    if not found:
        raise RuntimeError(f"no experts in {type(model).__name__}")
    return found


def overhead(bits: float, group: int, *, zero: float | None = None) -> float:
    """Bits per weight of codes with a 16-bit scale and a zero point (as wide as a code, or ``zero``) a group."""
    return bits + (16 + (bits if zero is None else zero)) / group


def auto_round(asked: argparse.Namespace, **options: Any) -> Found:
    """intel/auto-round on the experts alone; ``--iterations`` 200 is its default."""
    from auto_round import AutoRound

    model, tokenizer = original(asked)
    rows = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row)).long()}
            for row in calibration(asked)]  # fmt: skip
    options = options or {"bits": int(asked.bits)}
    peer = AutoRound(
        model, tokenizer, group_size=asked.group_size, sym=False, iters=asked.iterations, dataset=rows,
        nsamples=len(rows), seqlen=rows[0]["input_ids"].shape[1], batch_size=8, device_map="cpu",
        ignore_layers="self_attn,mlp.gate", **options,
    )  # fmt: skip
    quantized, settings = peer.quantize()
    widths = [(quantized.get_submodule(n).weight.numel(), overhead(s["bits"], s["group_size"]))
              for n, s in settings.items() if ".experts." in n]  # fmt: skip
    return experts(quantized), sum(n * bits for n, bits in widths) / sum(n for n, _ in widths)


def auto_scheme(asked: argparse.Namespace) -> Found:
    """Its AutoScheme: widths of layers by gradient times change of weights, ``--bits`` on average."""
    from auto_round import AutoScheme

    schemes = [{"bits": b, "group_size": asked.group_size, "sym": False, "data_type": "int"} for b in (2, 3, 4)]
    return auto_round(asked, scheme=AutoScheme(avg_bits=asked.bits, options=schemes))


def gptqmodel(asked: argparse.Namespace) -> Found:
    """ModelCloud/GPTQModel's GPTQ."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default on two cores is one, which it refuses
    from gptqmodel import GPTQModel, QuantizeConfig

    bits = int(asked.bits)
    config = QuantizeConfig(
        bits=bits,
        group_size=asked.group_size,
        sym=False,
        device="cpu",
        offload_to_disk=False,
        format="gptq_v2",
        dynamic={r"-:.*self_attn.*": {}},
    )
    model = GPTQModel.load(asked.model, config)
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in calibration(asked)], batch_size=8)
    return experts(model.model), overhead(bits, asked.group_size)


def llm_compressor(asked: argparse.Namespace) -> Found:
    """vllm-project/llm-compressor's GPTQ."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    rows = calibration(asked)
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    bits = int(asked.bits)
    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=False, strategy="group", group_size=asked.group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"experts": scheme}, ignore=["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"])
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=len(rows[0]), num_calibration_samples=len(rows))
    return experts(model), overhead(bits, asked.group_size)


def hqq(asked: argparse.Namespace) -> Found:
    """dropbox/hqq, which uses no data; its zero points are 16-bit floats."""
    from hqq.core.quantize import Quantizer
    from safetensors import safe_open

    bits = int(asked.bits)
    made = {}
    for file in Path(asked.model).glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            for name in (name for name in stored.keys() if ".experts." in name):  # noqa: SIM118  (no dictionary)
                codes, meta = Quantizer.quantize(
                    stored.get_tensor(name).float(), nbits=bits, group_size=asked.group_size, axis=1, bitpack=False,
                    device="cpu", compute_dtype=torch.float32,
                )  # fmt: skip
                made[name] = Quantizer.dequantize(codes, meta)
    return made, overhead(bits, asked.group_size, zero=16)


PEERS: dict[str, Callable[[argparse.Namespace], Found]] = {
    "auto-round": auto_round,
    "auto-scheme": auto_scheme,
    "gptqmodel": gptqmodel,
    "llm-compressor": llm_compressor,
    "hqq": hqq,
}


if __name__ == "__main__":
    main()
