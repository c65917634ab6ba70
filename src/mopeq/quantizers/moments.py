"""Second moments of expert inputs: the rule for experts with few tokens, and the output error they imply."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mopeq.qtensor import Codes, dequantize

__all__ = ["fallback_moments", "moment_error"]


def fallback_moments(
    moments: Tensor, tokens: Tensor | Sequence[int], minimum: int, mean: Tensor | None = None
) -> tuple[Tensor, tuple[int, ...]]:
    """Moments fit for quantizing when some experts saw fewer than ``minimum`` tokens, and those experts' indices.

    moments: (experts, in, in) sums over each expert's tokens; tokens: (experts,) their counts n. An expert with n <
    minimum is filled up to ``minimum`` tokens with the layer's mean token: ``H + (minimum - n) * sum(H) / sum(n)``,
    which is the pooled moments alone where n = 0. A layer that saw no token at all gets identities: plain squared
    error. The input is not changed; it is returned itself if no expert falls short. ``mean`` (in, in) is the layer's
    mean token ``sum(H) / sum(n)`` where ``moments`` are of some of its experts only.
    """
    counts = torch.as_tensor(tokens, device=moments.device).to(moments.dtype)
    if counts.shape != moments.shape[:1]:
        raise ValueError(f"{tuple(counts.shape)} token counts for {moments.shape[0]} experts")
    short = (counts < minimum).nonzero().flatten()
    affected = tuple(int(e) for e in short)
    if not affected:
        return moments, ()
    total = counts.sum()
    filled = moments.clone()
    if mean is None and total == 0:
        filled[:] = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    else:
        pooled = moments.sum(0) / total if mean is None else mean
        for e in affected:
            filled[e] += (minimum - counts[e]) * pooled
    return filled, affected


def moment_error(weight: Tensor, codes: Codes, moments: Tensor) -> Tensor:
    """tr(D H D^T) of the error D = weight - dequantized of each expert: the squared output error over the tokens in H.

    weight: (experts, out, in); moments: (experts, in, in). Returns float64 (experts,).
    """
    error = weight.float() - dequantize(codes)
    return ((error @ moments.float()) * error).sum((1, 2), dtype=torch.float64)
