"""Running a model of which one decoder layer at a time is in memory, forward and backward.

The model stands on the meta device, and each decoder layer gets its weights by transformers' own conversion when its
turn comes; embedding and vision tower have theirs before the first layer, the head after the last one. A layer is run
by the model's own ``forward``: the layers before it are passed over, the one just before it gives the output that was
stored, and the pass ends when the layer has run. So masks, positions and what a model does between layers are its own,
and no architecture is written down here.

Activations go to a :class:`Store`: the outputs of a layer, batch by batch, are all that the next one needs, so a run
goes on from the last layer stored. Backward, every layer runs again from its stored input, with the gradient at its
output. The sums are those of one pass through the whole model, in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.activations import Store
from mopeq.ahead import Ahead
from mopeq.analyze.forward import Batch, check_batches, experts_module, inputs_of, logits_of, sampled_loss, token_mask
from mopeq.analyze.observe import Routed, Tap, check_logits, marks_of
from mopeq.analyze.part import parted, woven
from mopeq.errors import ModelError
from mopeq.lazy import Blank, Lazy
from mopeq.load import auto_class, model_config
from mopeq.memory import trim
from mopeq.progress import Track, note, silent
from mopeq.source import Source, close_files, decoder_layer
from mopeq.spec import MoELayer, MoESpec, outside_layers

__all__ = ["Shell", "Store", "backward", "entered", "forward", "passed", "stored_dtype"]


ENTERING = -1
"""The turn before that of the first layer."""


class Reached(Exception):  # noqa: N818  (no error: how a pass ends early)
    """The layer in turn has run; carries its output."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


