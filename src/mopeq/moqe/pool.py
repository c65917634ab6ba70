"""Variants in memory: loaded when they are needed, the least recently used one dropped, equal tensors held once."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.errors import InputError, ModelError
from mopeq.evaluate import resident_bytes
from mopeq.foreign import method_of
from mopeq.load import is_packed, load, load_original, load_source, model_config
from mopeq.moqe.store import tensor_files
from mopeq.source import open_source

__all__ = ["Pool", "embedding_key", "load_variant", "share"]


class Pool:
    """At most ``resident`` variants in memory; ``pool(name)`` gives one, loading it where it is not there.

    ``loads``, ``hits``, ``evictions`` and ``load_seconds`` count what happened.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        loader: Callable[[Path], nn.Module],
        resident: int | None = None,
        held: Mapping[str, Tensor] | None = None,
    ) -> None:
        """``held``: tensors that are in memory anyway, by the models' names for them."""
        if resident is not None and resident < 1:
            raise InputError(f"{resident} resident variants; expected at least 1")
        self.folders, self.loader, self.held = dict(folders), loader, dict(held or {})
        self.most = len(self.folders) if resident is None else min(resident, len(self.folders))
        self.models: OrderedDict[str, nn.Module] = OrderedDict()
        self.loads = self.hits = self.evictions = 0
        self.load_seconds = 0.0

    def __call__(self, name: str) -> Any:
        """The variant of that name."""
        if name in self.models:
            self.hits += 1
            self.models.move_to_end(name)
            return self.models[name]
        while len(self.models) >= self.most:
            self.models.popitem(last=False)
            self.evictions += 1
        started = time.perf_counter()
        model = self.loader(self.folders[name])
        share(model, [self.held, *(dict(tensors_of(other)) for other in self.models.values())])
        self.load_seconds += time.perf_counter() - started
        self.loads += 1
        self.models[name] = model
        return model

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Each name once: first what is in memory, so that a pass over a batch loads as little as it can."""
        return sorted(dict.fromkeys(names), key=lambda name: name not in self.models)

    @property
    def bytes(self) -> int:
        """Of all models in memory; what they share counts once."""
        held = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in self.held.values())
        return resident_bytes(nn.ModuleList([held, *self.models.values()]))


def share(model: nn.Module, others: Iterable[Mapping[str, Tensor]]) -> int:
    """Let equal tensors of equal names be one tensor in memory; returns the bytes saved."""
    twins = list(others)
    saved = 0
    for name, tensor in tensors_of(model):
        for twin in (other[name] for other in twins if name in other):
            alike = (twin.shape, twin.dtype, twin.device) == (tensor.shape, tensor.dtype, tensor.device)
            if alike and torch.equal(twin, tensor):
                tensor.data = twin.data
                saved += tensor.nbytes
                break
    return saved


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    return [*module.named_parameters(), *module.named_buffers()]


DEQUANTIZED = ("gptq", "awq", "auto-round")
"""Quantizers whose packages run on few machines: their folders are dequantized while they load."""


def embedding_key(keys: Iterable[str]) -> str | None:
    """The name of the input embedding among the tensors of a checkpoint."""
    return next((key for key in keys if key.endswith(("embed_tokens.weight", "wte.weight"))), None)


def load_variant(folder: Path, dtype: torch.dtype | None = None, device: str | None = None) -> Any:
    """A variant's folder as a language model in evaluation mode: mopeq's, transformers', GGUF, or one dequantized here.

    Raises :class:`ModelError` where this machine cannot load it.
    """
    if is_packed(folder):
        return load(folder, dtype, device)
    gguf = [] if tensor_files(folder) else sorted(folder.glob("*.gguf"))
    try:
        if gguf:
            from transformers import AutoModelForCausalLM

            auto: Any = AutoModelForCausalLM
            model = auto.from_pretrained(folder, gguf_file=gguf[0].name, dtype=dtype or "auto")
        elif method_of(getattr(model_config(folder), "quantization_config", None)) in DEQUANTIZED:
            model = load_source(open_source(folder), dtype)
        else:
            model = load_original(folder, dtype, device=device)
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, NotImplementedError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"transformers cannot load {folder} here: {reason}; install what its quantizer needs, or leave it out"
        ) from error
    return model if device is None else model.to(device)
