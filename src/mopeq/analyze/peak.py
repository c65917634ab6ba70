"""The largest value that each expert puts out: super-experts stand out in it (arXiv 2507.23279)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mopeq.analyze.moments import CHUNK, expert_inputs
from mopeq.analyze.observe import Routed, expert_rows
from mopeq.seam import activate

__all__ = ["output_peaks"]


def output_peaks(
    routed: Routed, module: nn.Module, gate_up: Tensor, down: Tensor, experts: Sequence[int], chunk: int = CHUNK
) -> list[float]:
    """Largest magnitude in the output of ``down`` over an expert's tokens, before routing weights and biases; or 0.

    Args:
        routed: what the layer saw.
        module: its experts module, asked for the gate function.
        gate_up: float32 (n, 2I, H), gate rows before up rows, of the experts asked for.
        down: float32 (n, H, I), of the same.
        experts: their numbers in the layer.
        chunk: tokens worked on at a time, which bounds memory.
    """
    peaks = torch.zeros(len(experts), device=down.device)
    with torch.no_grad():
        for i, (expert, rows) in enumerate(zip(experts, expert_rows(routed, experts), strict=True)):
            for _, x, _ in expert_inputs(routed, *rows, down.device, chunk):
                put = activate(module, x @ gate_up[i].T, expert) @ down[i].T
                peaks[i] = torch.maximum(peaks[i], put.abs().max())
    return peaks.tolist()
