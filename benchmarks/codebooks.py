"""Two bits by other means: grids, codebooks, a trellis and rotations in place of GPTQ's uniform grid with zero points.

All routed experts are quantized with the moments of the real pipeline, put back as float32 weights, and compared with
the original on held-out text; all else stays as it was. ``2g128c`` is the quantizer and the storage of the package
(``mopeq.quantizers.pairs``); the others exist here only and count the bytes they would take: two bits a weight and one
fp16 scale a group. Intervals are of the difference to ``2g128`` on the same windows, relative to it.

Rows that the results file has already, of the same settings, are kept: a run that was broken off goes on.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from common import kept_runs, run_of, settings_of, store, study_arguments
from fidelity import short, windows_of
from mopeq.analyze import slabs
from mopeq.evaluate.bootstrap import difference_estimate
from mopeq.evaluate.divergence import judging
from mopeq.measure import Calibration, Prepared, observed, open_model
from mopeq.precision import GROUPS, Precision
from mopeq.qtensor import PAIRS, dequantize
from mopeq.quantizers import gptq
from mopeq.quantizers.gptq import DAMPING, factored

Fake = Callable[[Tensor, Tensor], Tensor]
"""Weights float32 (experts, out, in) and moments (experts, in, in) to the weights that the stored ones stand for."""
GROUP = 128
ROOM = 1.3
"""Scale by the one that gives points the root mean square of the weights."""
REAL = ("2g128", "2g64", "2g128c", "2g64c")
SAMPLES = 1 << 17


def main() -> None:
    asked = _parser().parse_args()
    torch.set_num_threads(asked.threads)
    opened = open_model(asked.model)
    settings = settings_of(asked)
    results = {**settings, "gaussian": {name: short(loss(points())) for name, points in POINTS.items()},
               "rotation": rotation_cost(), "runs": kept_runs(asked.out, settings)}  # fmt: skip
    real: dict[str, tuple[float, Fake]] = {name: _real(name) for name in REAL}
    for number, seed in enumerate(asked.seeds):  # what exists here only comes last, with the last seed
        methods = real | (others() if number == len(asked.seeds) - 1 else {})
        run = run_of(results, seed)
        if {row["name"] for row in run["rows"]} >= set(methods):
            continue
        prepared = observed(
            opened, Calibration(asked.data, asked.samples, asked.length, 8, seed), gradients=False, dtype=torch.float32
        )
        for _ in judged(asked, prepared, methods, run["rows"]):
            store(asked.out, results)


def _parser() -> argparse.ArgumentParser:
    parser = study_arguments(__doc__ or "", "codebooks")
    return parser


def judged(
    asked: argparse.Namespace, prepared: Prepared, methods: Mapping[str, tuple[float, Fake]], rows: list[dict[str, Any]]
) -> Iterator[None]:
    """Adds a row for every method that has none, and gives way after each; all are compared with the first."""
    layers = {layer.index: _inputs(prepared, layer) for layer in prepared.spec.layers}
    windows = windows_of(asked, prepared)
    model, known = copy.deepcopy(prepared.model), {row["name"] for row in rows}
    with (
        torch.no_grad(),
        tempfile.TemporaryDirectory() as folder,
        judging(prepared.model, windows, cache=folder, batch_size=8) as judge,
    ):
        for name, (bits, fake) in methods.items():
            if name in known:
                continue
            started, lost, whole = time.perf_counter(), 0.0, 0.0
            for layer in prepared.spec.layers:
                module = model.get_submodule(layer.module)
                for group, stored in zip(GROUPS, (module.gate_up_proj, module.down_proj), strict=True):
                    weight, moments = layers[layer.index][group]
                    made = fake(weight, moments)
                    stored.data.copy_(made)
                    lost += float((((made - weight) @ moments) * (made - weight)).sum())
                    whole += float(((weight @ moments) * weight).sum())
            seconds = time.perf_counter() - started
            found = judge(model, name).divergence
            first = rows[0] if rows else {"kl": found.kl.value, "window_kl": found.window_kl}
            change = difference_estimate(found.window_kl, first["window_kl"], found.window_tokens)
            rows.append({
                "name": name, "bits": bits, "kl": short(found.kl.value), "output_lost": short(lost / whole),
                "relative": short(found.kl.value / first["kl"]), "seconds": round(seconds, 1),
                "low": short(1 + (change.low or 0) / first["kl"]), "high": short(1 + (change.high or 0) / first["kl"]),
                "window_kl": [short(v) for v in found.window_kl],
            })  # fmt: skip
            print(time.strftime("%H:%M:%S"), name, rows[-1]["relative"], flush=True)
            yield


def _inputs(prepared: Prepared, layer: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights and moments of a layer's experts, in the order of the experts."""
    module = prepared.model.get_submodule(layer.module)
    found = list(slabs(prepared.source, layer, prepared.routed[layer.index], module))
    order = torch.tensor([e for slab in found for e in slab.experts]).argsort()
    return {
        group: (
            torch.cat([slab.weights[group] for slab in found])[order],
            torch.cat([getattr(slab.moments, group) for slab in found])[order],
        )
        for group in GROUPS
    }


