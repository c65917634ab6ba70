"""What the recipes of ``mopeq quantize`` give, and what they take: the commands as a user gives them.

Every recipe, no recipe, and exchanges make a checkpoint to each budget; all are then compared with the original on the
same held-out text, which none of them has seen. Times are of the processor, of one thread; ``measuring_cost.py`` has
what measuring is of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import arguments, store
from mopeq.cli import main as mopeq
from mopeq.cli.recipes import RECIPES
from mopeq.data.text import read_texts, text_windows
from mopeq.evaluate import evaluate_many, paired_difference
from mopeq.load import load, load_original, load_tokenizer
from mopeq.stats import read_json

EXCHANGES = 12


def main() -> None:
    asked = _parser().parse_args()
    torch.set_num_threads(asked.threads)
    made: dict[str, dict[str, Any]] = {}
    ways = {"default": [], **{name: ["--recipe", name] for name in RECIPES}, "refined": ["--refine", str(EXCHANGES)]}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        for budget in asked.budgets:
            for way, flags in ways.items():
                if asked.ways and way not in asked.ways:
                    continue
                name = f"{way} at {budget}"
                folders[name] = Path(temporary) / name.replace(" ", "-")
                made[name] = _run(asked, ["--budget", budget, *flags], folders[name])
                made[name]["budget"] = budget
                print(name, made[name]["processor_seconds"], flush=True)
        tokenizer = load_tokenizer(asked.model)
        each = asked.windows // len(asked.text)
        windows = [
            w for path in asked.text for w in text_windows(read_texts(path), tokenizer, asked.length, limit=each)
        ]
        loaders = {name: partial(load, folder, dtype=torch.float32) for name, folder in folders.items()}
        original = load_original(asked.model, dtype=torch.float32)
        seen = evaluate_many(original, loaders, windows, cache=temporary, batch_size=8)
    for name, found in seen.items():
        kl = found.divergence.kl
        made[name] |= {"kl": kl.value, "kl_low": kl.low, "kl_high": kl.high, "tokens": found.divergence.tokens}
        usual = f"default at {made[name]['budget']}"
        if name != usual:
            gain = paired_difference(found.divergence, seen[usual].divergence)
            made[name] |= {"above_default": gain.value, "above_low": gain.low, "above_high": gain.high}
    store(asked.out, {"model": asked.label or Path(asked.model).name, "rows": made})


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__ or "", "recipes")
    parser.add_argument("--model", required=True, help="folder of the original")
    parser.add_argument("--label", default="", help="how results call the model")
    parser.add_argument("--data", required=True, help="calibration text, for all but data-free")
    parser.add_argument("--text", required=True, nargs="+", help="held-out text files")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence, and of a held-out window")
    parser.add_argument("--windows", type=int, default=48, help="held-out windows, evenly spread over all files")
    parser.add_argument("--budgets", nargs="+", default=["2.5bpw", "3.0bpw"])
    parser.add_argument("--ways", nargs="+", help="default, recipes, refined; all unless given")
    return parser


def _run(asked: argparse.Namespace, flags: Sequence[str], out: Path) -> dict[str, Any]:
    words = ["quantize", asked.model, "-o", str(out), "--length", str(asked.length), "--json", *flags]
    words += [] if "data-free" in flags else ["--data", asked.data]
    before = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = mopeq(words)
    if code:
        raise RuntimeError(f"mopeq {' '.join(words)} ended with {code}: {said.getvalue()}")
    run = read_json(out / "mopeq" / "run.json")
    return {
        "bytes": run["bytes"], "expert_bits": round(run["expert_bits"], 4),
        "processor_seconds": round(time.process_time() - before, 1), "guard": run.get("guard"),
        "recipe": run.get("recipe", "default"),
    }  # fmt: skip


if __name__ == "__main__":
    main()
