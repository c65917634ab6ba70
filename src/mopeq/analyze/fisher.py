"""Trace of the true Fisher information of each expert's weights: labels are drawn from the model, not read from the
data.

tr F_e = E_x E_{y ~ p(y|x)} ||d log p(y|x) / d W_e||^2. It equals the trace of the Gauss-Newton matrix of KL(p || model)
at the model itself, hence what small changes of the weights cost (Martens, "New Insights and Perspectives on the
Natural Gradient Method", arXiv 1412.1193). Taking the data's labels instead would give the empirical Fisher, which does
not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.analyze.forward import (
    Batch,
    check_batches,
    differentiable,
    experts_module,
    experts_parameters,
    float32_weights,
    frozen,
    inputs_of,
    logits_of,
    rows_of,
    sampled_loss,
    token_mask,
    vision_mask,
)
from mopeq.errors import DataError, ModelError
from mopeq.progress import Track, silent
from mopeq.seam import dealt
from mopeq.spec import MoELayer, MoESpec

__all__ = ["fisher", "ratio"]

PerLayer = dict[int, list[float]]


def ratio(squares: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squares over sum of tokens, and the standard error of this ratio of means over the draws.

    squares: float64 (draws, ...); tokens: (draws,). Both results have the shape (...).
    """
    n, total = len(tokens), tokens.double().sum()
    mean = squares.sum(0) / total
    left = squares - tokens.double().view(-1, *[1] * (squares.dim() - 1)) * mean
    return mean, (left.square().sum(0) * n / (n - 1)).sqrt() / total


class _Cut:
    """Hooks on a layer's experts that let gradients reach their weights from one kind of tokens alone."""

    def __init__(self, kind: str, layer: MoELayer) -> None:
        self.kind, self.layer, self.rows, self._inside = kind, layer, torch.empty(0, dtype=torch.bool), False

    def attach(self, model: nn.Module) -> list[Any]:
        """Hook the module, and the one that deals out tokens, if there is one."""
        handles: list[Any] = [experts_module(model, self.layer).register_forward_hook(self, with_kwargs=True)]
        if self.layer.dealer:
            dealer = model.get_submodule(self.layer.dealer)
            handles.append(dealer.register_forward_pre_hook(self._dealt, with_kwargs=True))
        return handles

    def begin(self, batch: Batch) -> None:
        """A batch starts."""
        vision = vision_mask(batch)
        vision = torch.zeros_like(token_mask(batch)) if vision is None else vision
        self.rows = (vision if self.kind == "vision" else ~vision).flatten()

    def _dealt(self, dealer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.rows = self.rows.cpu()[dealt(dealer, args, kwargs, self.layer.for_images)[1]]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if self._inside:  # the second call, below
            return output
        still = {name: p.detach() for name, p in module.named_parameters()}
        self._inside = True
        fixed = torch.func.functional_call(module, still, args, kwargs)
        self._inside = False
        shape = -1, len(self.rows), output.shape[-1]  # experts that weigh their input have all tokens for each expert
        rows = self.rows.to(output.device)[None, :, None]
        return torch.where(rows, output.reshape(shape), fixed.reshape(shape)).reshape(output.shape)


def fisher(
    model: nn.Module,
    spec: MoESpec,
    batches: Sequence[Batch],
    *,
    seed: int = 0,
    samples: int = 1,
    kind: str = "",
    track: Track = silent,
) -> tuple[PerLayer, PerLayer]:
    """Fisher trace per calibration token of each expert's gate, up and down weights, and its standard error.

    kind: ``vision`` or ``text`` takes the weights as those tokens alone use them: what a change costs that only image
    tokens, or only the others, see. The two do not add up to the whole, which has twice their inner product besides.

    One draw is one sequence with labels sampled at every token: the squared gradient of the summed log-likelihood.
    Terms between different tokens of a sequence vanish in expectation, because labels are drawn independently given the
    inputs. The standard error is over the draws (sequences times ``samples``), so it covers both labels and data. Runs
    in float32 with eager experts; memory: the gradient of one layer's experts at a time, and the graph of one sequence.

    Raises:
        DataError: no tokens, or a single draw.
        ModelError: packed experts, or values that are not finite.
    """
    check_batches(model, batches)
    draws = sum(len(batch["input_ids"]) for batch in batches) * samples
    if draws < 2:
        raise DataError(f"{draws} draws (sequences times samples); expected at least 2, for a standard error")
    owners = {p: layer.index for layer in spec.layers for p in experts_parameters(experts_module(model, layer))}
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    squares: dict[int, list[Tensor]] = {layer.index: [] for layer in spec.layers}
    current: dict[int, Tensor] = {}
    tokens: list[int] = []

    def caught(parameter: Tensor) -> None:
        """The gradient of one parameter is complete: keep its squared norm per expert and let it go."""
        assert parameter.grad is not None
        layer = owners[parameter]  # type: ignore[index]
        square = parameter.grad.flatten(1).square().sum(1, dtype=torch.float64).cpu()
        current[layer] = current[layer] + square if layer in current else square
        parameter.grad = None

    handles: list[Any] = []
    sequences = [row for batch in batches for row in rows_of(batch)]
    cuts = [_Cut(kind, layer) for layer in spec.layers if kind]
    kept = {p: p.grad for p in owners}
    try:
        with differentiable(model, spec), float32_weights(model), frozen(model, owners), torch.enable_grad():
            for p in owners:
                p.grad = None
                handles.append(p.register_post_accumulate_grad_hook(caught))  # type: ignore[no-untyped-call]
            handles += [handle for cut in cuts for handle in cut.attach(model)]
            for row in track(sequences, "Fisher information", len(sequences)):
                count = int(token_mask(row).sum())
                if not count:
                    continue
                for _ in range(samples):
                    for cut in cuts:
                        cut.begin(row)
                    loss = sampled_loss(logits_of(model, inputs_of(row, device)), row, generator)
                    loss.backward()  # type: ignore[no-untyped-call]
                    for layer in spec.layers:
                        zero = torch.zeros(len(layer.experts), dtype=torch.float64)
                        squares[layer.index].append(current.get(layer.index, zero))
                    current.clear()
                    tokens.append(count)
    finally:
        for handle in handles:
            handle.remove()
        for p, gradient in kept.items():
            p.grad = gradient
    means: PerLayer = {}
    errors: PerLayer = {}
    for index, values in squares.items():
        mean, error = ratio(torch.stack(values), torch.tensor(tokens))
        if not bool(torch.isfinite(mean).all()):
            raise ModelError(
                f"the Fisher information of layer {index} is NaN or infinite; expected finite weights and activations"
            )
        means[index], errors[index] = mean.tolist(), error.tolist()
    return means, errors
