"""What a packed checkpoint says about itself: the ``quantization_config`` of its ``config.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mopeq.errors import CheckpointError, MapError
from mopeq.layers import ImageExperts, layer_key
from mopeq.precision import FULL, GROUPS, LEFT_OUT, MATRICES, Precision, PrecisionMap, parse_precision
from mopeq.qtensor import packed_shapes
from mopeq.spec import Inventory, LinearRef, MoELayer, MoESpec, fitting

__all__ = ["DTYPES", "Header", "Manifest", "PackedExperts", "PackedLinear", "linear_precisions", "packed_config"]

METHOD = "mopeq"
FORMAT_VERSION, CODEBOOK_VERSION, ROTATED_VERSION = 1, 2, 3
LAYOUT = "plain"
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip
"""safetensors names of the types that a packed checkpoint may hold."""

Header = tuple[str, tuple[int, ...]]
"""safetensors dtype and shape of a tensor."""


@dataclass(frozen=True)
class PackedExperts:
    """One layer's routed experts: module of the transformers model, path on disk, names of gate, up, down on disk."""

    module: str
    tensors: str
    names: tuple[str, str, str]

    def base(self, expert: int, matrix: str) -> str:
        """Base name of the tensors of one matrix: ``gate``, ``up`` or ``down``."""
        return f"{self.tensors}.{expert}.{self.names[('gate', 'up', 'down').index(matrix)]}"


@dataclass(frozen=True)
class PackedLinear:
    """One matrix outside the routed experts: base name on disk, group, shape (out, in), precision."""

    tensors: str
    group: str
    shape: tuple[int, int]
    precision: Precision


@dataclass(frozen=True)
class Manifest:
    """The ``quantization_config`` of a packed checkpoint. ``experts`` by layer, ``linears`` by module."""

    precisions: PrecisionMap
    inventory: Inventory
    experts: Mapping[int, PackedExperts]
    linears: Mapping[str, PackedLinear]

    def __post_init__(self) -> None:
        self.inventory.check(self.precisions)
        if set(self.experts) != set(self.inventory.layers):
            raise CheckpointError(
                f"experts has layers {sorted(self.experts)}; inventory has layers {sorted(self.inventory.layers)}"
            )
        counted = {(g, (out, inp)): n for g, shapes in self.inventory.linears.items() for out, inp, n in shapes}
        found = Counter((linear.group, linear.shape) for linear in self.linears.values())
        if found != counted:
            group, shape = next(key for key in [*counted, *found] if counted.get(key, 0) != found.get(key, 0))
            raise CheckpointError(
                f"linears lists {found.get((group, shape), 0)} matrices of {group} with shape {list(shape)}; "
                f"inventory counts {counted.get((group, shape), 0)}"
            )
        for module, linear in self.linears.items():
            asked = fitting(self.precisions.rest.get(linear.group, FULL), *linear.shape)
            if linear.precision != asked:
                raise CheckpointError(
                    f"linear {module} is at {linear.precision}; the map asks for {asked} in {linear.group}"
                )

    @property
    def format_version(self) -> int:
        """What the format page asks for: readers of version 1 know no codebook, those of 2 no rotated inputs."""
        used = [*self.precisions.histogram(), *(linear.precision for linear in self.linears.values())]
        if any(p.hadamard for p in used):
            return ROTATED_VERSION
        return CODEBOOK_VERSION if any(p.codebook for p in used) else FORMAT_VERSION

    @property
    def has_image_experts(self) -> bool:
        """Whether layers have experts for image tokens apart."""
        return any(isinstance(key, ImageExperts) for key in self.experts)

    def matrices(self) -> Iterator[tuple[str, tuple[int, int], Precision]]:
        """(base name, (out, in), precision) of packed matrices: experts' that are there, linears' below 16 bits."""
        for index, packed in self.experts.items():
            for group in GROUPS:
                shapes = self.inventory.layers[index].matrices(group)
                for expert, precision in enumerate(self.precisions.experts[group][index]):
                    if precision == LEFT_OUT:
                        continue
                    for matrix, shape in zip(MATRICES[group], shapes, strict=True):
                        yield packed.base(expert, matrix), shape, precision
        for linear in self.linears.values():
            if linear.precision != FULL:
                yield linear.tensors, linear.shape, linear.precision

    def packed_tensors(self) -> dict[str, Header]:
        """``{tensor name: (safetensors dtype, shape)}`` of all packed matrices."""
        made: dict[str, Header] = {}
        for base, shape, precision in self.matrices():
            for suffix, (stored, dtype) in packed_shapes(shape, precision).items():
                name = f"{base}.{suffix}"
                if name in made:
                    raise CheckpointError(f"two matrices are stored under the name {base}; expected one name each")
                made[name] = (DTYPES[dtype], stored)
        return made

    def full_tensors(self) -> dict[str, tuple[int, int]]:
        """``{tensor name: (out, in)}`` of the 16-bit matrices outside the experts, stored as ordinary weights."""
        return {f"{v.tensors}.weight": v.shape for v in self.linears.values() if v.precision == FULL}

    def to_json(self) -> dict[str, Any]:
        """The value of ``quantization_config``."""
        short = (str, int, float, bool)
        precisions = self.precisions.to_json()
        precisions["note"] = {k: v for k, v in precisions["note"].items() if isinstance(v, short)}
        return {
            "quant_method": METHOD,
            "format_version": self.format_version,
            "layout": LAYOUT,
            "map": precisions,
            "inventory": self.inventory.to_json(),
            "experts": {
                str(k): {"module": v.module, "tensors": v.tensors, "names": list(v.names)}
                for k, v in self.experts.items()
            },
            "linears": {
                k: {"tensors": v.tensors, "group": v.group, "shape": list(v.shape), "precision": str(v.precision)}
                for k, v in self.linears.items()
            },
        }

    @classmethod
    def from_json(cls, data: object) -> Manifest:
        """Inverse of :meth:`to_json`. Raises :class:`CheckpointError` on anything unexpected."""
        if not isinstance(data, Mapping) or data.get("quant_method") != METHOD:
            method = data.get("quant_method") if isinstance(data, Mapping) else None
            raise CheckpointError(
                f'quantization_config has quant_method {method!r}; expected "{METHOD}": not a mopeq checkpoint'
            )
        for key, known in (
            ("format_version", (FORMAT_VERSION, CODEBOOK_VERSION, ROTATED_VERSION)),
            ("layout", (LAYOUT,)),
        ):
            if data.get(key) not in known or isinstance(data.get(key), bool):
                raise CheckpointError(
                    f"quantization_config has {key} {data.get(key)!r}; this mopeq reads "
                    f"{', '.join(map(repr, known))}; use the mopeq that wrote it"
                )
        keys = {"quant_method", "format_version", "layout", "map", "inventory", "experts", "linears"}
        if set(data) != keys:
            raise CheckpointError(
                f"quantization_config has unknown keys {sorted(set(data) - keys)} and lacks {sorted(keys - set(data))}"
            )
        try:
            made = cls(
                precisions=PrecisionMap.from_json(data["map"]),
                inventory=Inventory.from_json(data["inventory"]),
                experts={layer_key(k): _experts(v) for k, v in data["experts"].items()},
                linears={str(k): _linear(v) for k, v in data["linears"].items()},
            )
        except MapError as error:
            raise CheckpointError(f"quantization_config: {error}") from error
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise CheckpointError(f"malformed quantization_config: {error!r}; see docs/format.md") from error
        if made.format_version != data["format_version"]:
            raise CheckpointError(
                f"quantization_config has format_version {data['format_version']}; its precisions are those of version "
                f"{made.format_version}: see docs/format.md"
            )
        return made


