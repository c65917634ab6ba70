"""The ways in which checkpoints store routed experts.

A layout looks for the experts of one decoder layer among a checkpoint's tensors. It returns one (gate, up, down) triple
of references to canonical (out, in) matrices per expert, or None where none of its tensors is there; it raises
:class:`~mopeq.errors.ModelError` where some are missing or have another shape than the configuration says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from mopeq.errors import ModelError
from mopeq.spec import WeightRef

__all__ = ["Layout", "Sizes", "fused", "per_expert", "shape_error"]


@dataclass(frozen=True)
class Sizes:
    """Experts E, hidden size H, intermediate size I of an expert, experts per token, number of the first in files."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    first: int = 0


Shapes = Mapping[str, tuple[int, ...]]
Triple = tuple[WeightRef, WeightRef, WeightRef]
Layout = Callable[[str, Shapes, Sizes], "list[Triple] | None"]
"""``layout(layer prefix such as "model.layers.3.", shapes, sizes)``."""


def per_expert(path: str, gate: str, up: str, down: str) -> Layout:
    """Three 2-D tensors an expert: ``<path>.<e>.<gate>.weight`` (I, H), up alike, down (H, I), e from the first on."""

    def find(prefix: str, shapes: Shapes, sizes: Sizes) -> list[Triple] | None:
        expected = {gate: (sizes.intermediate, sizes.hidden), up: (sizes.intermediate, sizes.hidden)}
        expected[down] = (sizes.hidden, sizes.intermediate)
        stem = f"{prefix}{path}."

        numbers = range(sizes.first, sizes.first + sizes.experts)

        def names() -> Iterator[str]:
            return (f"{stem}{e}.{name}.weight" for e in numbers for name in expected)

        missing = list(islice((name for name in names() if name not in shapes), 4))
        if missing:
            if not any(key.startswith(stem) and key.endswith(".weight") for key in shapes):
                return None
            raise ModelError(
                f"tensors of experts are missing, the first {', '.join(missing[:3])}{' ...' if missing[3:] else ''}; "
                f"expected {sizes.experts} experts under {stem}* as config.json says; download the checkpoint again"
            )
        for e in numbers:
            for name, shape in expected.items():
                key = f"{stem}{e}.{name}.weight"
                if shapes[key] != shape:
                    raise shape_error(key, shapes[key], shape)
        return [
            (
                WeightRef(f"{stem}{e}.{gate}.weight", expected[gate]),
                WeightRef(f"{stem}{e}.{up}.weight", expected[up]),
                WeightRef(f"{stem}{e}.{down}.weight", expected[down]),
            )
            for e in numbers
        ]

    return find


def fused(gate_up: str, down: str, *, stored: str = "out_in", interleaved: bool = False) -> Layout:
    """Two 3-D tensors a layer, the experts along the first axis.

    ``stored`` is ``out_in`` for (E, 2I, H) and (E, H, I), ``in_out`` for (E, H, 2I) and (E, I, H), ``either`` where the
    shape decides; a square matrix is then ``out_in``, as transformers reads it. ``interleaved``: the rows of gate and
    up alternate; otherwise gate's come first.
    """

    def find(prefix: str, shapes: Shapes, sizes: Sizes) -> list[Triple] | None:
        wide, back = f"{prefix}{gate_up}", f"{prefix}{down}"
        present = [key for key in (wide, back) if key in shapes]
        if not present:
            return None
        if len(present) == 1:
            absent = back if present == [wide] else wide
            raise ModelError(
                f"tensor {absent} is missing; expected it beside {present[0]}; download the checkpoint again"
            )
        flipped = {
            wide: _transposed(wide, shapes[wide], (sizes.experts, 2 * sizes.intermediate, sizes.hidden), stored),
            back: _transposed(back, shapes[back], (sizes.experts, sizes.hidden, sizes.intermediate), stored),
        }
        middle, rows = sizes.intermediate, 2 * sizes.intermediate
        spans = ((0, rows, 2), (1, rows, 2)) if interleaved else ((0, middle, 1), (middle, rows, 1))

        def ref(e: int, span: tuple[int, int, int]) -> WeightRef:
            return WeightRef(wide, (middle, sizes.hidden), e, flipped[wide], span)

        return [
            (ref(e, spans[0]), ref(e, spans[1]), WeightRef(back, (sizes.hidden, middle), e, flipped[back]))
            for e in range(sizes.experts)
        ]

    return find


def _transposed(key: str, found: tuple[int, ...], shape: tuple[int, int, int], stored: str) -> bool:
    """Whether the tensor is stored (E, in, out), or an error where it is neither that nor what ``stored`` allows."""
    other = (shape[0], shape[2], shape[1])
    if stored != "in_out" and found == shape:
        return False
    if stored != "out_in" and found == other:
        return True
    raise shape_error(key, found, other if stored == "in_out" else shape)


def shape_error(key: str, found: tuple[int, ...], expected: tuple[int, ...]) -> ModelError:
    """The error for a tensor whose shape is not what the configuration says."""
    return ModelError(
        f"tensor {key} has shape {list(found)}; expected {list(expected)} from config.json; "
        f"check that config.json and the weights belong together"
    )