class Shell:
    """A transformers model whose decoder layers have no weights but the one in turn.

    Raises :class:`ModelError` where transformers does not take the checkpoint's tensors as this model's.
    """

    def __init__(self, source: Source, spec: MoESpec, dtype: torch.dtype | None = None) -> None:
        from accelerate import init_empty_weights

        config = model_config(source.path)
        for part in (config, config.get_text_config()):
            if getattr(part, "output_router_logits", False):
                part.output_router_logits = False  # a balance loss over all layers' routers, which are never together
        self.source, self.spec, self._ahead = source, spec, Ahead(source)
        self.dtype = dtype or config.dtype or stored_dtype(source)
        with init_empty_weights(include_buffers=False):
            self.model: Any = auto_class(config).from_config(config, dtype=self.dtype)
        self.model.eval()
        first = spec.layers[0]
        self._module = first.module.partition(f"layers.{first.index}.")[0] + "layers"
        self.layers: Any = self.model.get_submodule(self._module)
        self._turn = -1
        self._given: Tensor | None = None
        self._images: dict[int, tuple[Batch, dict[tuple[str, int], Any]]] = {}
        for name, module in self.model.named_modules():
            if hasattr(module, "get_image_features"):
                module.get_image_features = self._once_a_batch(name, module.get_image_features)
        for number, layer in enumerate(self.layers):
            layer.forward = self._passing(number, layer.forward)
        embedding = self.model.get_input_embeddings()
        embedding.forward = self._embedding(embedding.forward)
        self._outside = outside_layers(spec, self._keys(None))
        self.sees = self._outside.towers
        self._load(self._outside.always)
        self._parts = {part: self._names_of(getattr(self._outside, part)) for part in ("first", "last")}
        self.model.tie_weights()
        apart = {name for names in self._parts.values() for name in names}
        self._check(lambda n: n not in apart and not n.startswith(self._module + "."), "outside the decoder layers")

    def layer(self, number: int, then: int = -1) -> None:
        """Load the weights of one decoder layer, and begin to read those of the one that is wanted ``then``."""
        self._load(self._keys(number))
        self._check(lambda name: name.startswith(f"{self._module}.{number}."), f"of layer {number}")
        self._ahead.begin(self._keys(then) if 0 <= then < len(self.layers) else [])

    def release(self, number: int) -> None:
        """Let go of the weights of one decoder layer."""
        for module in self.layers[number].modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    _empty(module, name)

    @contextmanager
    def part(self, part: str) -> Iterator[None]:
        """With the weights that are needed ``first``, those of embedding and towers, or ``last``, those of the head."""
        self._load(getattr(self._outside, part))
        self.model.tie_weights()
        try:
            yield
        finally:
            self._release(self._parts[part])
            self.model.tie_weights()

    def enter(self, batches: Sequence[Batch], track: Track = silent) -> list[Tensor]:
        """What enters the first decoder layer, (sequences, length, H) of each batch, images in it."""
        shown = track(batches, "images through the tower", len(batches)) if self.sees else batches
        with self.part("first"), torch.no_grad():
            return [self.run(ENTERING, batch, None) for batch in shown]

    def release_experts(self, module: nn.Module) -> None:
        """Let go of the large weights of an experts module that has run; biases and the gate function stay."""
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.ndim > 2:
                _empty(module, name)

    def run(self, number: int, batch: Batch, given: Tensor | None) -> Tensor:
        """Output (sequences, length, H) of a loaded layer; ``given`` is that of the one before it, or what enters."""
        self._begin(number, batch, given)
        try:
            self.model(**inputs_of(batch, torch.device("cpu")), use_cache=False)
        except Reached as reached:
            return reached.output
        raise ModelError(
            f"{type(self.model).__name__} did not call {self._module}.{number}; expected one call of every decoder "
            f"layer, in order"
        )

    def logits(self, batch: Batch, given: Tensor) -> Tensor:
        """Logits (sequences, length, vocabulary) from the output of the last layer."""
        self._begin(len(self.layers), batch, given)
        return logits_of(self.model, inputs_of(batch, torch.device("cpu")))

    def _begin(self, number: int, batch: Batch, given: Tensor | None) -> None:
        self._turn, self._given = number, given
        self._calls: Counter[str] = Counter()
        self._made = self._images.setdefault(id(batch), (batch, {}))[1]

    def _once_a_batch(self, name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        """What the vision tower makes of a batch's images is kept for the passes of later layers, call by call."""

        def remembered(*args: Any, **kwargs: Any) -> Any:
            call = (name, self._calls[name])
            self._calls[name] += 1
            if call not in self._made:
                self._made[call] = compute(*args, **kwargs)
            return self._made[call]

        return remembered

    def _passing(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def passing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if number < self._turn:
                return self._given if number == self._turn - 1 and self._given is not None else hidden_states
            if self._turn == ENTERING:
                raise Reached(hidden_states)
            entered = self._given if number == 0 and self._given is not None else hidden_states
            raise Reached(_tensor(forward(entered, *args, **kwargs), self._module, number))

        return passing

    def _embedding(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Once the layers run, what the embedding gives is not looked at, but for its shape."""

        def embedded(ids: Tensor) -> Tensor:
            if self._turn == ENTERING:
                return forward(ids)
            return torch.zeros(*ids.shape, self.spec.layers[0].hidden_size, dtype=self.dtype)

        return embedded

    def _names_of(self, keys: Sequence[str]) -> list[str]:
        """The parameters outside the layers that are made of these tensors, which are let go again."""
        meta = {name for name, parameter in self.model.named_parameters() if parameter.is_meta}
        self._load(keys, Blank)
        made = [name for name, parameter in self.model.named_parameters() if name in meta and not parameter.is_meta]
        self._release(made)
        return made

    def _release(self, names: Sequence[str]) -> None:
        for name in names:
            path, _, last = name.rpartition(".")
            _empty(self.model.get_submodule(path), last)

    def _keys(self, number: int | None) -> list[str]:
        """Stored tensors of a decoder layer, or of what is outside; without those that transformers drops."""
        layer, ignored = self.spec.layers[0], frozenset(self.spec.ignored)
        return [key for key in self.source.shapes if key not in ignored and decoder_layer(key, layer) == number]

    def _load(self, keys: Sequence[str], kind: type[Lazy] = Lazy) -> None:
        """Give the model the weights that are made of these tensors."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        mapping: Any = get_model_conversion_mapping(self.model)
        config = LoadStateDictConfig(
            weight_mapping=mapping,
            device_map={"": "cpu"},
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
        )
        lazy: dict[str, Any] = {key: kind(self.source, key) for key in keys}
        info, _ = convert_and_load_state_dict_in_model(self.model, lazy, config)
        close_files()
        trim()
        self.model.requires_grad_(False)
        problems = {"mismatched_keys": "have other shapes in it", "conversion_errors": "cannot be converted"}
        for field, problem in problems.items():
            if names := sorted(str(name) for name in getattr(info, field)):
                raise ModelError(
                    f"{self.source.path}: {len(names)} tensors {problem}, the first is {names[0]}; download it again"
                )

    def _check(self, wanted: Callable[[str], bool], where: str) -> None:
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        missing = sorted(name for name, tensor in tensors if wanted(name) and tensor.is_meta)
        if missing:
            raise ModelError(
                f"{self.source.path}: {len(missing)} weights {where} are missing from it, the first is {missing[0]}; "
                f"download it again"
            )


def forward(
    shell: Shell,
    batches: Sequence[Batch],
    store: Store,
    *,
    until: int | None = None,
    name: str = "hidden",
    track: Track = silent,
) -> Iterator[tuple[MoELayer, nn.Module, Routed]]:
    """Every MoE layer in order with what it saw, its weights resident; those before layer ``until`` are passed over.

    Goes on from what is stored by ``name``. The output of a layer is stored before the layer is given away, and its
    input is dropped when the next one is asked for.
    """
    check_batches(shell.model, batches)
    moe = shell.spec.by_decoder()
    last = max(moe)
    start = until if until is not None else 0
    begin = next((k for k in range(start, -1, -1) if store.has(f"{name} {k}")), None)
    if begin is None or shell.sees:
        begin = entered(shell, batches, store, begin, track, name)
    for number in track(range(begin, last + 1), "calibration data through the model", last + 1 - begin):
        wanted = moe.get(number, []) if number >= start else []
        taps = [Tap(layer, experts_module(shell.model, layer), False, None) for layer in wanted]
        with torch.no_grad():
            outputs = _layer(shell, number, batches, store.get(f"{name} {number}"), taps, track=track)
        store.put(f"{name} {number + 1}", outputs)
        del outputs
        for tap in taps:
            shell.release_experts(tap.module)
            yield tap.layer, tap.module, tap.finish(*marks_of(batches))
        shell.release(number)
        store.drop(f"{name} {number}")
    store.drop(f"{name} {last + 1}")


def backward(
    shell: Shell,
    batches: Sequence[Batch],
    store: Store,
    *,
    measured: Collection[int] | None = None,
    seed: int = 0,
    until: int | None = None,
    track: Track = silent,
) -> Iterator[tuple[MoELayer, nn.Module, Routed]]:
    """Every MoE layer from the last to the first with what it saw and its gradients, its weights resident.

    The loss is that of :func:`~mopeq.analyze.observe`: labels drawn from the model, with the same seed the same ones.
    Batches that are not ``measured`` run forward once, and what MoE layers saw of them waits in the store.
    Goes on from what is stored; layers from ``until`` on need not be given away again.
    """
    check_batches(shell.model, batches)
    whole, (batches, others) = batches, parted(batches, measured)
    moe = shell.spec.by_decoder()
    count, least = len(shell.layers), min(moe)
    least_done = count if until is None else until
    unseen = [layer for layer in shell.spec.layers if layer.decoder < least_done and not store.has(_seen(layer))]
    if others and unseen:
        start = min(layer.decoder for layer in unseen)
        for layer, _, seen in forward(shell, others, store, until=start, name="others", track=track):
            store.put(_seen(layer), [seen.hidden, seen.index, seen.weights])
    top = next((k for k in range(least_done, count + 1) if store.has(f"gradient {k}")), None)
    needed = [*range(1, top or count), *([] if top else [count])]
    if shell.sees or not store.has("hidden 0"):
        entered(shell, batches, store, 0 if store.has("hidden 0") else None, track)
    if lost := [k for k in needed if not store.has(f"hidden {k}")]:
        begin = next(k for k in range(lost[0] - 1, -1, -1) if store.has(f"hidden {k}"))
        for number in track(range(begin, lost[-1]), "calibration data forward", lost[-1] - begin):
            given = store.get(f"hidden {number}")
            with torch.no_grad():
                store.put(f"hidden {number + 1}", _layer(shell, number, batches, given, [], track=track))
            shell.release(number)
    if top is None:
        top = count
        store.put(f"gradient {count}", _loss_gradients(shell, batches, store.get(f"hidden {count}"), seed))
    for number in track(range(top - 1, least - 1, -1), "and back", top - least):
        taps = [Tap(layer, experts_module(shell.model, layer), True, None) for layer in moe.get(number, [])]
        given, gradients = store.get(f"hidden {number}"), store.get(f"gradient {number + 1}")
        with torch.enable_grad():
            gradients = _layer(shell, number, batches, given, taps, gradients, track)
        store.put(f"gradient {number}", gradients)
        del given, gradients
        for tap in taps:
            shell.release_experts(tap.module)
            if number < least_done:
                found = tap.finish(*marks_of(batches))
                if others:
                    hidden, index, weights = store.get(_seen(tap.layer))
                    found = woven(found, Routed(hidden, index, weights, tap.weighs_input), whole, measured)
                yield tap.layer, tap.module, found
            store.drop(_seen(tap.layer))
        shell.release(number)
        store.drop(f"hidden {number + 1}")
        store.drop(f"gradient {number + 1}")


def _seen(layer: MoELayer) -> str:
    """The name of what a layer saw of the batches that are not measured."""
    return f"seen {layer.index}"


def entered(
    shell: Shell, batches: Sequence[Batch], store: Store, begin: int | None, track: Track, name: str = "hidden"
) -> int:
    """Store what enters the first layer where nothing of it is stored; the layer to begin with. Towers run anyway."""
    entered = shell.enter(batches, track)
    if begin is None:
        store.put(f"{name} 0", entered)
    return begin or 0


def _layer(
    shell: Shell,
    number: int,
    batches: Sequence[Batch],
    inputs: Sequence[Tensor],
    taps: Sequence[Tap],
    gradients: Sequence[Tensor] | None = None,
    track: Track = silent,
) -> list[Tensor]:
    """Load one layer and run it over all batches, as :func:`passed` does."""
    shell.layer(number, number + (1 if gradients is None else -1))
    return passed(shell, number, batches, inputs, taps, gradients, track)


def passed(
    shell: Shell,
    number: int,
    batches: Sequence[Batch],
    inputs: Sequence[Tensor],
    taps: Sequence[Tap] = (),
    gradients: Sequence[Tensor] | None = None,
    track: Track = silent,
) -> list[Tensor]:
    """What a loaded layer makes of all batches: its outputs, or, given the gradients at them, those at its inputs."""
    handles = [handle for tap in taps for handle in tap.attach(shell.model)]
    made: list[Tensor] = []
    tokens = 0
    try:
        for at, (batch, given) in enumerate(zip(batches, inputs, strict=True)):
            for tap in taps:
                tap.begin(token_mask(batch).flatten())
            if gradients is None:
                made.append(shell.run(number, batch, given))
            else:
                made.append(_pulled(shell, number, batch, given, gradients[at]))
            for tap in taps:
                tap.check(at)
                tap.end()
            tokens += batch["input_ids"].numel()
            note(track, layer=number, tokens=tokens)
    finally:
        for handle in handles:
            handle.remove()
    return made


def _pulled(shell: Shell, number: int, batch: Batch, given: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at a layer's input; at the first layer nothing asks for it."""
    leaf = given.detach().requires_grad_(number > 0)
    output = shell.run(number, batch, leaf)
    output.backward(gradient)  # type: ignore[no-untyped-call]
    if number == 0:
        return torch.empty(0)
    assert leaf.grad is not None
    return leaf.grad


def _loss_gradients(shell: Shell, batches: Sequence[Batch], hidden: Sequence[Tensor], seed: int) -> list[Tensor]:
    """dL/d(output of the last layer) of each batch."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    with shell.part("last"), torch.enable_grad():
        for number, (batch, given) in enumerate(zip(batches, hidden, strict=True)):
            leaf = given.detach().requires_grad_()
            logits = shell.logits(batch, leaf)
            check_logits(logits.detach()[token_mask(batch)], number)
            sampled_loss(logits, batch, generator).backward()  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            made.append(leaf.grad)
    return made


def _empty(module: nn.Module, name: str) -> None:
    """Let go of a parameter's values."""
    module._parameters[name] = nn.Parameter(torch.empty_like(module.get_parameter(name), device="meta"), False)


def _tensor(output: object, module: str, number: int) -> Tensor:
    if not isinstance(output, Tensor):
        raise ModelError(f"{module}.{number} returns a {type(output).__name__}; expected its hidden states alone")
    return output


def stored_dtype(source: Source) -> torch.dtype:
    """The type that most of a checkpoint's values have."""
    names = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    found = [names[dtype] for dtype in source.dtypes.values() if dtype in names]
    return max(set(found), key=found.count)
