"""Precisions and precision maps: bytes against arithmetic, round trips, every refusal."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopeq.errors import MapError
from mopeq.precision import (
    BITS,
    DEFAULT_GROUP_SIZE,
    DEFAULT_REST,
    FULL,
    GROUP_SIZES,
    GROUPS,
    Precision,
    PrecisionMap,
    parse_precision,
)

QUANTIZED = [Precision(b, g, s) for b in BITS if b < 16 for g in GROUP_SIZES for s in (False, True)]
precisions = st.sampled_from([*QUANTIZED, FULL])


@st.composite
def maps(draw: st.DrawFn) -> PrecisionMap:
    layers = draw(st.dictionaries(st.integers(0, 99), st.integers(1, 5), min_size=1, max_size=4))
    experts = {g: {k: tuple(draw(precisions) for _ in range(n)) for k, n in layers.items()} for g in GROUPS}
    rest = draw(st.dictionaries(st.sampled_from(list(DEFAULT_REST)), precisions))
    return PrecisionMap(experts, rest, {"method": "drawn", "budget": "3.0bpw"})


@pytest.mark.parametrize(
    ("precision", "text"),
    [
        (Precision(3, 64), "3g64"),
        (Precision(4, 128, True), "4g128s"),
        (Precision(8, -1), "8g-1"),
        (Precision(5, -1, True), "5g-1s"),
        (FULL, "16"),
    ],
)
def test_printed_and_parsed(precision: Precision, text: str) -> None:
    assert str(precision) == text
    assert parse_precision(text) == precision


def test_every_precision_is_parsed_from_its_text() -> None:
    for precision in [*QUANTIZED, FULL]:
        assert parse_precision(str(precision)) == precision
    assert len({str(p) for p in QUANTIZED}) == len(QUANTIZED)


def test_a_bare_number_takes_the_groups_of_the_base() -> None:
    assert parse_precision(3, Precision(4, 128, True)) == Precision(3, 128, True)
    assert parse_precision("2") == Precision(2, DEFAULT_GROUP_SIZE, False)
    assert parse_precision(" 16 ", Precision(4, 32)) == FULL
    assert parse_precision("2c", Precision(4, 64)) == Precision(2, 64, codebook=True)
    assert parse_precision("2c", Precision(4, -1, True)) == Precision(2, -1, codebook=True)


def test_sixteen_bits_have_no_groups() -> None:
    assert Precision(16, 32, False) == FULL
    assert FULL.group_count(100) == 0


@pytest.mark.parametrize(
    "value", ["", "3g", "g64", "3.0", "3g64x", "c", "2cs", "2cg64", "-3", "3g-2x", True, None, "3 g64", [3]]
)
def test_what_is_not_a_precision_is_refused(value: Any) -> None:
    with pytest.raises(MapError, match="expected bits such as 3"):
        parse_precision(value)


@pytest.mark.parametrize("bits", [-2, 1, 7, 9, 32])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(MapError, match=f"{bits} bits; expected one of 2, 3, 4, 5, 6, 8, 16"):
        Precision(bits)


@pytest.mark.parametrize("size", [0, 16, 256, -2])
def test_other_group_sizes_are_refused(size: int) -> None:
    with pytest.raises(MapError, match="expected one of 32, 64, 128, -1"):
        Precision(4, size)


def test_larger_precisions_sort_later() -> None:
    assert sorted([FULL, Precision(3), Precision(2, 128), Precision(2, 64)]) == [
        Precision(2, 64), Precision(2, 128), Precision(3), FULL]  # fmt: skip


@given(st.sampled_from(QUANTIZED), st.integers(1, 20), st.integers(1, 20))
def test_bytes_are_those_of_the_bits(precision: Precision, out8: int, multiple: int) -> None:
    out, inp = 8 * out8, 128 * multiple
    groups = inp // (inp if precision.group_size == -1 else precision.group_size)
    bits = (
        out * inp * precision.bits + 16 * out * groups + (0 if precision.symmetric else out * groups * precision.bits)
    )
    assert precision.nbytes(out, inp) * 8 == bits
    assert precision.group_count(inp) == groups
    assert precision.levels == 2**precision.bits


def test_known_bytes() -> None:
    # 1024 x 2048 at 4 bits: 1 MiB of codes, 32 groups a row of 2 bytes scale and half a byte zero point
    assert Precision(4, 64).nbytes(1024, 2048) == 1048576 + 65536 + 16384
    assert Precision(4, 64, True).nbytes(1024, 2048) == 1048576 + 65536
    assert FULL.nbytes(3, 5) == 30


@pytest.mark.parametrize(
    ("precision", "shape", "message"),
    [
        (Precision(4, 128), (8, 96), "groups of 128 do not fit rows of 96 inputs; use group size 32$"),
        (Precision(4, 64), (8, 40), "do not fit rows of 40 inputs; use group size -1"),
        (Precision(4, -1), (8, 12), "do not fit rows of 12 inputs; keep this matrix at 16 bits"),
        (Precision(4, 32), (12, 64), "12 outputs cannot be packed: expected a multiple of 8"),
    ],
)
def test_shapes_that_do_not_fit(precision: Precision, shape: tuple[int, int], message: str) -> None:
    assert not precision.fits(*shape)
    with pytest.raises(MapError, match=message):
        precision.nbytes(*shape)
    assert FULL.fits(*shape)


def test_uniform_map() -> None:
    made = PrecisionMap.uniform({0: 2, 3: 4}, Precision(3))
    assert made.layers == {0: 2, 3: 4}
    assert made.histogram() == {Precision(3): 12}
    assert made.rest == DEFAULT_REST
    assert made.of(3, 1, "down") == Precision(3)
    assert made.note == {"method": "uniform"}


def test_histogram_counts_both_groups_and_is_ordered() -> None:
    made = PrecisionMap({"gate_up": {0: (Precision(4), Precision(2))}, "down": {0: (Precision(2), FULL)}})
    assert list(made.histogram().items()) == [(Precision(2), 2), (Precision(4), 1), (FULL, 1)]


@given(maps())
def test_maps_survive_json(made: PrecisionMap) -> None:
    text = json.dumps(made.to_json())
    back = PrecisionMap.from_json(json.loads(text))
    assert back == made
    assert json.dumps(back.to_json()) == text


def test_a_person_can_read_and_edit_it() -> None:
    experts = {"gate_up": {0: (Precision(2, 64), Precision(3, 64))}, "down": {0: (Precision(4, 128, True), FULL)}}
    data = PrecisionMap(experts, {"lm_head": Precision(8, 128, True)}).to_json()
    assert data["base"] == {"group_size": 64, "symmetric": False}
    assert data["experts"] == {"gate_up": {"0": [2, 3]}, "down": {"0": ["4g128s", 16]}}
    assert data["rest"] == {"lm_head": "8g128s"}
    data["experts"]["down"]["0"][1] = "3"
    assert PrecisionMap.from_json(data).of(0, 1, "down") == Precision(3, 64)


def changed(**changes: Any) -> dict[str, Any]:
    data = PrecisionMap.uniform({0: 2}, Precision(3)).to_json()
    return {k: v for k, v in {**data, **changes}.items() if v is not math.nan}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not a precision map"),
        ({}, "not a precision map"),
        (changed(format="mopeq-stats"), '"format": "mopeq-precision"'),
        (changed(version=2), "version 2; this mopeq reads version 1"),
        (changed(version=math.nan), "version None"),
        (changed(extra=1), r"unknown keys \['extra'\]"),
        (changed(base=math.nan), "malformed precision map"),
        (changed(base={"group_size": 64}), "malformed precision map"),
        (changed(base={"group_size": "x", "symmetric": False}), "malformed precision map"),
        (changed(base={"group_size": 63, "symmetric": False}), "group size 63"),
        (changed(experts=math.nan), "malformed precision map"),
        (changed(experts=[]), "malformed precision map"),
        (changed(experts={"gate_up": {"0": [3]}}), r"expected \['down', 'gate_up'\]"),
        (changed(experts={"gate_up": {"0": [3]}, "down": {"0": [3]}, "up": {}}), "expert groups"),
        (changed(experts={"gate_up": {"0": [3]}, "down": {"0": [3, 3]}}), "they differ"),
        (changed(experts={"gate_up": {"0": [3]}, "down": {"1": [3]}}), "they differ"),
        (changed(experts={"gate_up": {"a": [3]}, "down": {"a": [3]}}), "malformed precision map"),
        (changed(experts={"gate_up": {"0": 3}, "down": {"0": 3}}), "malformed precision map"),
        (changed(experts={"gate_up": {"0": [7]}, "down": {"0": [3]}}), "7 bits"),
        (changed(experts={"gate_up": {"0": [None]}, "down": {"0": [3]}}), "precision None"),
        (changed(rest={"lm_head": "8x"}), "precision '8x'"),
        (changed(rest=[1]), "malformed precision map"),
        (changed(base={"group_size": 64, "symmetric": "false"}), "symmetric true or false"),
        (changed(base={"group_size": 64.5, "symmetric": False}), "expected a whole group_size"),
        (changed(experts={"gate_up": {"0": "32"}, "down": {"0": "32"}}), "layer 0 gate_up is '32'; expected a list"),
        (changed(experts={"gate_up": {"00": [3]}, "down": {"0": [3]}}), "layer '00'; expected its number"),
        (changed(experts={"gate_up": {"0": [3, 9]}, "down": {"0": [3]}}), "layer 0 gate_up, expert 1: precision of 9"),
        (changed(note={"predicted_loss": math.nan}), "malformed precision map"),
        (changed(note=[1]), "malformed precision map"),
    ],
)
def test_what_is_not_a_map_is_refused(data: Any, message: str) -> None:
    with pytest.raises(MapError, match=message):
        PrecisionMap.from_json(data)
