"""The comparison of MoPEQ (arXiv 2509.02512) on its four models, for a machine with the hub, the tables and a GPU.

    python scripts/paper_protocol.py --tables LMUData -o paper --device cuda
    python scripts/paper_protocol.py --tables LMUData -o paper --plan      # prints the commands and runs none

For each model: measure every expert once, give the experts 2, 3 or 4 bits by each of the paper's scores, by cluster
within a layer and over the model, and beside them uniformly, and by mopeq's knapsack with the bytes of the paper's own
map; quantize, put the benchmarks' questions to each packed model and to the original, and leave ``summary.tsv``.
Every step is a ``mopeq`` command that is printed; what is there already is not done again.

As in the paper's code: symmetric groups of 128, 4 bits outside the experts, tower, projector, router and head in 16;
calibration on text alone unless ``--data`` names conversations with images; the Hessian score is 1/||W||_F, to which
its estimate comes down. Otherwise: GPTQ instead of AutoRound, one quantizer and calibration for all maps, frequencies
counted on calibration data and not on the benchmarks themselves, and splits that have answers (DocVQA_VAL,
InfoVQA_VAL, MMMU_DEV_VAL instead of the test splits). Of the nine benchmarks in the paper's tables its code names
eight; ``--benchmarks`` takes another. The eighth, COCO_VAL, needs a captioner's metrics, which the toolkit has:
``python -m mopeq.evaluate.vlmevalkit DIR --data COCO_VAL``. MMMU is scored without a judge.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mopeq.cli import main as mopeq

MODELS = (
    "deepseek-ai/deepseek-vl2-tiny",
    "deepseek-ai/deepseek-vl2-small",
    "deepseek-ai/deepseek-vl2",
    "allenai/MolmoE-1B-0924",
)
BENCHMARKS = ("AI2D_TEST", "ChartQA_TEST", "DocVQA_VAL", "InfoVQA_VAL", "MME", "MMMU_DEV_VAL", "OCRVQA_TESTCORE")
SCORES = {"frequency": "frequency", "hessian": "inverse_norm", "both": "frequency*inverse_norm"}
SCOPES = ("layer", "model")
UNIFORM = {f"uniform-{bits}": bits for bits in (2, 3, 4)}
NAMES = (*UNIFORM, *(f"{name}-{scope}" for name in SCORES for scope in SCOPES), "knapsack")
EQUAL = "hessian-model"
"""The paper's best map, whose bytes the knapsack gets."""


def steps(model: str, home: Path, asked: argparse.Namespace) -> Iterator[tuple[Path, list[str]]]:
    """What each command leaves, and the command; to be run one by one, for later ones read what earlier ones left."""
    size = asked.group_size
    options = ["--levels", "2,3,4", "--group-size", str(size), "--symmetric"]
    rest = ["--rest", f"attention=4g{size}s,shared_experts=4g{size}s,dense_mlp=4g{min(size, 64)}s,lm_head=16"]
    data = [*(["--data", asked.data] if asked.data else []), "--samples", str(asked.samples)]
    stats = home / "stats.json"
    metrics = "frequency,gate_mass,inverse_norm,fisher_error"
    yield stats, ["analyze", model, *data, "--metrics", metrics, *options, "-o", str(stats)]
    made = {name: ["--method", "uniform", "--levels", str(bits), *options[2:]] for name, bits in UNIFORM.items()}
    for name, score in SCORES.items():
        for scope in SCOPES:
            made[f"{name}-{scope}"] = ["--method", "kmeans", "--score", score, "--scope", scope, *options]
    for name, how in made.items():
        yield _map(home, name), ["allocate", str(stats), *how, *rest, "-o", str(_map(home, name))]
    made["knapsack"] = ["--method", "knapsack", "--budget", _bytes(_map(home, EQUAL)), *options]
    yield _map(home, "knapsack"), ["allocate", str(stats), *made["knapsack"], *rest, "-o", str(_map(home, "knapsack"))]
    tables = [str(Path(asked.tables) / f"{name}.tsv") for name in asked.benchmarks]
    on = [
        *(["--device", asked.device] if asked.device else []),
        *(["--limit", str(asked.limit)] if asked.limit else []),
    ]
    for name in asked.maps or made:
        packed, judged = home / name, home / f"{name}.json"
        yield (
            packed,
            ["quantize", model, "--map", str(_map(home, name)), *data, "--no-eval", "--resume", "-o", str(packed)],
        )
        yield judged, ["eval", str(packed), "--against", model, "--vqa", *tables, *on, "-o", str(judged)]


def _map(home: Path, name: str) -> Path:
    return home / f"{name}.precision.json"


def _bytes(path: Path) -> str:
    """The bytes of a map's checkpoint; a name for them where it is not made yet."""
    return f"{json.loads(path.read_text())['note']['checkpoint_bytes']}B" if path.exists() else f"BYTES-OF-{EQUAL}"


def summary(out: Path) -> list[list[Any]]:
    """A row for each score of each packed model."""
    rows = []
    for judged in sorted(out.glob("*/*.json")):
        record = json.loads(judged.read_text())
        if record.get("format") != "mopeq-evaluation":
            continue
        note = json.loads(_map(judged.parent, judged.stem).read_text())["note"]
        for task in record["tasks"]:
            low, high = (task["difference"][end] for end in ("low", "high"))
            facts = [judged.parent.name, judged.stem, note["checkpoint_bytes"], note["expert_bits"]]
            values = [task[name]["value"] for name in ("reference", "score", "difference")]
            rows.append([*facts, task["task"], task["metric"], task["documents"], *values, low, high])
    return rows


HEADS = ("model", "map", "bytes", "bits per expert weight", "benchmark", "metric", "questions", "original", "score",
         "difference", "low", "high")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run or print every step."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=list(MODELS), help="folders or hub ids (default: the paper's four)")
    p.add_argument("--tables", required=True, help="folder of VLMEvalKit's .tsv files")
    p.add_argument("--benchmarks", nargs="+", default=list(BENCHMARKS), help="names of tables (default: %(default)s)")
    p.add_argument("--maps", nargs="+", choices=NAMES, help="those to quantize by and judge (default: all)")
    p.add_argument("--data", help="text or conversations to calibrate on (default: mopeq's bundled text)")
    p.add_argument("--samples", type=int, default=128, help="of calibration (default: %(default)s)")
    p.add_argument("--group-size", type=int, default=128, help="inputs per scale (default: %(default)s)")
    p.add_argument("--limit", type=int, help="questions of each table (default: all)")
    p.add_argument("--device", help="where to answer: cuda, cuda:1 ... (default: cpu)")
    p.add_argument("--plan", action="store_true", help="print the commands, run none")
    p.add_argument("-o", "--out", required=True, help="folder for everything")
    asked = p.parse_args(arguments)
    missing = [name for name in asked.benchmarks if not (Path(asked.tables) / f"{name}.tsv").is_file()]
    if missing and not asked.plan:
        p.error(f"{asked.tables} has no {', '.join(missing)} (.tsv); download them as VLMEvalKit does, or name others")
    out = Path(asked.out)
    for model in asked.models:
        home = out / Path(model).name
        for left, command in steps(model, home, asked):
            if not asked.plan and left.exists():
                continue
            print(f"mopeq {shlex.join(command)}", flush=True)
            if asked.plan:
                continue
            home.mkdir(parents=True, exist_ok=True)
            if code := mopeq(command):
                return code
    if not asked.plan:
        with (out / "summary.tsv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(HEADS)
            writer.writerows(summary(out))
        print(f"wrote {out / 'summary.tsv'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
