"""Running a model for measurement: which tokens count, its losses, and modes that are undone afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.errors import DataError, ModelError
from mopeq.spec import MoELayer, MoESpec

__all__ = [
    "Batch",
    "all_finite",
    "check_batches",
    "differentiable",
    "experts_module",
    "float32_weights",
    "frozen",
    "inputs_of",
    "logits_of",
    "next_token_loss",
    "rows_of",
    "sampled_loss",
    "sensible",
    "token_mask",
    "vision_mask",
]

Batch = Mapping[str, Tensor]
"""``input_ids`` and ``attention_mask`` (sequences, length), what else the model takes, where there are images
``modality`` (sequences, length), nonzero at image tokens, in conversations ``labels``, -100 outside answers, and
``token_weight`` (sequences, length) where tokens do not count alike in moments and costs."""

OURS = ("modality", "labels", "token_weight")
"""Entries of a batch that the model does not get."""


def check_batches(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Raise :class:`DataError` unless there are tokens and the model's vocabulary has them."""
    if not batches or not any(bool(token_mask(batch).any()) for batch in batches):
        raise DataError("no calibration tokens: found an empty data set; expected text; check the file and its length")
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    largest = max(int(batch["input_ids"].max()) for batch in batches if batch["input_ids"].numel())
    if size is not None and largest >= size:
        raise DataError(
            f"calibration token {largest} where the model's vocabulary has {size}; tokenize with this model's tokenizer"
        )


def token_mask(batch: Batch) -> Tensor:
    """Boolean (sequences, length): the tokens that are not padding."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def vision_mask(batch: Batch) -> Tensor | None:
    """Boolean (sequences, length): the image tokens, None for text alone."""
    modality = batch.get("modality")
    return None if modality is None else modality.bool()


def _predicting(batch: Batch) -> Tensor:
    """Boolean (sequences, length): tokens from which text is predicted. Nothing predicts an image token.

    With ``labels``, only answers are predicted: a model that answers never learned what its users say.
    """
    mask, vision = token_mask(batch), vision_mask(batch)
    if "labels" in batch:
        answered = torch.zeros_like(mask)
        answered[:, :-1] = batch["labels"][:, 1:] != -100
        return mask & answered
    if vision is None:
        return mask
    ahead = torch.zeros_like(vision)
    ahead[:, :-1] = vision[:, 1:]
    return mask & ~ahead


def rows_of(batch: Batch) -> Iterator[Batch]:
    """The sequences of a batch one by one. Text only: tensors whose first axis is not the sequences are refused."""
    count = len(batch["input_ids"])
    if count == 1:
        yield batch
        return
    for name, value in batch.items():
        if len(value) != count:
            raise DataError(
                f"{name!r} has {len(value)} rows for {count} sequences and cannot be split; use batches of one sequence"
            )
    for i in range(count):
        yield {name: value[i : i + 1] for name, value in batch.items()}


def inputs_of(batch: Batch, device: torch.device) -> dict[str, Any]:
    """What the model is called with."""
    return {k: v.to(device) for k, v in batch.items() if k not in OURS}


def logits_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Logits (sequences, length, vocabulary)."""
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(torch.isfinite(tensor).all())


def sensible(logits: Tensor) -> bool:
    """Whether all are numbers below infinity; minus infinity is a word that is ruled out."""
    return bool((logits < torch.inf).all())


def _checked(logits: Tensor) -> Tensor:
    if not sensible(logits):
        raise ModelError("the model's logits are NaN or infinite; expected finite ones; check its weights")
    return logits.float()


def sampled_loss(logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """Sum over tokens of -log p(y|x) in nats, with y drawn from the model's own p: its gradients make the true Fisher.

    Every token that predicts text draws its own y; the inputs x stay those of the data.
    """
    chosen = _checked(logits[_predicting(batch).to(logits.device)])  # (tokens, vocabulary)
    log_p = chosen.log_softmax(-1)
    labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    return -log_p.gather(-1, labels).sum()


def next_token_loss(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Sum of the cross entropy of the data's own next tokens in nats, and the number of tokens predicted."""
    mask = token_mask(batch)
    kept = (mask[:, 1:] & _predicting(batch)[:, :-1]).to(logits.device)
    labels = batch["input_ids"].to(logits.device)[:, 1:][kept]
    loss = nn.functional.cross_entropy(_checked(logits[:, :-1][kept]), labels, reduction="sum")
    return loss, len(labels)


def experts_module(model: nn.Module, layer: MoELayer) -> nn.Module:
    """The experts of a layer, or :class:`ModelError` where the model has no such module."""
    try:
        return model.get_submodule(layer.module)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__} has no module {layer.module!r}; expected the model that this checkpoint describes"
        ) from error


@contextmanager
def frozen(model: nn.Module, trained: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Evaluation mode with gradients for ``trained`` alone; modes and flags are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval()
        for p, _ in flags:
            p.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, training in modes:
            module.training = training


@contextmanager
def float32_weights(model: nn.Module) -> Iterator[None]:
    """All parameters in float32; the originals are kept meanwhile and come back unchanged."""
    originals = [(p, p.data) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32]
    try:
        for p, data in originals:
            p.data = data.float()
        yield
    finally:
        for p, data in originals:
            p.data = data


@contextmanager
def differentiable(model: nn.Module, spec: MoESpec) -> Iterator[None]:
    """Eager experts and attention in plain operations, which can be differentiated twice; undone afterwards.

    Grouped matrix products and fused attention have one derivative only. Raises :class:`ModelError` where the attention
    is neither ``eager`` nor ``sdpa``, and for packed experts, whose weights have no derivative.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    attention = getattr(text, "_attn_implementation", "eager") or "eager"
    if attention not in ("eager", "sdpa"):
        raise ModelError(
            f"attention implementation {attention!r} cannot be differentiated twice; load the model with "
            f"attn_implementation='eager' or 'sdpa'"
        )
    modules = [experts_module(model, layer) for layer in spec.layers]
    packed = [layer.module for layer, m in zip(spec.layers, modules, strict=True) if not experts_parameters(m)]
    if packed:
        raise ModelError(f"{packed[0]} holds no weights that can be differentiated; measure the original model")
    configs: dict[int, Any] = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    before = {key: c._experts_implementation for key, c in configs.items()}
    try:
        for c in configs.values():
            c._experts_implementation = "eager"
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for key, c in configs.items():
            c._experts_implementation = before[key]


def experts_parameters(module: nn.Module) -> tuple[nn.Parameter, ...]:
    """The fused weights (experts, ., .) of gate and up, and of down, in the module's own layout; empty if packed."""
    found = (getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None))
    return tuple(p for p in found if isinstance(p, nn.Parameter))
