"""One pass of calibration data through a model, recorded at the experts modules from outside.

Everything else is a pure function of what is recorded here. Memory, per token and MoE layer: ``hidden_size`` values of
the model's type (2 bytes each in bfloat16), as many again with gradients, and 12 bytes for each chosen expert.
OLMoE-1B-7B (16 layers, 2048 wide, 8 experts a token) takes 64 KiB a token, 128 KiB with gradients, 1.5 KiB of it for
the routing.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.analyze.forward import (
    Batch,
    all_finite,
    check_batches,
    experts_module,
    frozen,
    inputs_of,
    logits_of,
    sampled_loss,
    sensible,
    token_mask,
)
from mopeq.errors import ModelError
from mopeq.progress import Track, silent
from mopeq.seam import dealt, weighs_input
from mopeq.spec import MoELayer, MoESpec

__all__ = ["Routed", "Tap", "check_logits", "expert_rows", "marks_of", "observe"]


@dataclass(frozen=True)
class Routed:
    """What one MoE layer saw of the calibration tokens; padding is left out. All on the CPU.

    A layer for tokens of one kind has chosen no experts for the others, and zeros for them.

    hidden: (tokens, H), the experts' input. index: int64 (tokens, k), the chosen experts, -1 where a slot chose none.
    weights: float32 (tokens, k), the routing weights; with ``weighs_input`` they scale the input, otherwise the output.
    gradient: (measured tokens, H), dL/d(experts' output) of L = sum of -log p(y|x) over the tokens of a sequence, y
    drawn from p; or None. measured: bool (tokens,), those that costs are measured on; None for all.
    vision: bool (tokens,), the image tokens; None for text alone.
    token_weight: float32 (tokens,), what each counts in moments and costs; None for 1 each.
    """

    hidden: Tensor
    index: Tensor
    weights: Tensor
    weighs_input: bool
    gradient: Tensor | None = None
    vision: Tensor | None = None
    token_weight: Tensor | None = None
    measured: Tensor | None = None

    def kinds(self) -> dict[str, Tensor]:
        """Where there are images, which tokens are of which kind, bool (tokens,), by the suffix of their metrics."""
        return {} if self.vision is None else {".vision": self.vision, ".text": ~self.vision}

    def only(self, rows: Tensor) -> Routed:
        """As if no expert had seen the tokens outside ``rows`` (bool), which still count as calibration tokens."""
        return replace(self, index=torch.where(rows[:, None], self.index, -1))

    def at(self, rows: Tensor) -> Routed:
        """Some tokens alone, without gradients."""
        vision, weight = (None if mark is None else mark[rows] for mark in (self.vision, self.token_weight))
        return Routed(
            self.hidden[rows], self.index[rows], self.weights[rows], self.weighs_input,
            vision=vision, token_weight=weight,
        )  # fmt: skip

    def part(self) -> Routed:
        """The measured tokens alone, with their gradients."""
        return self if self.measured is None else replace(self.at(self.measured), gradient=self.gradient)


def expert_rows(routed: Routed, experts: int | Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """For each expert the tokens (rows) routed to it, int64 (n,), in order, and their routing weights, float32 (n,).

    experts: how many the layer has, or which are wanted.
    """
    if not isinstance(experts, int):
        everyone = expert_rows(routed, 1 + max(experts))
        return [everyone[e] for e in experts]
    flat = routed.index.flatten()
    order = flat.argsort(stable=True)
    order = order[int((flat < 0).sum()) :]
    counts = torch.bincount(flat[order], minlength=experts)
    rows, weights = order // routed.index.shape[1], routed.weights.flatten()[order]
    return list(zip(torch.split(rows, counts.tolist()), torch.split(weights, counts.tolist()), strict=True))


def observe(
    model: nn.Module,
    spec: MoESpec,
    batches: Sequence[Batch],
    *,
    gradients: bool = False,
    seed: int = 0,
    store_dtype: torch.dtype | None = None,
    track: Track = silent,
) -> dict[int, Routed]:
    """Run the batches through the model and record every MoE layer's inputs, choices and routing weights.

    Args:
        model: a transformers model with the modules that ``spec`` names; its weights, modes and flags stay as they are.
        spec: the model's specification.
        batches: dictionaries of ``input_ids``, ``attention_mask``, optionally ``modality`` (nonzero at image tokens)
            ``token_weight``, and what else the model takes.
        gradients: also record the gradients at the experts' outputs, by one backward pass a batch.
        seed: of the labels that the gradients need.
        store_dtype: type of the stored inputs and gradients; None keeps the model's.
        track: progress.

    Returns:
        ``{MoE layer: Routed}``, tokens in the order of the batches.

    Raises:
        DataError: no tokens, or tokens outside the vocabulary.
        ModelError: values that are not finite, with the layer in which they first appear; or a model without the
            modules.
    """
    check_batches(model, batches)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    taps = [Tap(layer, experts_module(model, layer), gradients, store_dtype) for layer in spec.layers]
    handles: list[Any] = []
    try:
        for tap in taps:
            handles += tap.attach(model)
        with frozen(model), torch.set_grad_enabled(gradients):
            for number, batch in enumerate(track(batches, "calibration data through the model", len(batches))):
                keep = token_mask(batch)
                for tap in taps:
                    tap.begin(keep.flatten())
                logits = logits_of(model, inputs_of(batch, device))
                _check(taps, logits.detach()[keep.to(device)], number)
                if gradients:
                    sampled_loss(logits, batch, generator).backward()  # type: ignore[no-untyped-call]
                del logits
                for tap in taps:
                    tap.end()
    finally:
        for handle in handles:
            handle.remove()
    marks = marks_of(batches)
    return {tap.layer.index: tap.finish(*marks) for tap in taps}


def marks_of(batches: Sequence[Batch]) -> tuple[Tensor | None, Tensor | None]:
    """Of the tokens that are not padding, over all batches: which are image tokens, bool (tokens,), None for text
    alone; and what each counts, float32 (tokens,), None where they count alike.
    """

    def joined(name: str, otherwise: int) -> Tensor | None:
        if all(name not in batch for batch in batches):
            return None
        kept = [(token_mask(batch), batch.get(name)) for batch in batches]
        parts = [torch.full_like(keep[keep], otherwise, dtype=torch.float32) if value is None else value[keep].float()
                 for keep, value in kept]  # fmt: skip
        return torch.cat([part.cpu() for part in parts])

    vision = joined("modality", 0)
    return None if vision is None else vision.bool(), joined("token_weight", 1)


def _check(taps: Sequence[Tap], logits: Tensor, number: int) -> None:
    """Raise :class:`ModelError` naming the first place that is not finite."""
    for tap in taps:
        tap.check(number)
    check_logits(logits, number)


def check_logits(logits: Tensor, number: int) -> None:
    """Raise :class:`ModelError` where the logits of a batch are no numbers."""
    if not sensible(logits):
        raise ModelError(
            f"the logits of batch {number} are NaN or infinite though the last MoE layer gives finite values; "
            f"check the final norm and lm_head"
        )


class Tap:
    """Hooks on one MoE layer, and what they caught."""

    def __init__(self, layer: MoELayer, module: nn.Module, gradients: bool, dtype: torch.dtype | None) -> None:
        self.layer, self.module, self.gradients, self.dtype = layer, module, gradients, dtype
        self.weighs_input = weighs_input(module)
        self.parts: dict[str, list[Tensor]] = {"hidden": [], "index": [], "weights": [], "gradient": []}
        self.signature = inspect.signature(module.forward)
        self.keep = torch.empty(0, dtype=torch.bool)
        self.dealt: list[Tensor] = []
        self.bad = ""
        self.calls = 0

    def attach(self, model: nn.Module) -> list[Any]:
        """Hook the module, for experts that weigh their input the router, which alone knows the choice, and the module
        that deals out tokens, if there is one.
        """
        if self.weighs_input:
            first = model.get_submodule(self.layer.router).register_forward_hook(self._routing)
        else:
            first = self.module.register_forward_pre_hook(self._called, with_kwargs=True)
        handles = [first, self.module.register_forward_hook(self._output)]
        if self.layer.dealer:
            dealer = model.get_submodule(self.layer.dealer)
            handles.append(dealer.register_forward_pre_hook(self._dealt, with_kwargs=True))
        return handles

    def begin(self, keep: Tensor) -> None:
        """A batch starts; ``keep`` bool (rows,) marks the tokens that are not padding."""
        self.keep, self.bad, self.calls = keep, "", 0

    def check(self, number: int) -> None:
        """Raise :class:`ModelError` if something in this batch was not finite."""
        if self.bad:
            raise ModelError(
                f"layer {self.layer.index}: NaN or infinite values {self.bad} {self.layer.module} in batch {number}; "
                f"expected finite ones; check the weights up to this layer, or run in float32 or bfloat16"
            )

    def end(self) -> None:
        """A batch is through."""
        wanted = len(self.parts["hidden"]) if self.gradients else 0
        if self.calls != 1 or len(self.parts["gradient"]) != wanted:
            raise ModelError(
                f"{self.layer.module} was called {self.calls} times in one forward pass and its gradient came "
                f"{len(self.parts['gradient'])} times in {len(self.parts['hidden'])}; expected once each"
            )

    def finish(self, vision: Tensor | None, token_weight: Tensor | None = None) -> Routed:
        """Everything caught, joined; the parts are let go."""
        joined = {name: torch.cat(parts) for name, parts in self.parts.items() if parts}
        self.parts.clear()
        if self.dealt:
            rows = torch.cat(self.dealt)
            joined = {name: _among(rows, part, -1 if name == "index" else 0) for name, part in joined.items()}
        seen = Routed(joined["hidden"], joined["index"], joined["weights"], self.weighs_input)
        return replace(seen, gradient=joined.get("gradient"), vision=vision, token_weight=token_weight)

    def _dealt(self, dealer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Of all tokens, those that the module will get count. Where there are no image tokens, it is not called."""
        hidden, rows = dealt(dealer, args, kwargs, self.layer.for_images)
        self.keep = self.keep.cpu()
        self.dealt.append(rows[self.keep])
        self.keep = self.keep[rows]
        if self.layer.for_images and not rows.any():
            none = hidden.new_empty(0, hidden.shape[-1])
            self._caught(none, *(none.new_empty(0, self.layer.top_k) for _ in range(2)))
            if self.gradients:
                self._store("gradient", none, self.dtype)

    def _store(self, name: str, value: Tensor, dtype: torch.dtype | None) -> None:
        """The rows that count of a tensor (rows, ...), on the CPU."""
        value = value.detach()
        if len(value) != len(self.keep):
            raise ModelError(
                f"{self.layer.module} got {len(value)} rows for {len(self.keep)} tokens; expected one row a token"
            )
        kept = value[self.keep.to(value.device)]
        if name == "hidden" and not all_finite(kept):
            self.bad = self.bad or "enter"
        self.parts[name].append(kept.to("cpu", dtype or kept.dtype))

    def _caught(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        self.calls += 1
        top_k = index.shape[-1]
        self._store("hidden", hidden.reshape(-1, hidden.shape[-1]), self.dtype)
        index = torch.where(index < len(self.layer.experts), index, -1)
        self._store("index", index.reshape(-1, top_k), torch.int64)
        self._store("weights", weights.reshape(-1, top_k), torch.float32)

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, index, weights = self.signature.bind(*args, **kwargs).args[:3]
        self._caught(hidden, index, weights)

    def _routing(self, router: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        scores, logits = output  # both (tokens, experts); scores are 0 for experts not chosen
        index = logits.topk(self.layer.top_k, dim=-1).indices
        self._caught(args[0], index, scores.gather(-1, index))

    def _output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        flat = output.detach().reshape(
            -1, len(self.keep), output.shape[-1]
        )  # (1, or experts that weigh input; rows; H)
        if not self.bad and not all_finite(flat[:, self.keep.to(flat.device)]):
            self.bad = "leave"
        if self.gradients:
            if not output.requires_grad:  # nothing before it does: the graph starts here, at a copy that may be changed
                output = output.detach().requires_grad_().clone()
            output.register_hook(self._gradient)  # type: ignore[no-untyped-call]
        return output

    def _gradient(self, gradient: Tensor) -> None:
        # experts that weigh their input give one output per expert and token; their sum has the gradient of each
        self._store("gradient", gradient.reshape(-1, len(self.keep), gradient.shape[-1])[0], self.dtype)


def _among(rows: Tensor, part: Tensor, otherwise: int) -> Tensor:
    """``part`` (n, ...) at the n of ``rows`` bool (tokens,) that are marked, and ``otherwise`` at the others."""
    made = part.new_full((len(rows), *part.shape[1:]), otherwise)
    made[rows] = part
    return made
