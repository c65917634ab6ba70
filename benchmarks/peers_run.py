"""One quantizer on one model in an environment of its own: ``peers_speed.py`` runs it, mopeq too.

Only routed experts are quantized, asymmetrically, with the peer's defaults otherwise. Prints seconds of the quantizing
call, of the processor in it, and the peak of the process; leaves the experts' weights as they are afterwards in a
safetensors file. A peer's loading and saving are not counted; those of mopeq, which reads and writes as it goes, are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

EXPERT = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj$")
Run = Callable[[], Any]
"""The call that is timed; returns the module in which the quantized experts are."""


def gptqmodel(asked: argparse.Namespace, ids: list[list[int]]) -> Run:
    """GPTQModel's GPTQ. It refuses to start on two cores ("requests 2 workers but parent 'cpu' only has 1"): it is told
    of four. Its second format stores zero points as they are; the first one's are off by one until they are loaded.
    """
    os.cpu_count = lambda: 4
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=asked.bits,
        group_size=asked.group,
        sym=False,
        device="cpu",
        dynamic={r"-:.*self_attn.*": {}, **getattr(asked, "dynamic", {})},
        offload_to_disk=False,
        format="gptq_v2",  # the first format stores zero points less one, which dequantize_weight does not add again
    )
    model = GPTQModel.load(str(asked.model), config)
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]

    def run() -> Any:
        model.quantize(data, batch_size=4)
        return model.model

    return run


def autoround(asked: argparse.Namespace, ids: list[list[int]], iters: int) -> Run:
    """AutoRound: ``iters`` 0 is its RTN, 200 its default; 5 tell what one takes."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype="auto")
    rows = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row)).long()} for row in ids]
    made = AutoRound(
        model,
        AutoTokenizer.from_pretrained(asked.model),
        bits=asked.bits,
        group_size=asked.group,
        sym=False,
        iters=iters,
        dataset=rows,
        nsamples=len(ids),
        seqlen=len(ids[0]),
        batch_size=4,
        ignore_layers="self_attn,mlp.gate",
        device_map="cpu",
    )

    def run() -> Any:
        quantized, _ = made.quantize()
        return quantized

    return run


def llmcompressor(asked: argparse.Namespace, ids: list[list[int]]) -> Run:
    """llm-compressor's GPTQ. It imports torchvision, whose wheel for CUDA does not load beside a torch without: the
    operators that are missing then are declared, and none is called.
    """
    import torch

    vision = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        vision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(asked.model, dtype="auto")
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids])
    weights = QuantizationArgs(
        num_bits=asked.bits, type="int", symmetric=False, strategy="group", group_size=asked.group
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"experts": scheme}, ignore=["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"])

    def run() -> Any:
        oneshot(
            model=model, dataset=data, recipe=recipe, max_seq_length=len(ids[0]), num_calibration_samples=len(ids),
        )  # fmt: skip
        return model

    return run


def mopeq(asked: argparse.Namespace, ids: list[list[int]], method: str) -> Run:
    """From the checkpoint to the packed one, by mopeq; it makes the same sequences itself. What it imports when it
    opens a model is imported before: the others have loaded theirs.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from mopeq.measure import Calibration
    from mopeq.precision import FULL, Precision
    from mopeq.quantize import quantize

    out = asked.out.parent / f"packed-{method}"
    AutoTokenizer.from_pretrained(asked.model)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(asked.model))

    def run() -> Any:
        calibration = Calibration(samples=len(ids), length=len(ids[0]), batch_size=4)
        rest = {"attention": FULL, "lm_head": FULL}
        quantize(
            asked.model, out, uniform=Precision(asked.bits, asked.group), method=method, calibration=calibration,
            rest=rest, evaluated=False,
        )  # fmt: skip
        return out

    return run


PEERS: dict[str, tuple[str, Callable[[argparse.Namespace, list[list[int]]], Run]]] = {
    "mopeq, gptq": ("mopeq", lambda asked, ids: mopeq(asked, ids, "gptq")),
    "mopeq, rtn-mse": ("mopeq", lambda asked, ids: mopeq(asked, ids, "rtn-mse")),
    "mopeq, rtn": ("mopeq", lambda asked, ids: mopeq(asked, ids, "rtn")),
    "GPTQModel": ("gptqmodel", gptqmodel),
    "AutoRound, RTN": ("auto-round", lambda asked, ids: autoround(asked, ids, 0)),
    "AutoRound, 200 iterations": ("auto-round", lambda asked, ids: autoround(asked, ids, 200)),
    "AutoRound, 5 iterations": ("auto-round", lambda asked, ids: autoround(asked, ids, 5)),
    "llm-compressor": ("llmcompressor", llmcompressor),
}


def weights_of(model: Any) -> dict[str, Any]:
    """``{"layer.expert.matrix": float32 (out, in)}``."""
    found = {}
    if isinstance(model, Path):
        from mopeq.checkpoint import read_manifest, read_packed
        from mopeq.qtensor import dequantize

        for layer, count in read_manifest(model).inventory.experts.items():
            for expert in range(count):
                for matrix in ("gate", "up", "down"):
                    name = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}_proj"
                    found[f"{layer}.{expert}.{matrix}"] = dequantize(read_packed(model, name))
        return found
    for name, module in model.named_modules():
        if match := EXPERT.search(name):
            dense = module.dequantize_weight().T if hasattr(module, "dequantize_weight") else module.weight
            found[".".join(match.groups())] = dense.detach().float().contiguous()
    if not found:
        sys.exit(f"no experts in {type(model).__name__}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--ids", type=Path, required=True, help="JSON: token ids of each sequence")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    asked = parser.parse_args()
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    package, prepare = PEERS[asked.peer]
    run = prepare(asked, json.loads(asked.ids.read_text()))
    begun, processor = time.perf_counter(), time.process_time()
    model = run()
    seconds, processor = time.perf_counter() - begun, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    save_file(weights_of(model), asked.out)
    told = {"seconds": seconds, "processor_seconds": processor, "peak_bytes": peak}
    print("\n" + json.dumps({**told, "version": version(package), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
