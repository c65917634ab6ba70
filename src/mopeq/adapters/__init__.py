"""Architectures: from a checkpoint's configuration and tensor shapes to a :class:`~mopeq.spec.MoESpec`.

An architecture is a declaration in ``families.py``; ``layouts.py`` has the ways in which experts are stored;
``family.py`` turns a declaration into a specification in which every tensor is accounted for once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import Any

from mopeq.adapters.families import FAMILIES
from mopeq.adapters.family import spec_of
from mopeq.errors import ModelError
from mopeq.precision import DEFAULT_REST
from mopeq.source import WEIGHT_DTYPES, Source, kept_bytes, read_tensor, stored_bytes
from mopeq.spec import Inventory, MoESpec, fitting

__all__ = ["SUPPORTED", "GroupRow", "coverage", "describe", "groups_table", "inventory_of", "spec_from"]

SUPPORTED = tuple(sorted(FAMILIES))
"""The model types that can be described."""


def describe(source: Source) -> MoESpec:
    """What a checkpoint is made of, each tensor accounted for exactly once.

    Raises :class:`ModelError` for an unknown or dense architecture, and as :func:`spec_from` does.
    """
    spec = spec_from(source.config, source.shapes)
    quantizable = {ref.key for e in spec.experts() for ref in (e.gate, e.up, e.down)} | {r.key for r in spec.linears}
    for key in sorted(quantizable):
        if source.dtypes[key] not in WEIGHT_DTYPES:
            raise ModelError(
                f"tensor {key} is stored as {source.dtypes[key]}; expected one of {', '.join(WEIGHT_DTYPES)}; "
                f"give the checkpoint in 16 or 32 bits"
            )
    _check_tied(source, spec)
    return spec


def spec_from(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> MoESpec:
    """:func:`describe` from ``config.json`` and the tensors' shapes alone."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"config.json has model_type {model_type!r}; expected one of {', '.join(SUPPORTED)}")
    if model_type not in FAMILIES:
        raise _unsupported(model_type, config, shapes)
    return spec_of(model_type, FAMILIES[model_type], config, shapes)


def _unsupported(model_type: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelError:
    if not any("expert" in name for name in (*config, *shapes)):
        return ModelError(
            f"model type {model_type!r} is dense: neither config.json nor a tensor mentions experts; "
            f"mopeq quantizes Mixture-of-Experts models: {', '.join(SUPPORTED)}"
        )
    if model_type == "ernie4_5_moe_vl":
        return ModelError(
            f"model type {model_type!r} is ERNIE 4.5 VL with code of its own, as it was published; expected "
            "transformers' own ernie4_5_vl_moe; convert the configuration with its convert_ernie4_5_vl_moe_to_hf.py"
        )
    close = get_close_matches(model_type, SUPPORTED, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return ModelError(f"model type {model_type!r} is not supported; expected one of {', '.join(SUPPORTED)}{meant}")


def _check_tied(source: Source, spec: MoESpec) -> None:
    """A head that is stored although it is tied must equal the embedding: transformers keeps both apart otherwise."""
    head = next((key for key in spec.ignored if key.endswith("lm_head.weight")), None)
    if head is None:
        return
    embedding = next(ref.key for ref in spec.kept if ref.group == "embedding")
    if not read_tensor(source, head).equal(read_tensor(source, embedding)):
        raise ModelError(
            f"config.json ties the head to the embedding, but {head} and {embedding} differ; "
            f"set tie_word_embeddings to false in config.json, or remove {head}"
        )


def inventory_of(source: Source, spec: MoESpec) -> Inventory:
    """The part of the specification that bytes depend on; kept tensors are stored as they are, towers in 16 bits."""
    kept = sum(kept_bytes(source, ref) for ref in spec.kept)
    bare = spec.inventory(kept)
    return spec.inventory(kept, _header_bytes(spec, kept + 2 * (bare.expert_parameters + bare.linear_parameters)))


def _header_bytes(spec: MoESpec, most_bytes: int) -> int:
    """Upper bound of the safetensors headers of the packed checkpoint.

    A matrix takes at most three tensors, whose sizes have no more digits than at 16 bits. A shard adds its length,
    ``__metadata__`` and alignment, for which 64 bytes are allowed; there is one for each MoE layer, one for the rest,
    and one more for every 256 MiB.
    """
    digits = len(str(most_bytes))
    fixed = len(':{"dtype":"F8_E4M3","shape":[],"data_offsets":[,]},')

    def entry(name: str, shape: tuple[int, ...]) -> int:
        return len(json.dumps(name)) + fixed + sum(len(str(2 * n)) + 1 for n in shape) + 2 * digits

    total = sum(entry(ref.key, ref.shape) for ref in spec.kept)
    total += sum(3 * entry(f"{ref.name}.qweight", ref.shape) for ref in spec.linears)
    for expert in spec.experts():
        for matrix, ref in (("gate", expert.gate), ("up", expert.up), ("down", expert.down)):
            total += 3 * entry(f"{expert.names[matrix]}.qweight", ref.shape)
    return total + 64 * (1 + len(spec.layers) + most_bytes // 2**28)


@dataclass(frozen=True)
class GroupRow:
    """One line of ``mopeq describe``: a group of tensors, its weights and stored bytes, and what happens to it.

    treatment: ``allocated`` (routed experts: one precision per unit), ``quantized`` (at one precision), ``kept`` (as
    stored) or ``dropped``. precision: the default, ``16`` where no groups fit, several if shapes differ; empty if kept.
    """

    group: str
    tensors: int
    parameters: int
    nbytes: int
    treatment: str
    precision: str


def groups_table(spec: MoESpec, source: Source) -> tuple[GroupRow, ...]:
    """Weights and bytes of every group of a checkpoint; together they are all of it."""
    experts = {ref.key for e in spec.experts() for ref in (e.gate, e.up, e.down)}
    rows = [_row(source, "routed_experts", sorted(experts), "allocated", "by budget or map")]
    for group in sorted({ref.group for ref in spec.linears}):
        refs = [ref for ref in spec.linears if ref.group == group]
        got = sorted({fitting(DEFAULT_REST[group], *ref.shape) for ref in refs})
        rows.append(_row(source, group, sorted({r.key for r in refs}), "quantized", ", ".join(map(str, got))))
    rows += [
        _row(source, group, [ref.key for ref in spec.kept if ref.group == group], "kept", "")
        for group in sorted({ref.group for ref in spec.kept})
    ]
    if spec.ignored:
        rows.append(_row(source, "ignored", list(spec.ignored), "dropped", ""))
    return tuple(rows)


def _row(source: Source, group: str, keys: list[str], treatment: str, precision: str) -> GroupRow:
    parameters = sum(prod(source.shapes[key]) for key in keys)
    nbytes = sum(stored_bytes(source, key) for key in keys)
    return GroupRow(group, len(keys), parameters, nbytes, treatment, precision)


def coverage(rows: tuple[GroupRow, ...]) -> float:
    """Share of the weights that stay, in [0, 1], that are allocated or quantized."""
    used = [row for row in rows if row.treatment != "dropped"]
    packed = sum(row.parameters for row in used if row.treatment in ("allocated", "quantized"))
    return packed / sum(row.parameters for row in used)
