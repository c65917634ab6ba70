"""Dense language models: every linear layer becomes one packed matrix, as those beside the experts do.

A dense model is a specification without expert layers, so the packed format, its reader and its runtime are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mopeq.adapters import SUPPORTED, inventory_of
from mopeq.data.text import check_length, token_batches
from mopeq.errors import ModelError
from mopeq.load import load_original, load_tokenizer
from mopeq.measure import Calibration, Prepared, open_model
from mopeq.moqe.pool import embedding_key
from mopeq.progress import Track, silent
from mopeq.source import Source, open_source
from mopeq.spec import KeptRef, LinearRef, MoESpec

__all__ = ["input_moments", "linear_moments", "open_any", "patches"]


def open_any(model: Any) -> Prepared:
    """A mixture of experts as :func:`mopeq.measure.open_model` opens it, or a dense model."""
    source = open_source(model)
    experts = any("expert" in name for name in (*source.config, *source.shapes))
    if source.config.get("model_type") in SUPPORTED or experts:
        return open_model(model)
    spec = dense_spec(source)
    return Prepared(source, spec, inventory_of(source, spec))


def dense_spec(source: Source) -> MoESpec:
    """Every ``nn.Linear`` of the model transformers makes, and the rest as it is.

    Raises :class:`ModelError` where the files do not store a linear layer under its module's name.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(source.path)
        with torch.device("meta"):
            model = auto.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"transformers makes no language model of {source.path}: {reason}; check config.json"
        ) from error
    head, tied = model.get_output_embeddings(), bool(config.tie_word_embeddings)
    linears = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not (module is head and tied):
            key, shape = f"{name}.weight", (module.out_features, module.in_features)
            if source.shapes.get(key) != shape:
                raise ModelError(
                    f"{source.path} stores {key} as {source.shapes.get(key)}; expected {list(shape)}, a matrix under "
                    f"its module's name; save the model again with transformers"
                )
            group = "lm_head" if module is head else "dense_mlp" if "mlp" in name else "attention"
            linears.append(LinearRef(name, key, shape, group))
    known = {ref.key for ref in linears}
    table = embedding_key(source.shapes)
    kept = (
        KeptRef(key, shape, "embedding" if key == table else "other")
        for key, shape in source.shapes.items()
        if key not in known
    )
    if not linears:
        raise ModelError(f"{source.path} has no linear layers to quantize; give another model")
    return MoESpec(str(source.config["model_type"]), (), tuple(linears), tuple(kept))


def linear_moments(
    opened: Prepared, calibration: Calibration, texts: list[str], dtype: torch.dtype | None, track: Track = silent
) -> dict[str, Tensor]:
    """Moments of the inputs of every linear layer of a dense model, by module, over the calibration text."""
    batches = token_batches(
        texts,
        load_tokenizer(opened.source.path),
        samples=calibration.samples,
        length=calibration.length,
        batch_size=calibration.batch_size,
        seed=calibration.seed,
    )
    model = load_original(opened.source.path, dtype=dtype)
    check_length(model, calibration.length)
    return input_moments(model, {ref.module for ref in opened.spec.linears}, track(batches, "observe", len(batches)))


def input_moments(
    model: nn.Module, modules: Iterable[str], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Sums of x x^T, float32 (in, in), over what each linear layer or convolution multiplies its matrix with.

    Padded positions count like others: calibration texts are cut so that only the last window has any.
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = patches(module, given[0]).float()
            sums[name] = sums.get(name, 0) + rows.T @ rows

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in modules]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """What a convolution or linear layer multiplies its matrix (out, in * k * k) with: (rows, in * k * k)."""
    if not isinstance(module, nn.Conv2d):
        return x.flatten(0, -2)
    options: dict[str, Any] = {n: getattr(module, n) for n in ("kernel_size", "dilation", "padding", "stride")}
    return functional.unfold(x, **options).transpose(1, 2).flatten(0, 1)
