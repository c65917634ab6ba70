"""MoPEQ's score: the Hessian trace of the loss ||W||_F, from the weights alone.

Chitty-Venkata, Ye, Emani, "MoPEQ: Mixture of Mixed Precision Quantized Experts", arXiv 2509.02512. With n weights w and
loss ||w||, the Hessian is (I - w w^T / ||w||^2) / ||w|| and its trace (n - 1) / ||w||. Probes of length 1, as the
authors draw them, estimate the trace divided by n, which is 1 / ||w|| but for a factor (n - 1) / n. No data enters:
experts of smaller norm count as more sensitive.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mopeq.errors import ModelError
from mopeq.precision import GROUPS, MATRICES
from mopeq.progress import Track, silent
from mopeq.source import Source, read_group
from mopeq.spec import MoESpec

__all__ = ["hutchinson_norm_trace", "inverse_norm", "layer_inverse_norm", "norm_trace"]

PROBES = ("unit", "rademacher", "gaussian")


def norm_trace(weight: Tensor, normalised: bool = True) -> float:
    """Exact Hessian trace of ||W||_F, (n - 1) / ||W||; ``normalised`` divides it by the n weights. float64."""
    n = weight.numel()
    return (n - 1) / float(weight.double().norm()) / (n if normalised else 1)


def hutchinson_norm_trace(weight: Tensor, probes: int = 100, seed: int = 0, kind: str = "unit") -> tuple[float, float]:
    """The same trace as MoPEQ samples it, by Hessian-vector products of ``torch.linalg.norm``, and its standard error.

    ``kind``: ``rademacher`` or ``gaussian`` probes estimate the trace; ``unit`` ones, Gaussian scaled to length 1,
    estimate it divided by the number of weights. Computed in the type of ``weight``.
    """
    if kind not in PROBES or probes < 2:
        raise ValueError(f"{probes} probes of kind {kind!r}; expected at least 2 of {', '.join(PROBES)}")
    generator = torch.Generator(weight.device).manual_seed(seed)
    w = weight.detach().clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(torch.linalg.norm(w), w, create_graph=True)
    samples = torch.empty(probes, dtype=torch.float64)
    for i in range(probes):
        v = torch.randn(w.shape, generator=generator, dtype=w.dtype, device=w.device)
        if kind == "rademacher":
            v = torch.where(v >= 0, 1.0, -1.0).to(w.dtype)
        elif kind == "unit":
            v = v / v.norm()
        (product,) = torch.autograd.grad(gradient, w, v, retain_graph=True)
        samples[i] = (v.double() * product.double()).sum()
    return float(samples.mean()), float(samples.std() / probes**0.5)


def layer_inverse_norm(weights: Mapping[str, Tensor]) -> Tensor:
    """Sum of 1 / ||W||_F over gate, up and down, float64 (experts,).

    weights: ``{"gate_up": (experts, 2I, H), "down": (experts, H, I)}``, gate rows before up rows.
    """
    matrices = [m for group in GROUPS for m in weights[group].chunk(len(MATRICES[group]), dim=1)]
    return torch.stack([1 / m.double().flatten(1).norm(dim=1) for m in matrices]).sum(0)


def inverse_norm(source: Source, spec: MoESpec, track: Track = silent) -> dict[int, list[float]]:
    """The score of every expert. Raises :class:`ModelError` for a matrix of zeros, whose score would be infinite."""
    found = {}
    for layer in track(spec.layers, "weight norms", len(spec.layers)):
        scores = layer_inverse_norm({group: read_group(source, layer, group) for group in GROUPS})
        zero = (~torch.isfinite(scores)).nonzero().flatten().tolist()
        if zero:
            raise ModelError(
                f"expert {layer.experts[zero[0]].id} has a matrix of zeros, so its inverse norm is infinite; "
                f"expected trained weights; use another metric or check the checkpoint"
            )
        found[layer.index] = [float(v) for v in scores]
    return found
