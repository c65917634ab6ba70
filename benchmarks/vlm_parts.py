"""Which part of the bundled vision-language model few bits hurt: its routed experts, attention, shared experts or head.

One part at a time is rounded to 2, 3 and 4 bits and the others stay in 16; then all of them together. Every model is
packed, loaded and judged on the held-out questions, about the images as drawn and about harder ones, as in
``vlm_study.py``.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import arguments, store
from mopeq.data.samples import bundled_images, bundled_vlm
from mopeq.load import load
from mopeq.measure import Calibration, observed, open_model
from mopeq.precision import DEFAULT_REST, FULL, Precision, PrecisionMap
from mopeq.quantize import pack_model
from vlm_study import BITS, CONVERSATIONS, SIZE, accuracy_of, judged, judges_of

EXPERTS, ALL = "routed_experts", "all"


def main() -> None:
    asked = arguments(__doc__ or "", "vlm_parts").parse_args()
    torch.set_num_threads(asked.threads)
    opened = open_model(bundled_vlm())
    calibration = Calibration(str(bundled_images("calibration.jsonl")), CONVERSATIONS, batch_size=16)
    own = observed(opened, calibration, dtype=torch.float32)
    judges = judges_of(own)
    rest = [group for group in DEFAULT_REST if group in opened.inventory.linears]
    weights = {group: sum(o * i * n for o, i, n in opened.inventory.linears[group]) for group in rest}
    weights = {EXPERTS: opened.inventory.expert_parameters, **weights}
    results: dict[str, Any] = {
        "model": "bundled vision-language model",
        "group_size": SIZE,
        "quantizer": "gptq",
        "weights": {**weights, ALL: sum(weights.values())},
        "original": {name: accuracy_of(judge(own.model)) for name, judge in judges.items()},
        "rows": [],
    }
    for part in (*weights, ALL):
        for bits in BITS:
            print(time.strftime("%H:%M:%S"), part, bits, flush=True)
            few = Precision(bits, SIZE)
            others = {group: few if part in (group, ALL) else FULL for group in rest}
            made = PrecisionMap.uniform(opened.inventory.experts, few if part in (EXPERTS, ALL) else FULL, others)
            with tempfile.TemporaryDirectory() as at:
                done = pack_model(own, made, Path(at) / "packed")
                model = load(done.path, dtype=torch.float32)
                found = {name: judged(judge(model)) for name, judge in judges.items()}
            results["rows"].append({"part": part, "bits": bits, "bytes": done.bytes, **found})
            store(asked.out, results)


if __name__ == "__main__":
    main()
