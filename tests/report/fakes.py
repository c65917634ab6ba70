"""Folders of made-up but consistent JSON files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mopeq.precision import DEFAULT_REST, GROUPS, Precision, PrecisionMap
from mopeq.spec import Inventory, LayerShape
from mopeq.stats import Stats, cost_metric, write_json

OPTIONS = (Precision(2, 64), Precision(3, 64), Precision(4, 64))


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": 0.95 * value, "high": 1.06 * value}


def inventory(layers: int = 3, experts: int = 8) -> Inventory:
    shapes = {i: LayerShape(experts, 128, 64, 2) for i in range(layers)}
    return Inventory("olmoe", shapes, {"attention": ((128, 128, 4 * layers),)}, 8192, 16384, 900)


def stats(layers: int = 3, experts: int = 8) -> Stats:
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(experts, 2.0), layers)
    share[0, 1] = 0.0
    share /= share.sum(1, keepdims=True)
    tokens = np.floor(4096 * share)
    metrics: dict[str, Any] = {"frequency": dict(enumerate(share)), "tokens": dict(enumerate(tokens))}
    for group in GROUPS:
        base = share * rng.lognormal(size=share.shape) * 1e-2
        for precision in OPTIONS:
            metrics[cost_metric("fisher_error", group, precision)] = dict(enumerate(base * 4.0 ** (2 - precision.bits)))
    info = {"tokens": 2048, "seed": 0, "quantizer": "gptq", "minimum_tokens": 32, "starved": {"0.1": 0}}
    return Stats(inventory(layers, experts), {}, {}).with_metrics(metrics, **info)


def precisions(layers: int = 3, experts: int = 8) -> PrecisionMap:
    rows = {
        g: {i: tuple(OPTIONS[(i + e + n) % 3] for e in range(experts)) for i in range(layers)}
        for n, g in enumerate(GROUPS)
    }
    note = {"method": "knapsack", "cost": "fisher_error", "budget": "3.0bpw"}
    return PrecisionMap(rows, {"attention": DEFAULT_REST["attention"]}, note)


def points() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{"name": "original", "kind": "original", "bytes": 9e5, "kl": 0.0, "top1": 1.0}]
    for bits in (2.0, 2.5, 3.0, 4.0):
        kl = 0.3 * math.exp(-1.2 * (bits - 2)) * (0.5 if bits == 2.5 else 1)
        kind = "mixed" if bits == 2.5 else "uniform"
        made.append(
            {"name": f"{kind} {bits:g}", "kind": kind, "expert_bits": bits, "bytes": 1e5 * bits, "perplexity": 40 + kl,
             "kl": kl, "kl_low": 0.9 * kl, "kl_high": 1.1 * kl, "top1": 1 - kl, "predicted_loss": 2.5 * kl}
        )  # fmt: skip
    return made


def evaluation() -> dict[str, Any]:
    both = {"nats": estimate(3.8), "tokens": 4096, "bytes": 12000, "bits_per_byte": 1.87, "windows": "ab"}
    columns = {"window_tokens": [4096], "window_nats": [1.0]}
    own = {**both, **columns, "perplexity": estimate(44.7)}
    between = {"kl": estimate(0.0123), "agreement": estimate(0.9), "tokens": 4096, "windows": "ab"}
    return {
        "format": "mopeq-evaluation", "version": 1, "resident_bytes": 210000, "process_bytes": None,
        "perplexity": own, "reference_perplexity": {**own, "perplexity": estimate(44.1)},
        "reference_resident_bytes": 900000, "divergence": between, "speed": {"prefill": 900.0, "decode": 40.0},
        "tasks": [{"task": "colours", "metric": "acc", "score": estimate(0.61), "documents": 100}],
        "info": {"text": "heldout.txt", "length": 512},
    }  # fmt: skip


def run(**changes: Any) -> dict[str, Any]:
    return {
        "model": "some/olmoe",
        "commands": ["mopeq quantize some/olmoe -o out --budget 3.0bpw", ["mopeq", "eval", "a b"]],
        "method": "gptq", "versions": {"mopeq": "0.1.0", "torch": "2.13.0"}, "machine": "x86_64, 2 cores",
        "date": "2026-11-21", "seconds": {"observe": 1.5, "quantize": 2.5}, "bytes": 250000, "original_bytes": 900000,
        "fallbacks": ["0.1.down"], **changes,
    }  # fmt: skip


def write_all(folder: Path, layers: int = 3, experts: int = 8) -> Path:
    inner = folder / "mopeq"
    inner.mkdir(parents=True)
    write_json(inner / "stats.json", stats(layers, experts).to_json())
    write_json(inner / "precision.json", precisions(layers, experts).to_json())
    write_json(inner / "evaluation.json", evaluation())
    write_json(inner / "run.json", run())
    write_json(inner / "frontier.json", {"points": points()})
    return folder
