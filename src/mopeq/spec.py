"""What a model is made of: where every expert's matrices lie in a checkpoint, and how many bytes each part takes.

Adapters make a :class:`MoESpec` from a checkpoint's configuration and tensor shapes; everything else reads it. An
:class:`Inventory` is the part of it that bytes depend on; it is small, written into ``stats.json`` and ``config.json``,
and lets an allocator price a map without the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from mopeq.errors import MapError
from mopeq.layers import ImageExperts, decoder_of, layer_key
from mopeq.precision import DEFAULT_BITS, FULL, GROUPS, LEFT_OUT, MATRICES, Precision, PrecisionMap, ProjectionGroup

__all__ = [
    "TOWERS", "Expert", "ExpertId", "Inventory", "KeptRef", "LinearRef", "MoELayer", "MoESpec", "Outside", "WeightRef",
    "outside_layers",
]  # fmt: skip


@dataclass(frozen=True, order=True)
class ExpertId:
    """One routed expert; prints as ``3.17``, or ``3.vision.17``."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.expert}"


@dataclass(frozen=True)
class WeightRef:
    """Where one canonical (out, in) matrix lies in a checkpoint.

    ``expert`` indexes the first axis of a fused 3-D tensor; ``transposed`` says that it is stored (in, out);
    ``rows`` = (start, stop, step) selects along the canonical out axis (fused or interleaved gate and up).
    """

    key: str
    shape: tuple[int, int]
    expert: int | None = None
    transposed: bool = False
    rows: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Expert:
    """The three matrices of a routed expert, and the names its packed tensors get (hub style, without suffix)."""

    id: ExpertId
    gate: WeightRef
    up: WeightRef
    down: WeightRef
    names: Mapping[str, str]
    """``{"gate": "model.layers.3.mlp.experts.17.gate_proj", "up": ..., "down": ...}``"""

    def refs(self, group: ProjectionGroup) -> tuple[WeightRef, ...]:
        """The matrices of one projection group, in the order gate, up or down."""
        return tuple(getattr(self, matrix) for matrix in MATRICES[group])


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer: a set of experts with its router. ``module`` and ``router`` are names of modules of the model.

    index: its key (:mod:`mopeq.layers`). dealer: the module that gives these experts the tokens of their kind, where
    the decoder layer has others for the rest; empty where they get all.
    """

    index: int
    module: str
    router: str
    experts: tuple[Expert, ...]
    top_k: int
    hidden_size: int
    intermediate_size: int
    dealer: str = ""

    @property
    def decoder(self) -> int:
        """The number of its decoder layer."""
        return decoder_of(self.index)

    @property
    def for_images(self) -> bool:
        """Whether it gets image tokens alone."""
        return isinstance(self.index, ImageExperts)

    def shapes(self, group: ProjectionGroup) -> tuple[tuple[int, int], ...]:
        """(out, in) of each matrix of the group."""
        return tuple(ref.shape for ref in self.experts[0].refs(group))


@dataclass(frozen=True)
class LinearRef:
    """A quantizable ``nn.Linear`` outside the routed experts.

    ``key`` is its weight in the checkpoint; where that holds several matrices, ``rows`` = (start, stop, step) are its.
    """

    module: str
    key: str
    shape: tuple[int, int]
    group: str
    rows: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        """Name of its packed tensors, without suffix: the hub's, the last part the module.s if it is one of several."""
        stored = self.key.removesuffix(".weight")
        return stored if self.rows is None else f"{stored.rpartition('.')[0]}.{self.module.rpartition('.')[2]}"

    @property
    def weight(self) -> WeightRef:
        """Where its matrix lies."""
        return WeightRef(self.key, self.shape, rows=self.rows)


TOWERS = ("vision", "projector")
"""Groups of kept tensors that are stored in 16 bits even where the original has more."""


@dataclass(frozen=True)
class KeptRef:
    """A tensor that is not quantized, and why: ``embedding``, ``norm``, ``router``, ``bias``, ``vision`` ..."""

    key: str
    shape: tuple[int, ...]
    group: str


@dataclass(frozen=True)
class MoESpec:
    """Everything in a checkpoint, each tensor accounted for exactly once."""

    model_type: str
    layers: tuple[MoELayer, ...]
    linears: tuple[LinearRef, ...]
    kept: tuple[KeptRef, ...]
    ignored: tuple[str, ...] = ()
    """Tensors that transformers drops on load: buffers of old versions, multi-token-prediction heads."""

    def experts(self) -> Iterator[Expert]:
        """All routed experts in order."""
        for layer in self.layers:
            yield from layer.experts

    def layer(self, index: int) -> MoELayer:
        """The MoE layer of that key."""
        return next(layer for layer in self.layers if layer.index == index)

    def by_decoder(self) -> dict[int, list[MoELayer]]:
        """The MoE layers of each decoder layer that has some: one, or two for tokens of two kinds."""
        found: dict[int, list[MoELayer]] = {}
        for layer in self.layers:
            found.setdefault(layer.decoder, []).append(layer)
        return found

    def inventory(self, kept_bytes: int, header_bytes: int = 0) -> Inventory:
        """The part of the specification that bytes depend on; ``kept_bytes`` as they will be stored."""
        linears: dict[str, dict[tuple[int, int], int]] = {}
        for ref in self.linears:
            shapes = linears.setdefault(ref.group, {})
            shapes[ref.shape] = shapes.get(ref.shape, 0) + 1
        return Inventory(
            model_type=self.model_type,
            layers={
                layer.index: LayerShape(len(layer.experts), layer.hidden_size, layer.intermediate_size, layer.top_k)
                for layer in self.layers
            },
            linears={g: tuple((*shape, n) for shape, n in shapes.items()) for g, shapes in sorted(linears.items())},
            kept_parameters=sum(prod(ref.shape) for ref in self.kept),
            kept_bytes=kept_bytes,
            header_bytes=header_bytes,
        )


