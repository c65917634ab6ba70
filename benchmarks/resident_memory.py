"""Whether a loaded model is as small in memory as on disk.

Every measurement is a process of its own. It imports everything, runs a tiny packed model of the same architecture
(which loads what is imported late), and notes its resident memory. Then it loads the checkpoint, runs 32 tokens, drops
what is garbage, notes it again, and does so for several copies that all stay in memory. A further copy takes what a
model takes; what the first one takes beyond that is the constant of the process: code and tables that the compute
libraries set up on first use at these shapes. Both are compared with the bytes of the checkpoint's safetensors files
(packed experts and linears, and what is not quantized). Peaks are the kernel's (VmHWM), reset before each stage.

Two models: the one given with ``--model``, packed at 2.5 bits per expert weight, and an OLMoE of at least 1 B random
parameters, written here, packed with RTN and a map of 2, 3 and 4 bits dealt at random. Random weights say nothing
about quality.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, arguments, store

RANDOM_OLMOE = {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_size": 1024, "intermediate_size": 704,
    "num_hidden_layers": 8, "num_experts": 64, "num_experts_per_tok": 8, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 50304, "max_position_embeddings": 4096, "hidden_act": "silu",
    "norm_topk_prob": False, "tie_word_embeddings": False, "dtype": "bfloat16", "attention_bias": False,
    "rms_norm_eps": 1e-5, "eos_token_id": 0, "pad_token_id": 1,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}  # fmt: skip
COPIES = 3
"""Copies of a packed model that one process holds."""
STEPS = ("write", "quantize", "quantize-budget", "load", "load-original")


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in STEPS:
        print("\n" + json.dumps(_step(sys.argv[1], sys.argv[2:])))
        return
    parser = arguments(__doc__ or "", "resident_memory")
    parser.add_argument("--model", required=True, help="folder of a real model")
    parser.add_argument("--label", default="", help="how results call it")
    parser.add_argument("--data", required=True, help="calibration text for it")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each measurement")
    parser.add_argument("--skip-random", action="store_true", help="only the model given")
    asked = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small = folder / "small"
        made = _run("quantize-budget", asked.model, small, asked.data, threads=asked.threads)
        found = _loads(Path(asked.model), small, asked.repeats, asked.threads)
        results[asked.label or Path(asked.model).name] = {"quantize": made, **found}
        store(asked.out, results)
        if not asked.skip_random:
            original, packed = folder / "original", folder / "packed"
            written = _run("write", original, threads=asked.threads)
            made = _run("quantize", original, packed, threads=asked.threads)
            found = _loads(original, packed, asked.repeats, asked.threads)
            results["random OLMoE"] = {"config": RANDOM_OLMOE, "write": written, "quantize": made, **found}
            store(asked.out, results)


def _loads(original: Path, packed: Path, repeats: int, threads: int) -> dict[str, Any]:
    """Both models loaded in processes of their own; ratios are the largest over all processes and copies."""
    runs = [_run("load", packed, threads=threads) for _ in range(repeats)]
    size = _bytes(packed)
    further = [copy["total"] for run in runs for copy in run["copies"][1:]]
    first = [run["copies"][0]["total"] for run in runs]
    return {
        "original_bytes": _bytes(original),
        "packed_bytes": size,
        "resident_further_copy": max(further),
        "ratio_further_copy": round(max(further) / size, 4),
        "resident_first_copy": max(first),
        "ratio_first_copy": round(max(first) / size, 4),
        "constant": max(first) - min(further),
        "packed": runs,
        "original": _run("load-original", original, threads=threads),
    }


def _run(step: str, *words: Any, threads: int) -> dict[str, Any]:
    """One step in a fresh process; the last line that it prints is its result."""
    print(time.strftime("%H:%M:%S"), step, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, __file__, step, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{step} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print("  ", json.dumps(found), flush=True)
    return found


def _step(step: str, words: list[str]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if step == "write":
        return _write(Path(words[0]))
    if step == "quantize":
        return _quantize(Path(words[0]), Path(words[1]))
    if step == "quantize-budget":
        return _quantize_budget(*map(Path, words))
    return _load(Path(words[0]), packed=step == "load")


def _load(path: Path, *, packed: bool) -> dict[str, Any]:
    """What each of several copies adds to resident memory, after a forward pass of 32 tokens."""
    import torch

    from mopeq.evaluate import resident_bytes
    from mopeq.load import load, load_original

    _warm_up()
    ids = torch.arange(64, 96)[None]
    before = last = _settled()
    models, copies = [], []
    for _ in range(COPIES if packed else 1):
        _reset_peak()
        started = time.perf_counter()
        models.append(load(path) if packed else load_original(path))
        seconds, peak_loading = time.perf_counter() - started, _status()["VmHWM"]
        loaded = _settled()
        _reset_peak()
        with torch.inference_mode():
            models[-1](input_ids=ids, use_cache=False)
        peak_forward = _status()["VmHWM"]
        after = _settled()
        copies.append({
            "load_seconds": round(seconds, 2), **_minus(after, last), "after_loading": loaded["total"] - last["total"],
            "peak_loading": peak_loading - last["total"], "peak_forward": peak_forward - last["total"],
        })  # fmt: skip
        last = after
    return {"before": before, "copies": copies, "parameters_and_buffers": resident_bytes(models[0])}


def _warm_up() -> None:
    """Run a tiny OLMoE, packed and not, so that everything imported late is there."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from mopeq.load import load
    from mopeq.measure import open_model
    from mopeq.precision import Precision, PrecisionMap
    from mopeq.quantize import pack_model

    tiny = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_experts": 8, "vocab_size": 256,
            "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}  # fmt: skip
    model = OlmoeForCausalLM(OlmoeConfig(**{**RANDOM_OLMOE, **tiny})).to(torch.bfloat16)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "tiny")
        opened = open_model(Path(folder) / "tiny")
        precisions = PrecisionMap.uniform(opened.inventory.experts, Precision(3))
        pack_model(opened, precisions, Path(folder) / "packed", method="rtn")
        small = load(Path(folder) / "packed")
        with torch.inference_mode():
            for one in (model, small):
                one(input_ids=torch.arange(64, 96)[None], use_cache=False)