def _real(name: str) -> tuple[float, Fake]:
    precision = Precision(2, int(name[2:].rstrip("c")), codebook=name.endswith("c"))
    return _bits(precision), lambda weight, moments: dequantize(gptq(weight, precision, moments))


def _bits(precision: Precision) -> float:
    return 8 * precision.nbytes(1024, 1024) / 1024**2


def others() -> dict[str, tuple[float, Fake]]:
    """What exists here only: all with groups of 128 and without zero points."""
    bits = 2 + 16 / GROUP
    uniform, codebook = _real("2g128"), _real("2g128c")
    made: dict[str, tuple[float, Fake]] = {}
    made["2g128, inputs rotated"] = uniform[0], rotated(uniform[1])
    made["2g128c, inputs rotated"] = codebook[0], rotated(codebook[1])
    made["2g128c, inputs of down rotated"] = codebook[0], rotated(codebook[1], only_down=True)
    made |= {
        f"{name}, room {room:g}": (bits, blockwise(points(), room))
        for name, points in POINTS.items()
        for room in ((1.0, ROOM, 1.5) if name == "half-integer grid" else (ROOM,))
    }
    made["trellis of 4 states, rings of 8 rows"] = bits, trellis()
    return made


def normal(numbers: int, width: int) -> Tensor:
    """Independent normal numbers (n, width), always the same."""
    return torch.randn(numbers // width, width, generator=torch.Generator().manual_seed(1))


def means(width: int, count: int, signs: bool = False, turns: int = 30) -> Tensor:
    """The points (count, width) of k-means for normal numbers; ``signs``: every point with all signs of its numbers."""
    x = normal(SAMPLES, width).abs() if signs else normal(SAMPLES, width)
    count = count >> width if signs else count
    points = x[:count].clone()
    for _ in range(turns):
        nearest = _nearest(x, points)
        size = torch.bincount(nearest, minlength=count).unsqueeze(1)
        moved = torch.zeros_like(points).index_add_(0, nearest, x) / size.clamp_min(1)
        points = torch.where(size > 0, moved, points)
    if signs:
        flips = torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * width)
        points = (points.unsqueeze(1) * flips).flatten(0, 1)
    return points


def _nearest(x: Tensor, points: Tensor) -> Tensor:
    return torch.cat([(points.square().sum(1) - 2 * part @ points.T).argmin(1) for part in x.split(1 << 14)])


def loss(points: Tensor) -> float:
    """Share of the squares of normal numbers that is lost at the best scale."""
    x = normal(SAMPLES, points.shape[1])
    points = points / points.square().mean().sqrt()
    scales = torch.linspace(0.85, 1.15, 13)
    return min(float((x - s * points[_nearest(x, s * points)]).square().mean()) for s in scales)


