"""Second moments of what an expert's matrices see: the curvature that quantizers such as GPTQ minimise against.

Where tokens do not count alike (``Routed.token_weight``), a token's outer product is multiplied by what it counts. With
the weight g of text and 1 of image tokens this is VEQ's modality-weighted Hessian (arXiv 2602.01037).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mopeq.analyze.observe import Routed, expert_rows
from mopeq.precision import GROUPS
from mopeq.seam import activate

__all__ = ["Moments", "enough_tokens", "expert_inputs", "moment_traces", "moments"]

CHUNK = 4096
"""Tokens of one expert worked on at a time."""


@dataclass(frozen=True)
class Moments:
    """Sums over an expert's tokens of w c^2 x x^T, with x the input of a projection group, c the routing weight, and w
    what the token counts.

    gate_up: float32 (experts, H, H); down: float32 (experts, I, I); tokens: int64 (experts,). An expert without tokens
    has zeros.
    """

    gate_up: Tensor
    down: Tensor
    tokens: Tensor


def expert_inputs(
    routed: Routed, rows: Tensor, weights: Tensor, device: torch.device, chunk: int = CHUNK
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """An expert's tokens in chunks: rows int64 (n,), inputs float32 (n, H), and the weights of its outputs (n, 1).

    Where routing weights scale the input, the inputs are scaled and the weights of the outputs are 1.
    """
    for r, c in zip(torch.split(rows, chunk), torch.split(weights, chunk), strict=True):
        if not len(r):
            return
        x, c = routed.hidden[r].to(device).float(), c.to(device).unsqueeze(-1)
        yield (r, x * c, torch.ones_like(c)) if routed.weighs_input else (r, x, c)


def enough_tokens(inputs: int, minimum: int | None) -> int:
    """Tokens below which an expert's moments are filled up; unless given, a quarter of the matrix's inputs."""
    return minimum if minimum is not None else inputs // 4


def moments(
    routed: Routed, module: nn.Module, gate_up: Tensor, chunk: int = CHUNK, experts: Sequence[int] | None = None
) -> Moments:
    """Moments of a layer's experts, all or those named, from its recorded tokens.

    The weight c^2 makes ``tr(D M D^T)`` the squared error that a change D of a matrix of ``down`` makes in the layer's
    output, and the same for gate and up up to the gate function and ``down``.

    Args:
        routed: what the layer saw.
        module: its experts module, asked for the gate function.
        gate_up: float32 (experts, 2I, H), gate rows before up rows, of those experts. The result is on its device.
        chunk: tokens worked on at a time, which bounds memory.
        experts: which; None for all.
    """
    count, rows, hidden = gate_up.shape
    device = gate_up.device
    up = torch.zeros(count, hidden, hidden, device=device)
    down = torch.zeros(count, rows // 2, rows // 2, device=device)
    which = range(count) if experts is None else experts
    for i, x, h in _weighted_inputs(routed, module, gate_up, chunk, which):
        up[i].addmm_(x.T, x)
        down[i].addmm_(h.T, h)
    return Moments(up, down, torch.tensor([len(rows) for rows, _ in expert_rows(routed, which)]))


def moment_traces(
    routed: Routed, module: nn.Module, gate_up: Tensor, experts: Sequence[int], chunk: int = CHUNK
) -> dict[str, list[float]]:
    """Traces of the moments of some experts per calibration token, without the moments: ``moment_trace.gate_up`` and
    ``moment_trace.down``. Arguments as for :func:`moments`.
    """
    traces = torch.zeros(2, len(experts), dtype=torch.float64)
    for i, x, h in _weighted_inputs(routed, module, gate_up, chunk, experts):
        traces[:, i] += torch.stack([part.square().sum(dtype=torch.float64) for part in (x, h)]).cpu()
    traces /= max(1, len(routed.hidden))
    return {f"moment_trace.{group}": row.tolist() for group, row in zip(GROUPS, traces, strict=True)}


def _weighted_inputs(
    routed: Routed, module: nn.Module, gate_up: Tensor, chunk: int, experts: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of the i-th of some experts, in chunks: inputs of gate and up (n, H), and of down (n, I), times c sqrt(w)."""
    weight = routed.token_weight
    with torch.no_grad():
        for i, (e, rows) in enumerate(zip(experts, expert_rows(routed, experts), strict=True)):
            for r, x, c in expert_inputs(routed, *rows, gate_up.device, chunk):
                c = c if weight is None else c * weight[r].sqrt().to(c)[:, None]
                yield i, x * c, activate(module, x @ gate_up[i].T, e) * c