def _write(path: Path) -> dict[str, Any]:
    """A random bf16 OLMoE in hub layout, one shard for each layer."""
    import torch
    from safetensors.torch import save_file

    started = time.perf_counter()
    path.mkdir()
    c: dict[str, Any] = RANDOM_OLMOE
    (path / "config.json").write_text(json.dumps(c), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    parameters = 0

    def shard(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal parameters
        file = f"model-{number:05}.safetensors"
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, shape in shapes.items()
        }
        save_file(tensors, path / file, {"format": "pt"})
        where.update(dict.fromkeys(tensors, file))
        parameters += sum(t.numel() for t in tensors.values())

    h, i, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes: dict[str, tuple[int, ...]] = {f"{at}.{n}.weight": (h,) for n in
                  ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")}  # fmt: skip
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (h, h) for n in "qkvo"}
        shapes[f"{at}.mlp.gate.weight"] = (c["num_experts"], h)
        for e in range(c["num_experts"]):
            shapes |= {f"{at}.mlp.experts.{e}.{n}_proj.weight": (i, h) for n in ("gate", "up")}
            shapes[f"{at}.mlp.experts.{e}.down_proj.weight"] = (h, i)
        shard(layer, shapes)
    shard(
        c["num_hidden_layers"],
        {"model.embed_tokens.weight": (v, h), "lm_head.weight": (v, h), "model.norm.weight": (h,)},
    )
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return {"seconds": round(time.perf_counter() - started, 1), "parameters": parameters}


def _quantize(original: Path, out: Path) -> dict[str, Any]:
    """RTN with a random map of 2, 3 and 4 bits; time and peak memory, without that of the imports."""
    from mopeq.allocate import random_map
    from mopeq.measure import open_model
    from mopeq.precision import GROUPS, Precision, PrecisionMap
    from mopeq.quantize import quantize

    before = _settled()["total"]
    _reset_peak()
    opened = open_model(original)
    experts = opened.inventory.experts
    cycle = [Precision(bits, 64) for bits in (2, 3, 4)]
    rows = {layer: tuple(cycle[e % 3] for e in range(n)) for layer, n in experts.items()}
    dealt = random_map(opened.inventory, PrecisionMap(dict.fromkeys(GROUPS, rows)), seed=0)
    precisions = PrecisionMap(dealt.experts)
    started = time.perf_counter()
    made = quantize(original, out, precisions=precisions, method="rtn", evaluated=False)
    return {
        "method": "rtn",
        "seconds": round(time.perf_counter() - started, 1),
        "peak": _status()["VmHWM"] - before,
        "bytes": made.bytes,
        "expert_bits": round(opened.inventory.expert_bits(precisions), 4),
        "expert_parameters": opened.inventory.expert_parameters,
        "parameters": opened.inventory.parameters,
        "kept_bytes": opened.inventory.kept_bytes,
    }


def _quantize_budget(original: Path, out: Path, data: Path) -> dict[str, Any]:
    """The whole path at 2.5 bits per expert weight."""
    from mopeq.measure import Calibration
    from mopeq.quantize import quantize

    before = _settled()["total"]
    _reset_peak()
    started = time.perf_counter()
    calibration = Calibration(str(data), 32, 256, 8, 0, cost_share=1.0)
    made = quantize(original, out, budget="2.5bpw", calibration=calibration, evaluated=False)
    return {
        "method": "gptq",
        "seconds": round(time.perf_counter() - started, 1),
        "peak": _status()["VmHWM"] - before,
        "bytes": made.bytes,
        "expert_bits": round(made.inventory.expert_bits(made.precisions), 4),
        "expert_parameters": made.inventory.expert_parameters,
        "parameters": made.inventory.parameters,
        "kept_bytes": made.inventory.kept_bytes,
    }


def _settled() -> dict[str, int]:
    """Resident bytes after garbage collection, with free heap pages given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    found = _status()
    return {"total": found["VmRSS"], "anonymous": found["RssAnon"], "file": found["RssFile"]}


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition(":")[::2] for line in lines)
    return {name: int(value.split()[0]) * 1024 for name, value in pairs if value.strip().endswith("kB")}


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _minus(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after}


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


if __name__ == "__main__":
    main()
