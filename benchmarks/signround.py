"""SignRound by whole experts, beside single matrices, GPTQ and AutoRound: what each loses of every MoE layer's output.

All routed experts are quantized at one precision from the same calibration text and put back as float32 weights; all
else stays as it was. An MoE layer's loss is the squared change of its output over its square, with the inputs of the
original; the mean over layers is taken. KL is that of the whole model on held-out text.

``--peer NAME=FILE`` has the matrices that ``peer_worker.py auto-round BITS`` made of the tokens that ``--ids FILE``
writes of the first seed. Rows that the results file has already, of the same settings, are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common import kept_runs, run_of, settings_of, store, study_arguments
from fidelity import short, windows_of
from mopeq.analyze import Routed, Slab, observe, slabs
from mopeq.evaluate.bootstrap import difference_estimate
from mopeq.evaluate.divergence import judging
from mopeq.learned import learned
from mopeq.measure import Calibration, Prepared, observed, open_model
from mopeq.precision import GROUPS, MATRICES, parse_precision
from mopeq.qtensor import dequantize
from mopeq.quantizers import QUANTIZERS
from mopeq.spec import MoELayer

Fake = Callable[[Prepared, MoELayer, nn.Module], Iterator[tuple[int, str, Tensor]]]
"""Experts, groups and the weights (rows, in) that the stored ones stand for, of a layer and its experts module."""


def main() -> None:
    parser = study_arguments(__doc__ or "", "signround")
    parser.add_argument("--precisions", nargs="+", default=["2g128", "3g128"], help="of all experts")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--ids", type=Path, help="write the calibration tokens of the first seed here, and stop")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    opened = open_model(asked.model)
    settings = settings_of(asked, iterations=asked.iterations)
    results = {**settings, "runs": kept_runs(asked.out, settings)}
    for number, seed in enumerate(asked.seeds):
        methods = {
            f"{method} {p}": fake for p in asked.precisions for method, fake in ours(p, asked.iterations).items()
        }
        if number == 0:
            peers = dict(text.split("=", 1) for text in asked.peer)
            methods |= {name: peer(Path(file)) for name, file in peers.items()}
        methods = dict(
            sorted(methods.items(), key=lambda item: item[0].startswith("signround"))
        )  # what is slow comes last
        run = run_of(results, seed)
        calibration = Calibration(asked.data, asked.samples, asked.length, 8, seed)
        prepared = observed(opened, calibration, gradients=False, dtype=torch.float32)
        if asked.ids:
            asked.ids.write_text(json.dumps(torch.cat([b["input_ids"] for b in prepared.batches]).tolist()))
            return
        for _ in judged(asked, prepared, methods, run["rows"]):
            store(asked.out, results)


def ours(precision: str, iterations: int) -> dict[str, Fake]:
    """Quantizers of this package."""
    p = parse_precision(precision)

    def single(method: str, **how: int) -> Fake:
        def fake(prepared: Prepared, layer: MoELayer, module: nn.Module) -> Iterator[tuple[int, str, Tensor]]:
            for slab in _slabs(prepared, layer, module):
                for group in GROUPS:
                    made = QUANTIZERS[method](slab.weights[group], p, getattr(slab.moments, group), **how)
                    yield from ((e, group, w) for e, w in zip(slab.experts, dequantize(made), strict=True))

        return fake

    def whole(prepared: Prepared, layer: MoELayer, module: nn.Module) -> Iterator[tuple[int, str, Tensor]]:
        seen, minimum = prepared.routed[layer.index], layer.shapes("gate_up")[0][1] // 4
        for slab in _slabs(prepared, layer, module):
            for i, e in enumerate(slab.experts):
                weights = {group: slab.weights[group][i] for group in GROUPS}
                wanted = dict.fromkeys(GROUPS, p)
                found = learned(seen, module, e, weights, wanted, minimum=minimum, iterations=iterations)
                yield from ((e, group, dequantize(codes)[0]) for group, codes in found.items())

    return {
        "gptq": single("gptq"),
        "signround, single matrices": single("signround", iterations=iterations),
        "signround": whole,
    }


def peer(file: Path) -> Fake:
    """Matrices of another's, by their names in the checkpoint."""
    found = load_file(file)

    def fake(prepared: Prepared, layer: MoELayer, module: nn.Module) -> Iterator[tuple[int, str, Tensor]]:
        for e, expert in enumerate(layer.experts):
            for group in GROUPS:
                yield e, group, torch.cat([found[f"{expert.names[m]}.weight"] for m in MATRICES[group]]).float()

    return fake


def judged(
    asked: argparse.Namespace, prepared: Prepared, methods: Mapping[str, Fake], rows: list[dict[str, Any]]
) -> Iterator[None]:
    """Adds a row for every method that has none, and gives way after each."""
    windows = windows_of(asked, prepared)
    ids = torch.stack([window.ids[: asked.length] for window in windows if len(window.ids) >= asked.length])
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
    text = {"calibration": prepared.routed, "held out": observe(prepared.model, prepared.spec, batches)}
    model, known = copy.deepcopy(prepared.model), {row["name"] for row in rows}
    with (
        torch.no_grad(),
        tempfile.TemporaryDirectory() as folder,
        judging(prepared.model, windows, cache=folder, batch_size=8) as judge,
    ):
        for name, fake in methods.items():
            if name in known:
                continue
            losses: dict[str, list[float]] = {which: [] for which in text}
            processor = 0.0
            for layer in prepared.spec.layers:
                original, module = prepared.model.get_submodule(layer.module), model.get_submodule(layer.module)
                begun = time.process_time()
                for expert, group, weight in fake(prepared, layer, original):
                    getattr(module, f"{group}_proj").data[expert].copy_(weight)
                processor += time.process_time() - begun
                for which, routed in text.items():
                    losses[which].append(lost(module, original, routed[layer.index]))
            found = judge(model, name).divergence
            rows.append({
                "name": name, "kl": short(found.kl.value), "low": short(found.kl.low), "high": short(found.kl.high),
                **{f"lost, {which}": short(sum(row) / len(row)) for which, row in losses.items()},
                "layers": {which: [short(v) for v in row] for which, row in losses.items()},
                "processor_seconds": round(processor, 1), "window_kl": [short(v) for v in found.window_kl],
            })  # fmt: skip
            first = next(row for row in rows if row["name"].split()[-1] == name.split()[-1])
            change = difference_estimate(found.window_kl, first["window_kl"], found.window_tokens)
            rows[-1]["more than gptq"] = [short(v / first["kl"]) for v in (change.value, change.low, change.high)]
            print(time.strftime("%H:%M:%S"), name, rows[-1]["kl"], flush=True)
            yield


def lost(module: nn.Module, original: nn.Module, seen: Routed, tokens: int = 4096) -> float:
    """Squared change of a layer's output over its square."""
    error = square = 0.0
    for hidden, index, weights in zip(
        *(part.split(tokens) for part in (seen.hidden.float(), seen.index, seen.weights)), strict=True
    ):
        z = original(hidden, index, weights)
        error += float((module(hidden, index, weights) - z).square().sum())
        square += float(z.square().sum())
    return error / square


def _slabs(prepared: Prepared, layer: MoELayer, module: nn.Module) -> Iterator[Slab]:
    return slabs(prepared.source, layer, prepared.routed[layer.index], module)


if __name__ == "__main__":
    main()
