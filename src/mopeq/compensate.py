"""Packing layer by layer on what the layers packed before give, so that each makes up for their errors.

Two runs of the calibration data go through the model side by side: through the original, and through the model packed
so far. What GPTQ then rounds of an expert are not its own weights W but those that least squares give it: with x~ what
it sees in the packed model and y what it ought to give there, W + (sum of c^2 (y - W x~) x~^T) (H + l 1)^-1, H the sum
of c^2 x~ x~^T, c the routing weight.

For gate and up, y is W x with x the input in the original (GPTAQ, "Efficient Finetuning-Free Quantization for
Asymmetric Calibration", arXiv 2504.02692, has W x at the place of each linear, and no l). For down it is W h(x), h the
hidden activations of the original expert, and a share of what the layer's output still lacks: the error that the
residual stream brings along, what attention lost, what was left out. That takes in one step what AutoRound (arXiv
2309.05516) learns by gradients when its blocks get quantized inputs. The shares of a token's experts are c / sum c^2,
the least change of weights that adds up to the whole.

l is as large as ``PRIOR`` further tokens a dimension would make the mean of H's diagonal: an expert that few tokens
reached stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.analyze import Routed
from mopeq.analyze.forward import Batch, check_batches, experts_module, token_mask
from mopeq.analyze.moments import expert_inputs
from mopeq.analyze.observe import Tap, expert_rows, marks_of
from mopeq.analyze.slab import Slab
from mopeq.checkpoint import Stored, linear_precisions
from mopeq.errors import ModelError
from mopeq.journal import Journal
from mopeq.kernels.layout import GroupLayout
from mopeq.measure import Prepared
from mopeq.pack import Coded, LayerTensors, round_linear, rounded_group
from mopeq.precision import GROUPS, LEFT_OUT, MATRICES, Precision, PrecisionMap, ProjectionGroup
from mopeq.progress import Track, silent
from mopeq.qtensor import QTensor, dequantize
from mopeq.runtime import experts as packing
from mopeq.runtime.packed import prepare
from mopeq.seam import activate
from mopeq.source import decoder_layer
from mopeq.spec import MoELayer
from mopeq.stream import Shell, Store, entered, passed

__all__ = ["COMPENSATING", "Both", "Pair", "compensated", "compensating", "gain_of", "shifted"]

COMPENSATING = ("gptq",)
"""Quantizers that round what they are given, and so can round shifted weights."""

PRIOR = 16
"""Tokens for each input of a matrix by which its moments are damped where it makes up for errors (docs/results.md)."""
ALIKE = 0.2
"""Share of what a layer adds by its experts that may be other than their output times a number: types' rounding."""


@dataclass(frozen=True)
class Pair:
    """What one MoE layer saw with the layers before it packed, and what it ought to give. All on the CPU.

    seen: of the packed model; experts that are left out are chosen by no token. wanted: (tokens, H), the inputs at
    which its experts' original outputs are wanted. missing: (tokens, H), what the output of the experts still lacks
    when they give these.
    """

    seen: Routed
    wanted: Tensor
    missing: Tensor


def shifted(weight: Tensor, cross: Tensor, moments: Tensor, tokens: int) -> Tensor:
    """The weights (rows, in) of least squared error: ``weight + cross (moments + l 1)^-1``.

    cross: (rows, in), sum of c^2 (y - W x) x^T. moments: (in, in), sum of c^2 x x^T over that many ``tokens``.
    """
    inputs = moments.shape[-1]
    damping = PRIOR * float(moments.diagonal().sum(dtype=torch.float64)) / max(1, tokens)
    if damping <= 0:
        return weight
    damped = moments + damping * torch.eye(inputs, dtype=moments.dtype, device=moments.device)
    found: Tensor = weight + torch.linalg.solve(damped, cross, left=False)
    return found


