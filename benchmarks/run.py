"""Run all benchmarks, or those named, and store ``benchmarks/results/<name>.json``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUNDLED = "src/mopeq/assets"
MODEL, LABEL = "../shared/models/olmoe-25m", "25 M development model"
DATA = "../shared/data"
STORED = "benchmarks/results"
DOMAINS = ("c", "docs", "pep", "prose", "python", "wiki")


def commands(model: str, label: str, data: str, text: list[str]) -> dict[str, list[str]]:
    """Command line of each benchmark, without the interpreter."""
    named = ["--model", model, "--label", label, "--data", data]
    held_out = [f"{BUNDLED}/text/heldout_{name}.txt" for name in ("code", "docs")]
    bundled = ["--model", f"{BUNDLED}/olmoe-tiny", "--label", "bundled model", "--data",
               f"{BUNDLED}/text/calibration.jsonl", "--text", *held_out]  # fmt: skip
    return {
        "solver": ["solver.py"],
        **_fidelity("", [*named, "--text", *text]),
        **_fidelity("bundled_", bundled),
        "frontier": ["frontier.py", *named, "--text", *text, *_judged(1500)],
        "bundled_frontier": ["frontier.py", *bundled, *_judged(1200), "-o", f"{STORED}/bundled_frontier.json"],
        "scores": ["scores.py", *named],
        "codebooks": ["codebooks.py", *named, "--text", *text],
        "methods": ["methods.py", *named, "--text", *text],
        "few_bits": ["few_bits.py", *named, "--text", *text, "--budgets", "2.0", "2.25", "2.5", "2.75", "3.0"],
        "bundled_few_bits": [
            "few_bits.py",
            *bundled,
            "--windows",
            "32",
            "-o",
            "benchmarks/results/bundled_few_bits.json",
        ],
        "unseen": ["unseen.py", "--model", model, "--label", label, "--text", *text, "--apart", "c", "prose", "wiki"],
        "fitted_costs": ["fitted_costs.py", *named, "--text", *text],
        "bundled_fitted_costs": ["fitted_costs.py", *bundled, "-o", f"{STORED}/bundled_fitted_costs.json"],
        "gptq_choices": ["gptq_choices.py", *named, "--text", *text],
        "bundled_gptq_choices": ["gptq_choices.py", *bundled, "-o", f"{STORED}/bundled_gptq_choices.json"],
        "rest": ["rest.py", *named, "--text", *text],
        "bundled_rest": ["rest.py", *bundled, "-o", f"{STORED}/bundled_rest.json"],
        "compensate": ["compensate.py", *named, "--text", *text],
        "bundled_compensate": ["compensate.py", *bundled, "-o", f"{STORED}/bundled_compensate.json"],
        "measuring_cost": ["measuring_cost.py", *named],
        "recipes": [
            "recipes.py",
            *named,
            "--text",
            *text,
            "--budgets",
            "2.5bpw",
            "--ways",
            "default",
            "best",
            "smallest",
            "data-free",
        ],
        "bundled_recipes": ["recipes.py", *bundled, "-o", "benchmarks/results/bundled_recipes.json"],
        "bundled_methods": [
            "methods.py",
            *bundled,
            "--studies",
            "prune",
            "--seeds",
            "0",
            "-o",
            "benchmarks/results/bundled_methods.json",
        ],
        "resident_memory": ["resident_memory.py", *named],
        "export": ["export.py"],
        "vlm_study": ["vlm_study.py"],
        "vlm_parts": ["vlm_parts.py"],
        "moqe": ["moqe.py", "--model", model, "--label", label, "--text", *text],
    }


def _judged(questions: int) -> list[str]:
    return ["--questions", str(questions), "--draws", "60"]


def _fidelity(prefix: str, named: list[str]) -> dict[str, list[str]]:
    studies = {"fidelity": ["maps"], "choices": ["groups", "quantizers"], "levels": ["levels"],
               "damping": ["damping", "grids"]}  # fmt: skip
    made = {}
    for name, asked in studies.items():
        words = ["fidelity.py", *named, "--studies", *asked]
        words += [] if name == "fidelity" else ["--seeds", "0"]
        words += ["-o", f"benchmarks/results/{prefix}{name}.json"] if prefix or name != "fidelity" else []
        made[prefix + name] = words
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="benchmarks; none for all")
    parser.add_argument("--model", default=MODEL, help="folder of the model of the quality benchmarks")
    parser.add_argument("--label", help="how results call it")
    parser.add_argument("--data", default=f"{DATA}/calibration.jsonl", help="calibration text")
    parser.add_argument("--text", nargs="+", default=[f"{DATA}/eval_{d}.txt" for d in DOMAINS], help="held-out text")
    asked = parser.parse_args()
    label = asked.label or (LABEL if asked.model == MODEL else Path(asked.model).name)
    known = commands(asked.model, label, asked.data, asked.text)
    unknown = [name for name in asked.names if name not in known]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(known)}")
    chosen = asked.names or list(known)
    absent = [p for p in (asked.model, asked.data, *asked.text) if not Path(p).exists()]
    alone = ("solver", "export", "vlm_study", "vlm_parts")
    if absent and any(name not in alone and not name.startswith("bundled_") for name in chosen):
        parser.error(f"no {absent[0]}; give --model, --data and --text, or name {', '.join(alone)} and bundled_...")
    for name in chosen:
        print(f"== {name}", flush=True)
        script, *words = known[name]
        done = subprocess.run([sys.executable, f"benchmarks/{script}", *words], cwd=HERE.parent, check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
