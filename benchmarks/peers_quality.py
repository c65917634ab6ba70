"""What quantizers of others make of a model's experts, beside mopeq, at equal bytes: KL to the original.

    python benchmarks/peers_quality.py --model MODEL --data TEXT --text A B --peer auto-round=VENV/bin/python ...

Every peer runs with the Python given for it (``benchmarks/peer_worker.py``; a command such as ``env PYTHONPATH=DIR
VENV/bin/python`` will do) on the same calibration tokens and quantizes the
routed experts alone; its matrices, dequantized, take their places in the original, which transformers runs in float32.
mopeq's maps are packed and loaded, the rest kept as it is. The unit of comparison is bits per expert weight with scales
and zero points: for every peer a knapsack to its bits is judged on the same windows. A peer that fails is stored with
the last line of what it said.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from common import arguments, store
from mopeq.allocate import allocate, uniform_map
from mopeq.data.text import read_texts, text_windows
from mopeq.evaluate import evaluate_many, paired_difference
from mopeq.load import load, load_original
from mopeq.measure import Calibration, measure_prepared, observed, open_model
from mopeq.pack import pack_model
from mopeq.precision import FULL, Precision

KEPT = {"attention": FULL, "lm_head": FULL}


def main() -> None:
    asked = _parser().parse_args()
    torch.set_num_threads(asked.threads)
    calibration = Calibration(asked.data, asked.samples, asked.length, 8, asked.seed)
    prepared = observed(open_model(asked.model), calibration, dtype=torch.float32)
    options = [Precision(bits, size) for bits in (2, 3, 4, 5) for size in {64, asked.group_size}]
    stats = measure_prepared(prepared, ("fisher_error",), options=options, seed=asked.seed)
    each = asked.windows // len(asked.text)
    tokenizer = prepared.tokenizer
    windows = [w for path in asked.text for w in text_windows(read_texts(path), tokenizer, asked.length, limit=each)]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ids = torch.cat([batch["input_ids"] for batch in prepared.batches]).tolist()
        (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
        loaders: dict[str, Any] = {}
        for given in asked.peer:
            peer, _, python = given.partition("=")
            for bits in asked.bits:
                name = f"{peer} {bits}"
                rows[name] = _worker(asked, peer, python, bits, folder)
                print(name, rows[name], flush=True)
                if "error" not in rows[name]:
                    loaders[name] = partial(_replaced, asked.model, folder / f"{name}.safetensors", folder / name)
        maps = {f"mopeq uniform {b}": uniform_map(prepared.inventory, [Precision(b, 64)]) for b in asked.bits}
        for name, row in list(rows.items()):
            if "error" not in row:
                budget = f"{row['bits']:.6f}bpw"
                maps[f"mopeq knapsack at {name}"] = allocate(stats, budget=budget, cost="fisher_error", options=options)
        for name, precisions in maps.items():
            kept = type(precisions)(precisions.experts, KEPT, precisions.note)
            pack_model(prepared, kept, folder / name)
            rows[name] = {"bits": prepared.inventory.expert_bits(kept)}
            loaders[name] = partial(load, folder / name, dtype=torch.float32)
        seen = evaluate_many(prepared.model, loaders, windows, cache=folder, batch_size=8)
    for name, found in seen.items():
        kl = found.divergence.kl
        rows[name] |= {"kl": kl.value, "kl_low": kl.low, "kl_high": kl.high}
        if (own := f"mopeq knapsack at {name}") in seen:
            gain = paired_difference(seen[own].divergence, found.divergence)
            rows[name] |= {"mopeq_above": gain.value, "mopeq_low": gain.low, "mopeq_high": gain.high}
    store(asked.out, {"model": asked.label or Path(asked.model).name, "seed": asked.seed, "rows": rows})


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__ or "", "peers_quality")
    parser.add_argument("--model", required=True, help="folder of the original, experts stored apart")
    parser.add_argument("--label", default="", help="how results call the model")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--text", required=True, nargs="+", help="held-out text files")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="may be repeated")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="in groups of 64")
    parser.add_argument("--group-size", type=int, default=128, help="offered to the knapsack beside 64")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence, and of a held-out window")
    parser.add_argument("--windows", type=int, default=48, help="held-out windows, evenly spread over all files")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _worker(asked: argparse.Namespace, peer: str, python: str, bits: int, folder: Path) -> dict[str, Any]:
    """What the peer says of its run, or its error."""
    script = Path(__file__).with_name("peer_worker.py")
    words = [
        *shlex.split(python),
        str(script),
        peer,
        "--model",
        str(Path(asked.model).resolve()),
        "--bits",
        f"{bits:g}",
    ]
    words += ["--ids", str(folder / "ids.json"), "-o", str(folder / f"{peer} {bits}.safetensors")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    said = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
    return dict(json.loads(said[-1])) if done.returncode == 0 else {"error": said[-1] if said else "no word"}


def _replaced(model: str, matrices: Path, folder: Path) -> Any:
    """The original with these matrices in it."""
    folder.mkdir()
    tensors = {}
    for path in Path(model).iterdir():
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        elif path.name != "model.safetensors.index.json":
            shutil.copy(path, folder)
    found = load_file(matrices)
    if unknown := set(found) - set(tensors):
        raise RuntimeError(f"{matrices.name} has {min(unknown)}, which {model} has not")
    if missing := {name for name in tensors if ".experts." in name} - set(found):
        raise RuntimeError(f"{matrices.name} lacks {min(missing)}")
    save_file(
        {name: tensor.float() for name, tensor in (tensors | found).items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return load_original(folder, dtype=torch.float32)


if __name__ == "__main__":
    main()