def compensated(
    slab: Slab, wanted: Mapping[ProjectionGroup, Sequence[Precision]], method: str, pair: Pair, module: nn.Module
) -> Coded:
    """Codes of some experts: gate and up from shifted weights, then down, on what these codes give. 16 bits stay.

    Raises as :func:`~mopeq.quantizers.gptq` does.
    """
    assert slab.moments is not None
    rows, squares = expert_rows(pair.seen, slab.experts), _squares(pair.seen)
    up, down = (slab.weights[group].clone() for group in GROUPS)
    for i, (own, _) in enumerate(rows):
        if len(own) and 0 < wanted["gate_up"][i].bits < 16:
            cross = torch.zeros_like(slab.moments.gate_up[i])
            for seen, want, c, _ in _tokens(pair, rows[i], squares, up.device):
                cross.addmm_(((want - seen) * c).T, seen * c)
            up[i] = shifted(up[i], up[i] @ cross, slab.moments.gate_up[i], len(own))
    given = slab.weights["gate_up"].clone()
    for at, codes in rounded_group(up, slab.moments.gate_up, wanted["gate_up"], method):
        given[at] = given[at].to(torch.bfloat16).float() if codes is None else dequantize(codes)
        yield "gate_up", at, codes
    for i, (own, _) in enumerate(rows):
        if len(own) and 0 < wanted["down"][i].bits < 16:
            expert, moments = slab.experts[i], torch.zeros_like(slab.moments.down[i])
            cross = torch.zeros_like(down[i])
            for seen, want, c, missing in _tokens(pair, rows[i], squares, down.device):
                h = activate(module, seen @ given[i].T, expert)
                whole = activate(module, want @ slab.weights["gate_up"][i].T, expert)
                moments.addmm_((h * c).T, h * c)
                cross.addmm_((((whole - h) @ down[i].T) * c + missing).T, h * c)
            down[i] = shifted(down[i], cross, moments, len(own))
    # rounded on what the original gate and up give there: on what the codes give the KL was the same
    for at, codes in rounded_group(down, slab.moments.down, wanted["down"], method):
        yield "down", at, codes


def _squares(seen: Routed) -> Tensor:
    """Sum of c^2 over a token's experts, (tokens, 1)."""
    scale = torch.ones_like(seen.weights) if seen.weighs_input else seen.weights
    return torch.where(seen.index >= 0, scale, 0.0).square().sum(-1, keepdim=True)


