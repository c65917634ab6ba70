"""Peers that ``frontier.py`` judges: what each is asked for, and the matrices that it makes, kept in a folder.

Every peer runs with the Python given for it (``benchmarks/peer_worker.py``; a command such as ``env PYTHONPATH=DIR
VENV/bin/python`` will do) on the same calibration tokens and quantizes the routed experts alone, in groups of 128 where
it has a choice. What it made stays in the folder of ``--work`` and is taken from there when the tokens are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mopeq.measure import Prepared

RUNS = {
    "auto-round": ("2", "3", "4"),
    "auto-scheme": ("2.5", "3.0"),
    "auto-scheme-rtn": ("2.5", "3.0"),
    "gptqmodel": ("2", "3", "4"),
    "gptqmodel-dynamic": ("2.5", "3.0"),
    "llm-compressor": ("2", "3", "4"),
    "hqq": ("2", "3", "4"),
    "ggml": ("IQ2_XXS", "Q2_K", "IQ3_XXS", "Q3_K", "IQ4_XS", "IQ2_XXS+IQ4_NL", "Q2_K+IQ4_NL"),
}
"""What each is asked for unless told: bits, bits on average, or a type of llama.cpp's."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME[:SETTING,...]=COMMAND", help=f"of {', '.join(RUNS)}"
    )
    parser.add_argument("--work", type=Path, help="folder to keep what peers make; needed with --peer")


def runs(
    asked: argparse.Namespace, prepared: Prepared, seed: int
) -> Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]:
    """Names such as ``gptqmodel 2``, and functions that give what the peer says of its run, or its ``error``.

    ``matrices`` is the file of what it made, ``bits`` what that takes for each weight with everything.
    """
    if asked.peer and asked.work is None:
        raise SystemExit("--peer without --work; name a folder to keep what peers make")
    ids = json.dumps(torch.cat([batch["input_ids"] for batch in prepared.batches]).tolist())
    for given in sorted(asked.peer):
        named, _, python = given.partition("=")
        peer, _, settings = named.partition(":")
        for setting in settings.split(",") if settings else RUNS[peer]:
            yield f"{peer} {setting}", partial(_run, asked, peer, python, setting, ids, asked.work / f"seed-{seed}")


def read(matrices: str) -> dict[str, Tensor]:
    """Matrices by their names in the checkpoint, float32."""
    return load_file(matrices)


def _run(asked: argparse.Namespace, peer: str, python: str, setting: str, ids: str, folder: Path) -> Mapping[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{peer} {setting}"
    tokens, out, said = (folder / file for file in ("ids.json", f"{name}.safetensors", f"{name}.json"))
    if not tokens.exists():
        tokens.write_text(ids, encoding="utf-8")
    elif tokens.read_text(encoding="utf-8") != ids:
        raise SystemExit(f"{tokens} has other calibration tokens; name another folder")
    if not said.exists():
        words = [*shlex.split(python), str(Path(__file__).with_name("peer_worker.py")), peer, setting]
        words += ["--model", str(Path(asked.model).resolve()), "--ids", str(tokens), "-o", str(out)]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
        lines = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
        if done.returncode:
            return {"error": lines[-1] if lines else f"ended with {done.returncode}"}
        said.write_text(lines[-1], encoding="utf-8")
    return {**json.loads(said.read_text(encoding="utf-8")), "matrices": str(out)}