@dataclass(frozen=True)
class Outside:
    """Stored tensors outside the decoder layers by when a pass needs them: ``first``, before the layers (embedding and
    towers, of which ``towers`` says whether there are any), ``last``, after them (the head, which may be the
    embedding), and ``always``.
    """

    first: tuple[str, ...]
    last: tuple[str, ...]
    always: tuple[str, ...]
    towers: bool


def outside_layers(spec: MoESpec, keys: Sequence[str]) -> Outside:
    """``keys``, all stored tensors outside the layers, by when they are needed."""
    groups = {ref.key: ref.group for ref in spec.linears} | {ref.key: ref.group for ref in spec.kept}
    found = {group: tuple(key for key in keys if groups.get(key) == group) for group in set(groups.values())}
    embedding, towers = found.get("embedding", ()), tuple(k for group in TOWERS for k in found.get(group, ()))
    first, last = embedding + towers, found.get("lm_head", ()) or embedding
    return Outside(first, last, tuple(key for key in keys if key not in {*first, *last}), bool(towers))


@dataclass(frozen=True)
class LayerShape:
    """Numbers of a MoE layer: experts, hidden size H, intermediate size I of an expert, experts per token."""

    experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int

    def matrices(self, group: ProjectionGroup) -> tuple[tuple[int, int], ...]:
        """(out, in) of each matrix of the group: gate and up are (I, H), down is (H, I)."""
        shape = (self.intermediate_size, self.hidden_size)
        return (shape, shape) if group == "gate_up" else (shape[::-1],)