def _tokens(
    pair: Pair, rows: tuple[Tensor, Tensor], squares: Tensor, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of the tokens of an expert, ``rows`` and routing weights, in chunks: inputs seen and wanted (n, H), c (n, 1), and
    c times its share of what is missing (n, H). What a token counts is in c, by its root.
    """
    seen = pair.seen
    for r, x, c in expert_inputs(seen, *rows, device):
        want = x if pair.wanted is seen.hidden else pair.wanted[r].to(device).float()
        share = c.square() / squares[r].to(device).clamp_min(torch.finfo(torch.float32).tiny)
        counts = 1.0 if seen.token_weight is None else seen.token_weight[r].sqrt().to(device)[:, None]
        yield x, want, c * counts, pair.missing[r].to(device).float() * share * counts


def compensating(
    opened: Prepared, precisions: PrecisionMap, journal: Journal, dtype: torch.dtype | None, method: str,
    pack: Callable[..., Iterable[Stored]], track: Track = silent,
) -> tuple[LayerTensors, Callable[[], None]]:  # fmt: skip
    """What packs the MoE layers of a model one after the other for :func:`~mopeq.pack.write_packed`, and lets go.

    pack: :func:`~mopeq.pack.pack_experts`, but for what the layer decides.
    """
    both: Both | None = None

    def tensors(layer: MoELayer, short: list[str]) -> Iterable[Stored]:
        nonlocal both
        if both is None:
            both = Both(Shell(opened.source, opened.spec, dtype), opened.batches, Store(journal), precisions)
        made: list[Stored] = []
        for at, module, pair in both.reach(layer, track):
            coded = partial(compensated, method=method, pair=pair, module=module)
            fallen = short if at.index == layer.index else []
            made = list(pack(at, precisions, method, fallen, pair.seen, module, coded=coded))
            both.take(at, made, track)
        return made

    def release() -> None:
        nonlocal both
        Store(journal).clear()
        both = None

    return tensors, release


class _Feeding(Tap):
    """Records what an experts module is called with, and gives it other inputs: batch by batch ``hidden`` (tokens, H),
    and no weight to experts that are left out.
    """

    def __init__(
        self, layer: MoELayer, module: nn.Module, hidden: Tensor, keep: Sequence[Tensor], left_out: Tensor | None
    ) -> None:
        super().__init__(layer, module, False, None)
        self.hidden, self.left_out = hidden, left_out
        self.rows = iter(zip(keep, torch.split(hidden, [int(kept.sum()) for kept in keep]), strict=True))

    @property
    def as_called(self) -> bool:
        """Whether it keeps its inputs: they are weighed already, or those of some tokens alone."""
        return self.weighs_input or bool(self.layer.dealer)

    def attach(self, model: nn.Module) -> list[Any]:
        """The hooks of a tap, and then one that changes what the module is called with."""
        return [*super().attach(model), self.module.register_forward_pre_hook(self._feed, with_kwargs=True)]

    def _feed(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given, *others = self.signature.bind(*args, **kwargs).args
        if not self.as_called:
            kept, inputs = next(self.rows)
            flat = given.flatten(0, -2).clone()
            flat[kept] = inputs.to(flat)
            given = flat.view_as(given)
        if self.left_out is not None:
            others[1] = packing.without(others[0], others[1], self.left_out)[1].to(others[1].dtype)
        return (given, *others), {}


class Both:
    """The original and the packed model, side by side, one decoder layer at a time.

    Their activations are stored as ``hidden`` and ``packed`` with the number of the layer that they enter; those that
    enter a layer stay until those that leave it are there. So a run that is killed goes on with the layer it was in.
    """

    def __init__(self, shell: Shell, batches: Sequence[Batch], store: Store, precisions: PrecisionMap) -> None:
        self.shell, self.batches, self.store, self.precisions = shell, batches, store, precisions
        check_batches(shell.model, batches)
        self.gain = gain_of(shell, batches[0])
        self._keep = [token_mask(batch).flatten() for batch in batches]
        self._number: int | None = None  # of the decoder layer in turn
        self._pairs: dict[int, Pair] = {}  # of its MoE layers that were not taken

    def reach(self, layer: MoELayer, track: Track = silent) -> Iterator[tuple[MoELayer, nn.Module, Pair]]:
        """The layer with its experts module and what it saw; before it those that the packed model's activations do not
        have yet. Each is to be given to :meth:`take` before the next.
        """
        if self._number is None:
            self._number = self._start(layer.decoder, track)
        moe = self.shell.spec.by_decoder()
        while self._number <= layer.decoder:
            wanted = moe.get(self._number, [])
            if not self._pairs:
                self._open(self._number, wanted, track)
            for at in [at for at in wanted if at.index in self._pairs]:
                yield at, experts_module(self.shell.model, at), self._pairs[at.index]
                if at.index == layer.index:
                    return

    def take(self, layer: MoELayer, packed: Iterable[Stored], track: Track = silent) -> None:
        """The packed experts of a layer that :meth:`reach` gave; the packed model runs on when its others are there."""
        assert self._number is not None
        found, module = dict(packed), experts_module(self.shell.model, layer)

        def unit(expert: int, group: ProjectionGroup, precision: Precision) -> list[QTensor]:
            names = layer.experts[expert].names
            return [] if precision == LEFT_OUT else [_packed(found[names[matrix]]) for matrix in MATRICES[group]]

        layouts = {g: GroupLayout(self.precisions.experts[g][layer.index], layer.shapes(g)) for g in GROUPS}
        packing.pack_experts(module, layer.index, layouts)
        for group in GROUPS:
            packing.fill_experts(module, group, unit)
        prepare(module)
        del self._pairs[layer.index]
        if not self._pairs:
            self._close(self._number, track)

    def _start(self, number: int, track: Track) -> int:
        """The last layer up to ``number`` that both can enter."""
        both = ("hidden", "packed")
        begin = next((k for k in range(number, -1, -1) if all(self.store.has(f"{name} {k}") for name in both)), None)
        if begin is None or self.shell.sees:
            begin = entered(self.shell, self.batches, self.store, begin, track)
        if not self.store.has(f"packed {begin}"):
            self.store.put(f"packed {begin}", self.store.get(f"hidden {begin}"))
        return begin

    def _open(self, number: int, wanted: Sequence[MoELayer], track: Track) -> None:
        """Run both through a layer, the packed model with experts that give what they would give in the original."""
        shell, store, batches = self.shell, self.store, self.batches
        shell.layer(number, number + 1)
        modules = {layer.index: experts_module(shell.model, layer) for layer in wanted}
        plain = [Tap(layer, modules[layer.index], False, None) for layer in wanted]
        outputs = self._run(number, "hidden", plain, track)
        store.put(f"hidden {number + 1}", outputs)
        for ref, precision in linear_precisions(shell.spec, self.precisions).items():
            if decoder_layer(ref.key, shell.spec.layers[0]) == number:
                round_linear(shell.model, shell.source, ref, precision)
        if not wanted:
            del outputs
            self._close(number, track)
            return
        marks = marks_of(batches)
        fed = [
            _Feeding(tap.layer, tap.module, tap.finish(*marks).hidden, self._keep, self._left_out(tap.layer))
            for tap in plain
        ]
        others = self._run(number, "packed", fed, track)
        difference = [
            ((one.float() - other.float()) / self.gain).to(one.dtype).flatten(0, -2)[keep]
            for one, other, keep in zip(outputs, others, self._keep, strict=True)
        ]
        missing = torch.cat(difference)
        del outputs, others, difference
        for tap in fed:
            seen = tap.finish(*marks)
            if tap.left_out is not None:
                index, weights = packing.without(seen.index, seen.weights, tap.left_out)
                seen = replace(seen, index=index, weights=weights)
            self._pairs[tap.layer.index] = Pair(seen, seen.hidden if tap.as_called else tap.hidden, missing)
            shell.release_experts(tap.module)

    def _close(self, number: int, track: Track) -> None:
        """Run the packed model through a layer whose experts are packed, and let go of it."""
        self.store.put(f"packed {number + 1}", self._run(number, "packed", [], track))
        self.shell.release(number)
        for module in self.shell.layers[number].modules():
            if isinstance(module, packing.MixedExperts):
                module.to("meta")
        for name in ("hidden", "packed"):
            self.store.drop(f"{name} {number}")
        self._number = number + 1

    def _run(self, number: int, name: str, taps: Sequence[Tap], track: Track) -> list[Tensor]:
        """Outputs of a loaded layer from the activations of that name."""
        with torch.no_grad():
            return passed(self.shell, number, self.batches, self.store.get(f"{name} {number}"), taps, track=track)

    def _left_out(self, layer: MoELayer) -> Tensor | None:
        """The experts of a layer that are not there, bool (experts,); None where all are."""
        gone = [precision == LEFT_OUT for precision in self.precisions.experts["down"][layer.index]]
        return torch.tensor(gone) if any(gone) else None


def _packed(stored: QTensor | Tensor) -> QTensor:
    assert isinstance(stored, QTensor), "experts are packed at every precision"
    return stored


def gain_of(shell: Shell, batch: Batch) -> float:
    """What an experts module's output is multiplied by on the way to its layer's output, found by running the first
    MoE layer with and without it.

    Raises :class:`ModelError` where that is no number: then an expert cannot make up for what a layer's output lacks.
    """
    first, kept = shell.spec.layers[0], token_mask(batch).flatten()
    (given,) = shell.enter([batch])
    made: list[Tensor] = []
    with torch.no_grad():
        for number in range(first.decoder):
            shell.layer(number, number + 1)
            given = shell.run(number, batch, given)
            shell.release(number)
        shell.layer(first.decoder)
        tap = Tap(first, experts_module(shell.model, first), False, None)
        caught: list[Tensor] = []
        silenced = tap.module.register_forward_hook(lambda module, args, output: caught.append(output))
        handles = [*tap.attach(shell.model), silenced]
        try:
            tap.begin(kept)
            made.append(shell.run(first.decoder, batch, given))
            among = tap.keep  # of the rows that the module got, those that are not padding
            silenced.remove()
            handles.append(tap.module.register_forward_hook(lambda module, args, output: torch.zeros_like(output)))
            tap.begin(kept)
            made.append(shell.run(first.decoder, batch, given))
        finally:
            for handle in handles:
                handle.remove()
        shell.release(first.decoder)
    added = (made[0].float() - made[1].float()).flatten(0, -2)[kept]
    added = added[tap.dealt[0]] if tap.dealt else added
    output = caught[0].float()
    output = output.reshape(-1, len(among), output.shape[-1]).sum(0)[among]
    size = output.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    gain = float(((added * output).sum(-1) / size).median())
    off = float((added - gain * output).norm(dim=-1).div((added.norm(dim=-1)).clamp_min(1e-30)).median())
    if not (off < ALIKE and gain):
        raise ModelError(
            f"what {first.module} gives, times a number, is not what {type(shell.model).__name__} adds to its hidden "
            f"states: times {gain:.3g}, {100 * off:.0f} % is other; its experts cannot make up for errors, use "
            f"--no-compensate"
        )
    return gain
