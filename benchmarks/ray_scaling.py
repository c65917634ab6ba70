"""What a Ray cluster of one and of two workers on this machine does to the time of a layer, and what it moves.

A layer of OLMoE-1B-7B's sizes, with fewer experts, is quantized here and on the cluster, whose nodes are processes of
this machine with one thread each; results must be the same. Where processors are shared with other jobs, wall time
says little, so units that wait instead of computing tell what handing them out costs.

    python benchmarks/ray_scaling.py          # with ray installed
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from common import ROOT, arguments, store
from mopeq.analyze import Map, here
from mopeq.integrations.ray import cluster
from mopeq.measure import Calibration
from mopeq.precision import Precision
from mopeq.quantize import quantize

sys.path.insert(0, str(ROOT / "scripts"))
from published_shapes import CONFIGS
from random_checkpoint import write, write_words

NAME = "olmoe-1b-7b"


class Counted:
    """A map that counts items, the bytes that each needs and gives, and the seconds until it is made."""

    def __init__(self, across: Map) -> None:
        self.across, self.items, self.shared, self.made, self.seconds = across, 0, 0, 0, 0.0

    def __call__(self, work: Any, shared: Any, items: Sequence[Any]) -> Iterator[Any]:
        """As the map does."""
        if items:
            self.shared = max(self.shared, len(pickle.dumps((work, shared))))
        begun = time.perf_counter()
        for made in self.across(work, shared, items):
            self.seconds += time.perf_counter() - begun
            self.items += 1
            self.made = max(self.made, len(pickle.dumps(made)))
            yield made
            begun = time.perf_counter()


def wait(seconds: float, item: int, device: torch.device) -> int:
    """A unit that takes no processor."""
    time.sleep(seconds)
    return item


def ready(shared: None, item: int, device: torch.device) -> int:
    """A unit that imports what the work needs, which a process does once."""
    importlib.import_module("mopeq.quantize")
    importlib.import_module("mopeq.integrations.transformers")
    return item


def timed(across: Map, model: Path, out: Path, asked: Any) -> dict[str, Any]:
    """Quantize the layer; bytes are counted in a run of their own."""
    begun = time.perf_counter()
    quantize(
        model, out, uniform=Precision(4, 128), calibration=Calibration(samples=asked.samples, length=512),
        evaluated=False, max_memory=asked.memory, across=across,
    )  # fmt: skip
    found: dict[str, Any] = {"seconds": time.perf_counter() - begun, "load_average": os.getloadavg()[0]}
    begun = time.perf_counter()
    list(across(wait, asked.wait, range(asked.units)))
    return found | {"waiting_seconds": time.perf_counter() - begun}


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "", "ray")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4, help="sequences of 512 tokens")
    parser.add_argument("--memory", type=int, default=None, help="--max-memory in bytes, for smaller units")
    parser.add_argument("--units", type=int, default=24, help="that wait")
    parser.add_argument("--wait", type=float, default=1.0, help="seconds that each waits")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    from ray.cluster_utils import Cluster

    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = folder / "model"
        sizes = {"num_hidden_layers": 1, "num_experts": asked.experts, "num_experts_per_tok": 1, "vocab_size": 2048}
        write(model, {**CONFIGS[NAME], **sizes, "eos_token_id": 0}, torch.bfloat16)
        write_words(NAME, model)
        counted = Counted(here)
        rows["this process"] = timed(counted, model, folder / "0", asked)
        units = rows["this process"] | {"units_seconds": counted.seconds - rows["this process"]["waiting_seconds"]}
        rows["this process"] = units
        moved = {"units": counted.items - asked.units, "shared_bytes": counted.shared, "made_bytes": counted.made}
        for workers in (1, 2):
            nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 256 << 20})
            try:
                for _ in range(workers):
                    nodes.add_node(num_cpus=1, object_store_memory=256 << 20)
                nodes.wait_for_nodes()
                with cluster(nodes.address, model) as across:
                    list(across(ready, None, range(4 * workers)))  # processes start
                    rows[f"{workers} workers"] = timed(across, model, folder / str(workers), asked)
            finally:
                nodes.shutdown()
            for file in (folder / "0").glob("*.safetensors"):
                if file.read_bytes() != (folder / str(workers) / file.name).read_bytes():
                    raise RuntimeError(f"{file.name} is another with {workers} workers")
    store(
        asked.out, {"experts": asked.experts, **moved, "wait": asked.wait, "waiting_units": asked.units, "rows": rows}
    )
    print(moved, rows)


if __name__ == "__main__":
    main()
