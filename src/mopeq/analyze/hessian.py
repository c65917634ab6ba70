"""Hessian trace of the calibration loss with respect to each expert's weights, by Hutchinson's estimator.

For a probe v of random signs E[v^T H v] = tr H (Hutchinson 1990). One probe covers the weights of all experts: expert
e's part v_e^T (H v)_e still has expectation tr H_ee, because the signs of different experts are independent.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    next_token_loss,
)
from mopeq.errors import DataError, ModelError
from mopeq.progress import Track, silent
from mopeq.spec import MoESpec

__all__ = ["hessian_trace", "slice_traces"]

PerLayer = dict[int, list[float]]


def slice_traces(loss: Tensor, parameters: Sequence[Tensor], probes: int, generator: torch.Generator) -> list[Tensor]:
    """Hutchinson samples of the trace of each diagonal block, one block per index of the parameters' first axis.

    loss: a scalar that depends on the parameters (experts, ...) and can be differentiated twice. Returns for each
    parameter float64 (probes, experts), the samples whose mean estimates tr H_ee; 0 for one that the loss does not
    depend on.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    samples = [torch.zeros(probes, len(p), dtype=torch.float64) for p in parameters]
    for i in range(probes):
        signs = [
            torch.randint(0, 2, p.shape, generator=generator, device=p.device).to(p.dtype).mul_(2).sub_(1)
            for p in parameters
        ]
        products = torch.autograd.grad(
            gradients, parameters, signs, retain_graph=i + 1 < probes, materialize_grads=True
        )
        for sample, v, hv in zip(samples, signs, products, strict=True):
            sample[i] = (v * hv).flatten(1).sum(1, dtype=torch.float64).cpu()
    return samples


def hessian_trace(
    model: nn.Module,
    spec: MoESpec,
    batches: Sequence[Batch],
    *,
    probes: int = 8,
    seed: int = 0,
    track: Track = silent,
) -> tuple[PerLayer, PerLayer]:
    """Trace of the Hessian of the mean next-token cross entropy (nats) for each expert, and its standard error.

    An expert's weights are its gate, up and down matrices; biases are left out. The standard error is that of the
    probes, for these data; it says nothing about other data. Runs in float32 (a model in another type is converted and
    put back), with eager experts and plain attention. Memory: the graph of one batch's gradient, so keep batches small;
    time: about ``2 + 2 * probes`` backward passes a batch.

    Raises:
        DataError: no token to predict, or fewer than two probes.
        ModelError: an attention that has no second derivative, packed experts, or values that are not finite.
    """
    if probes < 2:
        raise DataError(f"{probes} probes; expected at least 2, for a standard error")
    check_batches(model, batches)
    parameters = [p for layer in spec.layers for p in experts_parameters(experts_module(model, layer))]
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    totals = [torch.zeros(probes, len(p), dtype=torch.float64) for p in parameters]
    predicted = 0
    with differentiable(model, spec), float32_weights(model), frozen(model, parameters), torch.enable_grad():
        for batch in track(batches, "Hessian trace", len(batches)):
            loss, count = next_token_loss(logits_of(model, inputs_of(batch, device)), batch)
            if not count:
                continue
            predicted += count
            for total, part in zip(totals, slice_traces(loss, parameters, probes, generator), strict=True):
                total += part
    if not predicted:
        raise DataError("no token to predict: every calibration sequence has one token; give longer text")
    return _per_layer(spec, [total / predicted for total in totals])


def _per_layer(spec: MoESpec, samples: Sequence[Tensor]) -> tuple[PerLayer, PerLayer]:
    """Means and standard errors over probes of the sum of an expert's two blocks."""
    means: PerLayer = {}
    errors: PerLayer = {}
    for i, layer in enumerate(spec.layers):
        both = samples[2 * i] + samples[2 * i + 1]
        if not bool(torch.isfinite(both).all()):
            raise ModelError(
                f"the Hessian trace of layer {layer.index} is NaN or infinite; expected finite weights and activations"
            )
        means[layer.index] = both.mean(0).tolist()
        errors[layer.index] = (both.std(0) / len(both) ** 0.5).tolist()
    return means, errors