def _experts(data: Mapping[str, Any]) -> PackedExperts:
    gate, up, down = data["names"]
    if set(data) != {"module", "tensors", "names"} or len({gate, up, down}) != 3:
        raise ValueError(f"experts entry {dict(data)}")
    return PackedExperts(_text(data["module"]), _text(data["tensors"]), (_text(gate), _text(up), _text(down)))


def _linear(data: Mapping[str, Any]) -> PackedLinear:
    if set(data) != {"tensors", "group", "shape", "precision"}:
        raise ValueError(f"linears entry {dict(data)}")
    out, inp = data["shape"]
    if type(out) is not int or type(inp) is not int or min(out, inp) < 1:
        raise ValueError(f"shape {data['shape']}")
    return PackedLinear(
        _text(data["tensors"]), _text(data["group"]), (out, inp), parse_precision(_text(data["precision"]))
    )


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} where a name was expected")
    return value


def linear_precisions(spec: MoESpec, precisions: PrecisionMap) -> dict[LinearRef, Precision]:
    """The precision that each matrix outside the routed experts gets: as the map asks for its group, if it fits."""
    return {ref: fitting(precisions.rest.get(ref.group, FULL), *ref.shape) for ref in spec.linears}


def packed_config(
    config: Mapping[str, Any], spec: MoESpec, precisions: PrecisionMap, inventory: Inventory
) -> dict[str, Any]:
    """The packed checkpoint's ``config.json``: the original one plus ``quantization_config``.

    Raises :class:`MapError` where the map is for another model.
    """
    linears = {
        ref.module: PackedLinear(ref.name, ref.group, ref.shape, precision)
        for ref, precision in linear_precisions(spec, precisions).items()
    }
    experts = {layer.index: _packed_experts(layer) for layer in spec.layers}
    return {**config, "quantization_config": Manifest(precisions, inventory, experts, linears).to_json()}


def _packed_experts(layer: MoELayer) -> PackedExperts:
    tensors, _, _ = layer.experts[0].names["gate"].rsplit(".", 2)
    gate, up, down = (layer.experts[0].names[matrix].rpartition(".")[2] for matrix in ("gate", "up", "down"))
    made = PackedExperts(layer.module, tensors, (gate, up, down))
    for number, expert in enumerate(layer.experts):
        for matrix, name in expert.names.items():
            if name != made.base(number, matrix):
                raise CheckpointError(
                    f"expert {expert.id} stores {matrix} as {name}; expected {made.base(number, matrix)}"
                )
    return made
