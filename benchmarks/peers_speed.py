"""Seconds a layer, peak memory and error of the layer's output: mopeq and other quantizers on one model.

The model is one decoder layer of OLMoE-1B-7B's sizes with random weights and fewer experts, of which each sees as many
tokens as it would in the whole layer; seconds a layer are those of its 64 experts. All get the same sequences, bits and
groups, and one thread. Each peer runs in a virtual environment of its own:

    python benchmarks/peers_speed.py --environment GPTQModel=ENV --environment AutoRound=ENV \
        --environment llm-compressor=ENV

A peer that fails is stored with the last line that it said.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from common import ROOT, arguments, store
from mopeq.adapters import describe
from mopeq.analyze import Routed, expert_rows, observe
from mopeq.analyze.moments import expert_inputs
from mopeq.data.samples import bundled_text
from mopeq.data.text import read_texts, token_batches
from mopeq.load import load_original, load_tokenizer
from mopeq.seam import activate
from mopeq.source import open_source, read_group
from peers_run import PEERS

sys.path.insert(0, str(ROOT / "scripts"))
from published_shapes import CONFIGS
from random_checkpoint import write, write_words

NAME, EXPERTS = "olmoe-1b-7b", 64
RUN = Path(__file__).with_name("peers_run.py")


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "", "peers_speed")
    parser.add_argument("--environment", action="append", default=[], metavar="PEER=DIR", help="of a peer; repeated")
    parser.add_argument("--only", nargs="+", default=list(PEERS), choices=PEERS, help="run these, keep other results")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--limit", type=float, default=3600, help="seconds that a peer may take")
    parser.add_argument("--scratch", type=Path, help="folder for what is made (default: the system's)")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    environments = dict(pair.split("=", 1) for pair in asked.environment)
    stored: dict[str, Any] = json.loads(asked.out.read_text())["results"] if asked.out.exists() else {}
    setting = {key: getattr(asked, key) for key in ("experts", "samples", "length", "bits", "group", "threads")}
    rows: dict[str, Any] = stored["rows"] if stored.get("setting") == setting else {}
    with tempfile.TemporaryDirectory(dir=asked.scratch) as temporary:
        folder = Path(temporary).resolve()  # peers run there
        model = folder / "model"
        sizes = {"num_hidden_layers": 1, "num_experts": asked.experts, "num_experts_per_tok": 1, "vocab_size": 2048}
        write(model, {**CONFIGS[NAME], **sizes, "eos_token_id": 0}, torch.bfloat16)
        write_words(NAME, model)
        ids = {kind: sequences(model, kind, asked.samples, asked.length) for kind in ("calibration", "heldout")}
        (folder / "ids.json").write_text(json.dumps(ids["calibration"].tolist()))
        judge = Judge(model, ids)
        for peer in asked.only:
            home = environments.get(peer.partition(",")[0])
            if not home and not peer.startswith("mopeq"):
                continue
            python = str(Path(home).absolute() / "bin" / "python") if home else sys.executable
            rows[peer] = ran(python, peer, folder, asked)
            if (weights := folder / "weights.safetensors").exists():
                rows[peer] |= {"seconds_a_layer": rows[peer]["processor_seconds"] * EXPERTS / asked.experts}
                rows[peer] |= judge(load_file(weights))
                weights.unlink()
            print(peer, rows[peer], flush=True)
            store(asked.out, {"setting": setting, "rows": rows})


def sequences(model: Path, kind: str, samples: int, length: int) -> Tensor:
    """Token ids (samples, length) of the bundled text; ``calibration`` as mopeq cuts them by itself."""
    texts = read_texts(bundled_text("calibration.jsonl" if kind == "calibration" else "heldout_docs.txt"))
    made = token_batches(texts, load_tokenizer(model), length=length, samples=samples, batch_size=4, seed=0)
    return torch.cat([batch["input_ids"] for batch in made])


def ran(python: str, peer: str, folder: Path, asked: Any) -> dict[str, Any]:
    """What ``peers_run.py`` told, or how it failed."""
    path = str(ROOT / "src") if peer.startswith("mopeq") else ""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(asked.threads), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    words = ["--model", folder / "model", "--ids", folder / "ids.json", "--out", folder / "weights.safetensors"]
    words += ["--bits", asked.bits, "--group", asked.group]
    load = os.getloadavg()[0]
    try:
        done = subprocess.run(
            [python, str(RUN), peer, *map(str, words)], env=environment, cwd=folder, capture_output=True, text=True,
            check=False, timeout=asked.limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {asked.limit:.0f} s, load average {load:.0f}"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode:
        return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    return {**json.loads(lines[-1]), "load_average": round(load, 1)}


class Judge:
    """The layer as it was, and what it sees of the calibration tokens and of others."""

    def __init__(self, folder: Path, ids: dict[str, Tensor]) -> None:
        source = open_source(folder)
        spec = describe(source)
        model = load_original(folder)
        (self.layer,) = spec.layers
        self.module = model.get_submodule(self.layer.module)
        self.gate_up, self.down = (read_group(source, self.layer, group) for group in ("gate_up", "down"))
        self.seen: dict[str, Routed] = {}
        for kind, rows in ids.items():
            batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(4)]
            self.seen[kind] = observe(model, spec, batches)[self.layer.index]

    def __call__(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """Share of the squared output of the layer that its error is, with the routing as it was."""
        found = {}
        for kind, seen in self.seen.items():
            lost = whole = 0.0
            for expert, (rows, scale) in enumerate(expert_rows(seen, len(self.layer.experts))):
                named = {m: weights[f"{self.layer.index}.{expert}.{m}"] for m in ("gate", "up", "down")}
                for _, x, c in expert_inputs(seen, rows, scale, torch.device("cpu")):
                    right = activate(self.module, x @ self.gate_up[expert].T, expert) @ self.down[expert].T * c
                    both = torch.cat([named["gate"], named["up"]])
                    made = activate(self.module, x @ both.T, expert) @ named["down"].T * c
                    lost, whole = lost + float((made - right).square().sum()), whole + float(right.square().sum())
            found[f"error_{kind}"] = lost / whole
        return found


if __name__ == "__main__":
    main()