@dataclass(frozen=True)
class Inventory:
    """What a checkpoint's bytes depend on. Weights of a non-expert group whose shape does not fit count at 16 bits."""

    model_type: str
    layers: Mapping[int, LayerShape]
    linears: Mapping[str, tuple[tuple[int, int, int], ...]]
    """``{group: ((out, in, how many), ...)}``"""
    kept_parameters: int
    kept_bytes: int
    header_bytes: int = 0
    """Upper bound of the safetensors headers' bytes of the packed checkpoint."""

    @property
    def experts(self) -> dict[int, int]:
        """``{layer: number of experts}``."""
        return {index: layer.experts for index, layer in self.layers.items()}

    @property
    def fingerprint(self) -> str:
        """Short hash of the shapes: a map or statistics file fits a model if and only if these are equal."""
        shape = {
            "model_type": self.model_type,
            "layers": {str(k): [v.experts, v.hidden_size, v.intermediate_size] for k, v in self.layers.items()},
            "linears": {g: sorted(map(list, shapes)) for g, shapes in self.linears.items()},
        }
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def expert_parameters(self) -> int:
        """Weights in routed experts."""
        return sum(3 * v.experts * v.hidden_size * v.intermediate_size for v in self.layers.values())

    @property
    def linear_parameters(self) -> int:
        """Weights in quantizable matrices outside the routed experts."""
        return sum(out * inp * n for shapes in self.linears.values() for out, inp, n in shapes)

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.expert_parameters + self.linear_parameters + self.kept_parameters

    def precisions(
        self, bits: Iterable[int] = DEFAULT_BITS, group_size: int | None = None, symmetric: bool = False
    ) -> tuple[Precision, ...]:
        """A precision for each number of bits.

        Groups are of ``group_size``, or of the largest of 128, 64 and 32 inputs that fits every expert's rows, or else
        whole rows.
        """
        rows = {shape[1] for layer in self.layers.values() for g in GROUPS for shape in layer.matrices(g)}
        fits = (size for size in (128, 64, 32) if all(row % size == 0 for row in rows))
        size = group_size if group_size is not None else next(fits, -1)
        return tuple(Precision(b, size, symmetric) for b in bits)

    def unit_bytes(self, layer: int, group: ProjectionGroup, precision: Precision) -> int:
        """Bytes of one unit at one precision."""
        return sum(precision.nbytes(*shape) for shape in self.layers[layer].matrices(group))

    def unit_parameters(self, layer: int, group: ProjectionGroup) -> int:
        """Weights of one unit."""
        return sum(prod(shape) for shape in self.layers[layer].matrices(group))

    def expert_bytes(self, precisions: PrecisionMap) -> int:
        """Bytes of the routed experts: codes, scales and zero points."""
        self.check(precisions)
        total = 0
        for group in GROUPS:
            for layer, row in precisions.experts[group].items():
                costs = {p: self.unit_bytes(layer, group, p) for p in set(row)}
                total += sum(costs[p] for p in row)
        return total

    def rest_bytes(self, rest: Mapping[str, Precision]) -> int:
        """Bytes of the quantizable matrices outside the experts."""
        total = 0
        for group, shapes in self.linears.items():
            asked = rest.get(group, FULL)
            for out, inp, n in shapes:
                total += n * fitting(asked, out, inp).nbytes(out, inp)
        return total

    def total_bytes(self, precisions: PrecisionMap) -> int:
        """Bytes of the whole checkpoint's safetensors files; never less than what is written."""
        fixed = self.kept_bytes + self.header_bytes
        return self.expert_bytes(precisions) + self.rest_bytes(precisions.rest) + fixed

    def expert_bits(self, precisions: PrecisionMap) -> float:
        """Average bits per routed-expert weight, scales and zero points counted."""
        return 8 * self.expert_bytes(precisions) / self.expert_parameters

    def check(self, precisions: PrecisionMap) -> None:
        """Raise :class:`MapError` unless the map is one for this model."""
        if precisions.layers != self.experts:
            found = {k: v for k, v in precisions.layers.items() if self.experts.get(k) != v}
            raise MapError(
                f"the precision map is for another model: it has {len(precisions.layers)} MoE layers of "
                f"{sorted(set(precisions.layers.values()))} experts, this {self.model_type} has {len(self.experts)} of "
                f"{sorted(set(self.experts.values()))} (first difference: {dict(list(found.items())[:1])}); "
                "make a map from this model"
            )
        unknown = set(precisions.rest) - set(DEFAULT_GROUPS) - set(self.linears)
        if unknown:
            raise MapError(
                f"the precision map names unknown groups {sorted(unknown)}; this model has {sorted(self.linears)}"
            )
        for layer, row in precisions.experts["down"].items():
            kept, wanted = sum(p != LEFT_OUT for p in row), self.layers[layer].top_k
            if kept < wanted:
                raise MapError(f"layer {layer} keeps {kept} experts and gives each token {wanted}; leave out fewer")
        for group in GROUPS:
            for layer, row in precisions.experts[group].items():
                for precision in set(row):
                    try:
                        self.unit_bytes(layer, group, precision)
                    except MapError as error:
                        raise MapError(f"layer {layer} {group} at {precision}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; layers of equal shape stay readable."""
        return {
            "model_type": self.model_type,
            "fingerprint": self.fingerprint,
            "layers": {
                str(k): [v.experts, v.hidden_size, v.intermediate_size, v.top_k] for k, v in self.layers.items()
            },
            "linears": {g: [list(s) for s in shapes] for g, shapes in self.linears.items()},
            "kept_parameters": self.kept_parameters,
            "kept_bytes": self.kept_bytes,
            "header_bytes": self.header_bytes,
        }

    @classmethod
    def from_json(cls, data: object) -> Inventory:
        """Inverse of :meth:`to_json`. Raises :class:`MapError` on anything unexpected."""
        try:
            if not isinstance(data, Mapping):
                raise TypeError(type(data).__name__)
            made = cls(
                model_type=str(data["model_type"]),
                layers={layer_key(k): LayerShape(*map(int, v)) for k, v in data["layers"].items()},
                linears={
                    str(g): tuple((int(a), int(b), int(n)) for a, b, n in shapes)
                    for g, shapes in data["linears"].items()
                },
                kept_parameters=int(data["kept_parameters"]),
                kept_bytes=int(data["kept_bytes"]),
                header_bytes=int(data.get("header_bytes", 0)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MapError(f"malformed model block: {error!r}; make the file again with mopeq analyze") from error
        if min(made.kept_parameters, made.kept_bytes, made.header_bytes) < 0:
            raise MapError("model block with negative counts of kept weights; make the file again with mopeq analyze")
        if data.get("fingerprint") != made.fingerprint:
            raise MapError(
                f"model block with fingerprint {data.get('fingerprint')!r}, its shapes give {made.fingerprint!r}; "
                "it was edited: make the file again with mopeq analyze"
            )
        return made


DEFAULT_GROUPS = ("attention", "dense_mlp", "shared_experts", "lm_head")


def fitting(asked: Precision, out_features: int, in_features: int) -> Precision:
    """What a non-expert matrix gets: as asked, else with the largest smaller group size that fits, else 16 bits."""
    if asked.fits(out_features, in_features):
        return asked
    for size in (128, 64, 32):
        smaller = replace(asked, group_size=size)
        if (asked.group_size == -1 or size < asked.group_size) and smaller.fits(out_features, in_features):
            return smaller
    return FULL