POINTS: dict[str, Callable[[], Tensor]] = {
    "half-integer grid": cache(lambda: torch.tensor([[-1.5], [-0.5], [0.5], [1.5]])),
    "16 points of the plane (those of 2g128c)": cache(lambda: torch.tensor(PAIRS, dtype=torch.float32)),
    "16 magnitudes of 4 numbers, 4 signs": cache(lambda: means(4, 256, signs=True)),
    "256 points of 4 numbers": cache(lambda: means(4, 256)),
}


def scaled(weight: Tensor, moments: Tensor, room: float) -> Tensor:
    """Scales (experts, out, groups) by which points of mean square 1 get ``room`` times the weights' size."""
    experts, out, _ = weight.shape
    heavy = moments.diagonal(dim1=1, dim2=2)
    heavy = (heavy / heavy.mean(-1, keepdim=True) + 0.01).view(experts, 1, -1, GROUP)
    square = (weight.view(experts, out, -1, GROUP).square() * heavy).sum(-1) / heavy.sum(-1)
    return (room * square.sqrt()).half().float().clamp_min(2.0**-24)


def blockwise(points: Tensor, room: float) -> Fake:
    """GPTQ, ``width`` neighbouring inputs at a time to the nearest of ``points`` (count, width) in their metric."""
    width = points.shape[1]
    points = points / points.square().mean().sqrt()

    def fake(weight: Tensor, moments: Tensor) -> Tensor:
        _, out, inp = weight.shape
        scale = scaled(weight, moments, room)
        sums = moments.diagonal(dim1=1, dim2=2).unflatten(-1, (-1, width)).sum(-1)
        blocks = sums.argsort(dim=-1, descending=True, stable=True)
        order = (blocks.unsqueeze(-1) * width + torch.arange(width)).flatten(1)
        upper, at = _factor(moments, order), order.unsqueeze(1).expand(-1, out, -1)
        work = weight.gather(2, at)
        for b in range(inp // width):
            here, later = slice(b * width, (b + 1) * width), slice((b + 1) * width, inp)
            metric = torch.linalg.inv(upper[:, here, here])
            s = scale.gather(2, (blocks[:, b] * width // GROUP)[:, None, None].expand(-1, out, 1))
            moved = points @ metric
            x = work[:, :, here] @ metric
            code = (s * moved.square().sum(-1).unsqueeze(1) - 2 * x @ moved.mT).argmin(-1)
            error = x - s * moved.gather(1, code.unsqueeze(-1).expand(-1, -1, width))
            work[:, :, here] = s * points[code]
            work[:, :, later] -= error @ upper[:, here, later]
        return torch.empty_like(work).scatter_(2, at, work)

    return fake


def _factor(moments: Tensor, order: Tensor) -> Tensor:
    """Upper triangular U with U^T U the inverse of the damped moments, for inputs in a given order."""
    inp = order.shape[1]
    exchanged = moments.gather(1, order.unsqueeze(-1).expand(-1, -1, inp))
    exchanged = exchanged.gather(2, order.unsqueeze(1).expand(-1, inp, -1))
    found = factored(exchanged, damping=DAMPING, act_order=False)
    root = found.upper * found.pivots.sqrt().unsqueeze(1)
    inverse: Tensor = torch.linalg.solve_triangular(root, torch.eye(inp), upper=True)
    return inverse


def trellis(rows: int = 8, turns: int = 12) -> Fake:
    """GPTQ column by column; down a column a weight's value depends on its own two bits and those of the row above.

    The 16 values are those of k-means for normal numbers; ``rows`` rows are a ring, so that the first has one above
    too, and are rounded together, by dynamic programming over all closed paths.
    """
    table = torch.erfinv((torch.arange(16) + 0.5) / 8 - 1).mul_(math.sqrt(2)).view(4, 4).T  # [above, own]
    table = table[torch.tensor([0, 2, 1, 3])].contiguous()
    x = normal(SAMPLES, rows)
    for _ in range(turns):
        path = _ring(x, torch.ones_like(x), table)
        size = torch.bincount(path.flatten(), minlength=16)
        sums = torch.zeros(16).index_add_(0, path.flatten(), x.flatten())
        table = torch.where(size > 0, sums / size.clamp_min(1), table.flatten()).view(4, 4)
    table = table / table.square().mean().sqrt()

    def fake(weight: Tensor, moments: Tensor) -> Tensor:
        _, out, inp = weight.shape
        scale = scaled(weight, moments, ROOM)
        order = moments.diagonal(dim1=1, dim2=2).argsort(dim=-1, descending=True, stable=True)
        upper, at = _factor(moments, order), order.unsqueeze(-1).expand(-1, -1, out)
        work = weight.mT.gather(1, at)
        for j in range(inp):
            s = scale.gather(2, (order[:, j] // GROUP)[:, None, None].expand(-1, out, 1)).squeeze(-1)
            path = _ring(work[:, j].reshape(-1, rows), s.reshape(-1, rows), table)
            made = table.flatten()[path].view_as(s) * s
            error = (work[:, j] - made) / upper[:, j, j, None]
            work[:, j] = made
            work[:, j + 1 :] -= upper[:, j, j + 1 :, None] * error.unsqueeze(1)
        return torch.empty_like(work).scatter_(1, at, work).mT

    return fake


def _ring(x: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """Indices 4 * above + own (n, rows) of the closed path of least squared error."""
    n, rows = x.shape
    cost = torch.full((n, 4, 4), torch.inf)  # first, above
    cost.diagonal(dim1=1, dim2=2).zero_()
    back = []
    for r in range(rows):
        step = (x[:, r, None, None] - table * scale[:, r, None, None]).square()
        cost, best = (cost.unsqueeze(-1) + step.unsqueeze(1)).min(2)
        back.append(best)
    first = cost.diagonal(dim1=1, dim2=2).argmin(1)
    own, path = first, torch.empty(n, rows, dtype=torch.int64)
    for r in reversed(range(rows)):
        above = back[r][torch.arange(n), first, own]
        path[:, r], own = 4 * above + own, above
    return path


def rotated(fake: Fake, only_down: bool = False) -> Fake:
    """The same with inputs turned by random signs and a Hadamard matrix, and turned back for the comparison.

    only_down: the narrower inputs of an expert's two, those of down.
    """

    def turned(weight: Tensor, moments: Tensor) -> Tensor:
        _, out, inp = weight.shape
        if only_down and out <= inp:
            return fake(weight, moments)
        signs = torch.randint(0, 2, (inp,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        r = hadamard(inp) * signs
        made: Tensor = fake(weight @ r.T, r @ moments @ r.T) @ r
        return made

    return turned


@cache
def hadamard(size: int) -> Tensor:
    """The orthogonal Walsh-Hadamard matrix; ``size`` is a power of two."""
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    if len(h) != size:
        raise SystemExit(f"inputs of {size}: rotations are tried here for powers of two only")
    return h / math.sqrt(size)


def rotation_cost(hidden: int = 2048, inner: int = 1024, k: int = 8, turns: int = 200) -> dict[str, Any]:
    """Seconds that rotating takes for a token in a layer of OLMoE-1B-7B's shape: its input, and those of k downs.

    As two small products each, the fastest way in torch: a Hadamard matrix is the Kronecker product of smaller ones.
    """
    best = {}
    for name, rows, size in (("hidden", 1, hidden), ("inner", k, inner)):
        a, b = hadamard(1 << (int(math.log2(size)) // 2)), hadamard(size >> (int(math.log2(size)) // 2))
        x, seconds = torch.randn(rows, len(a), len(b)), []
        for _ in range(turns):
            begun = time.perf_counter()
            _ = a @ (x @ b)
            seconds.append(time.perf_counter() - begun)
        best[name] = short(min(seconds))
    return {"shape": [hidden, inner, k], "seconds": best}


if __name__ == "__main__":
    main()
