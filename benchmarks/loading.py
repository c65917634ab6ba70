"""Seconds and memory from the start of a process to the first token of a packed OLMoE-1B-7B, its files in memory.

    python benchmarks/loading.py --bits 3 --threads 2

The checkpoint has random codes (``random_packed.py``); ``--model`` takes one that is there. Each run is a process of
its own, after the files have been read once and as much memory has been written once and given back, for in a virtual
machine the first to touch a page waits until the host has found one (``--untouched`` leaves that out): it imports
mopeq, loads, gives a token, then eight more. The ways are
``panels``, as ``mopeq run`` goes after ``mopeq panels``, which is done first where it was not, ``run``, as it goes
without, and ``load``, a transformers model by ``mopeq.load``. ``mopeq run`` also imports a tokenizer, which these
models have not; ``--tokenizer`` names a folder that has one. Seconds are those that passed and those of processor,
which other processes disturb less; memory is what is resident, and how much of it is the process's own and not pages
of files. ``peak`` counts pages of mapped files, which the system may take back.
"""

from __future__ import annotations

import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, store, table
from mopeq.garbage import uncollected

WAYS = ("panels", "run", "load")


def main() -> None:
    if sys.argv[1:2] == ["once"]:
        print("\n" + json.dumps(_once(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])))
        return
    parser = arguments(__doc__ or "", "loading")
    parser.add_argument("--bits", type=int, default=3, help="of experts")
    parser.add_argument("--rest", type=int, default=4, help="of attention and head")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a folder that random_packed.py wrote")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--untouched", action="store_true", help="memory may be such as the host has yet to find")
    parser.add_argument("--tokenizer", type=Path, help="a folder with the tokenizer that ``run`` imports")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.model or Path(temporary) / "packed"
        if asked.model is None:
            from random_packed import write_random

            write_random(folder, (asked.bits,), asked.rest)
        files = sorted(folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        if "panels" in asked.ways:
            from mopeq.runtime.lean_load import PANELS, lay_out

            if not (folder / PANELS).is_file():
                lay_out(folder)
            files.append(folder / PANELS)
        runs: dict[str, list[Any]] = {way: [] for way in asked.ways}
        for way in [*asked.ways] * asked.runs:
            for file in files:
                with file.open("rb") as opened:
                    while opened.read(1 << 24):
                        pass
            if not asked.untouched:
                _touch(sum(file.stat().st_size for file in files))
            words = [sys.executable, __file__, "once", str(folder), str(asked.threads), way]
            words += [str(asked.tokenizer)] if asked.tokenizer else []
            environment = {**os.environ, "OMP_NUM_THREADS": str(asked.threads)}
            done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
    found = {
        way: {s: {key: statistics.median(run[s][key] for run in made) for key in made[0][s]} for s in made[0]}
        for way, made in runs.items()
    }
    store(asked.out, {"threads": asked.threads, "bytes": size, "runs": runs, "median": found})
    head = ["way", "until", *next(iter(found[asked.ways[0]].values()))]
    cells = [[way, s, *(f"{v:.2f}" for v in row.values())] for way, made in found.items() for s, row in made.items()]
    print(f"{size / 1e9:.2f} GB of files\n" + table(head, cells))


def _touch(size: int) -> None:
    """Take so much memory, write a byte of each page, give it back."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1


def _once(folder: Path, threads: int, way: str, tokenizer: list[str]) -> dict[str, dict[str, float]]:
    """What has passed and what is resident after each step, from the start of the process."""
    made: dict[str, dict[str, float]] = {}

    def note(step: str) -> None:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        sizes = {name: int(status[key].split()[0]) * 1024 / 1e9 for name, key in
                 (("resident GB", "VmRSS"), ("own GB", "RssAnon"), ("peak GB", "VmHWM"))}  # fmt: skip
        made[step] = {"s": time.clock_gettime(time.CLOCK_BOOTTIME) - begun, "processor s": time.process_time(), **sizes}

    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    begun = int(ticks) / os.sysconf("SC_CLK_TCK")
    with uncollected():  # as the commands do
        import torch

        torch.set_num_threads(threads)
        model: Any
        if way != "load":
            from mopeq.runtime.lean_load import lean_of

            note("imports")
            model = lean_of(folder, mapped=way == "panels")
            if tokenizer:
                from mopeq.load import load_tokenizer

                load_tokenizer(tokenizer[0])
                note("tokenizer there")
            model.filled.result()
        else:
            from mopeq.load import load

            note("imports")
            model = load(folder)
    note("loaded")
    from mopeq.runtime.decode import Sampling, decode

    with torch.no_grad():
        tokens = decode(model, torch.arange(100, 116).view(1, -1), 9, frozenset(), Sampling())
        next(tokens)
        note("first token")
        list(tokens)
    note("eight more")
    return made


if __name__ == "__main__":
    main()
