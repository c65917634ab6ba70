"""What bytes depend on: an inventory's arithmetic equals the tensors really packed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopeq.errors import MapError
from mopeq.precision import BITS, FULL, GROUP_SIZES, GROUPS, Precision, PrecisionMap
from mopeq.qtensor import pack, pack_full
from mopeq.quantizers import rtn
from mopeq.spec import (
    Expert,
    ExpertId,
    Inventory,
    KeptRef,
    LayerShape,
    LinearRef,
    MoELayer,
    MoESpec,
    WeightRef,
    fitting,
)

QUANTIZED = [Precision(b, g, s) for b in BITS if b < 16 for g in GROUP_SIZES for s in (False, True)]


def inventory(**changes: Any) -> Inventory:
    fields: dict[str, Any] = {
        "model_type": "olmoe",
        "layers": {1: LayerShape(3, 128, 64, 2), 4: LayerShape(2, 128, 32, 2)},
        "linears": {"attention": ((128, 128, 8), (32, 128, 4)), "lm_head": ((100, 128, 1),)},
        "kept_parameters": 5000,
        "kept_bytes": 10000,
        "header_bytes": 700,
    }
    return Inventory(**{**fields, **changes})


def packed_bytes(shape: tuple[int, int], precision: Precision) -> int:
    weight = torch.zeros(shape)
    return (pack_full(weight) if precision == FULL else pack(rtn(weight[None], precision)[0])).nbytes


def a_map(model: Inventory, draw: Any) -> PrecisionMap:
    fits = {g: {k: [p for p in (*QUANTIZED, FULL) if all(p.fits(*s) for s in v.matrices(g))]
                for k, v in model.layers.items()} for g in GROUPS}  # fmt: skip
    experts = {g: {k: tuple(draw(st.sampled_from(fits[g][k])) for _ in range(n)) for k, n in model.experts.items()}
               for g in GROUPS}  # fmt: skip
    return PrecisionMap(experts, {"attention": Precision(4, 64), "lm_head": Precision(8, 32)})


def test_expert_ids_print_and_sort() -> None:
    assert str(ExpertId(3, 17)) == "3.17"
    assert sorted([ExpertId(2, 0), ExpertId(1, 9)]) == [ExpertId(1, 9), ExpertId(2, 0)]


def a_spec() -> MoESpec:
    def expert(layer: int, e: int) -> Expert:
        refs = [WeightRef(f"l{layer}.e{e}.{m}", s) for m, s in (("g", (64, 32)), ("u", (64, 32)), ("d", (32, 64)))]
        return Expert(ExpertId(layer, e), refs[0], refs[1], refs[2], {m: f"{layer}.{e}.{m}" for m in ("gate", "up")})

    layers = tuple(MoELayer(k, f"m{k}", f"r{k}", (expert(k, 0), expert(k, 1)), 1, 32, 64) for k in (2, 5))
    linears = tuple(LinearRef(f"q{i}", f"q{i}.weight", (32, 32), "attention") for i in range(3))
    head = LinearRef("lm_head", "lm_head.weight", (48, 32), "lm_head")
    return MoESpec("mixtral", layers, (*linears, head), (KeptRef("norm.weight", (32,), "norm"),))


def test_the_inventory_of_a_spec() -> None:
    spec = a_spec()
    made = spec.inventory(64, 10)
    assert made.layers == {2: LayerShape(2, 32, 64, 1), 5: LayerShape(2, 32, 64, 1)}
    assert made.linears == {"attention": ((32, 32, 3),), "lm_head": ((48, 32, 1),)}
    assert (made.kept_parameters, made.kept_bytes, made.header_bytes) == (32, 64, 10)
    assert made.expert_parameters == 4 * 3 * 32 * 64
    assert made.linear_parameters == 3 * 32 * 32 + 48 * 32
    assert made.parameters == made.expert_parameters + made.linear_parameters + 32


def test_lookups_of_a_spec() -> None:
    spec = a_spec()
    assert [str(e.id) for e in spec.experts()] == ["2.0", "2.1", "5.0", "5.1"]
    assert spec.layer(5).shapes("gate_up") == ((64, 32), (64, 32))
    assert spec.layer(5).shapes("down") == ((32, 64),)
    assert [r.key for r in spec.layer(2).experts[1].refs("gate_up")] == ["l2.e1.g", "l2.e1.u"]
    assert spec.linears[0].name == "q0"


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_bytes_are_those_of_the_packed_tensors(data: st.DataObject) -> None:
    model = inventory()
    made = a_map(model, data.draw)
    experts = sum(
        packed_bytes(shape, p)
        for g in GROUPS for k, row in made.experts[g].items() for p in row for shape in model.layers[k].matrices(g)
    )  # fmt: skip
    assert model.expert_bytes(made) == experts
    assert model.expert_bits(made) == 8 * experts / (3 * 3 * 128 * 64 + 2 * 3 * 128 * 32)
    # the head has 100 rows, which no packed width takes: 16 bits
    rest = (
        8 * packed_bytes((128, 128), Precision(4, 64)) + 4 * packed_bytes((32, 128), Precision(4, 64)) + 2 * 100 * 128
    )
    assert model.rest_bytes(made.rest) == rest
    assert model.total_bytes(made) == experts + rest + 10000 + 700


def test_groups_that_are_not_named_stay_at_sixteen_bits() -> None:
    model = inventory()
    assert model.rest_bytes({}) == 2 * model.linear_parameters


def test_units() -> None:
    model = inventory()
    assert model.unit_parameters(1, "gate_up") == 2 * 64 * 128
    assert model.unit_parameters(4, "down") == 128 * 32
    assert model.unit_bytes(1, "gate_up", FULL) == 4 * 64 * 128
    assert model.unit_bytes(4, "down", Precision(2, 32)) == packed_bytes((128, 32), Precision(2, 32))


@pytest.mark.parametrize(
    ("asked", "shape", "got"),
    [
        (Precision(8, 128, True), (64, 256), Precision(8, 128, True)),
        (Precision(8, 128, True), (64, 192), Precision(8, 64, True)),
        (Precision(4, 128), (64, 96), Precision(4, 32)),
        (Precision(4, 64), (64, 96), Precision(4, 32)),
        (Precision(4, 32), (64, 48), FULL),
        (Precision(4, -1), (64, 40), Precision(4, -1)),
        (Precision(4, -1), (60, 64), FULL),
        (FULL, (7, 5), FULL),
    ],
)
def test_a_precision_that_fits(asked: Precision, shape: tuple[int, int], got: Precision) -> None:
    assert fitting(asked, *shape) == got


def test_an_inventory_survives_json() -> None:
    model = inventory()
    assert Inventory.from_json(json.loads(json.dumps(model.to_json()))) == model


def test_the_fingerprint_is_of_shapes() -> None:
    same = inventory(kept_bytes=1, header_bytes=0, layers={1: LayerShape(3, 128, 64, 1), 4: LayerShape(2, 128, 32, 2)})
    assert same.fingerprint == inventory().fingerprint
    for other in (
        inventory(model_type="mixtral"),
        inventory(layers={1: LayerShape(3, 128, 64, 2)}),
        inventory(linears={}),
    ):
        assert other.fingerprint != inventory().fingerprint


def test_an_edited_inventory_is_refused() -> None:
    data = inventory().to_json()
    data["layers"]["1"][0] = 4
    with pytest.raises(MapError, match="it was edited"):
        Inventory.from_json(data)


@pytest.mark.parametrize(
    "change",
    [{"layers": {"1": [1, 2]}}, {"layers": 3}, {"linears": {"a": [[1, 2]]}}, {"kept_bytes": "x"}, {"layers": None}],
)
def test_a_malformed_inventory_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MapError, match="malformed model block"):
        Inventory.from_json({**inventory().to_json(), **change})


def test_what_is_not_an_inventory_is_refused() -> None:
    with pytest.raises(MapError, match="malformed model block"):
        Inventory.from_json([1])
    data = inventory().to_json()
    del data["kept_bytes"]
    with pytest.raises(MapError, match="kept_bytes"):
        Inventory.from_json(data)


def test_a_map_for_another_model_is_refused() -> None:
    model = inventory()
    model.check(PrecisionMap.uniform(model.experts, Precision(3, 32)))
    for layers in ({1: 3}, {1: 3, 4: 3}, {1: 3, 5: 2}):
        with pytest.raises(MapError, match="the precision map is for another model"):
            model.check(PrecisionMap.uniform(layers, Precision(3, 32)))


def test_a_map_with_unknown_groups_is_refused() -> None:
    model = inventory()
    with pytest.raises(MapError, match=r"unknown groups \['vision'\]; this model has \['attention', 'lm_head'\]"):
        model.check(PrecisionMap.uniform(model.experts, Precision(3, 32), {"vision": FULL}))


def test_a_map_whose_groups_do_not_fit_is_refused_with_the_place() -> None:
    model = inventory()
    with pytest.raises(MapError, match="layer 1 down at 3g128: groups of 128 do not fit rows of 64 inputs"):
        model.check(PrecisionMap.uniform(model.experts, Precision(3, 128)))


def test_default_groups_fit_every_row() -> None:
    def sizes(hidden: int, width: int) -> set[int]:
        made = inventory(layers={0: LayerShape(2, 128, 128, 1), 1: LayerShape(2, hidden, width, 1)})
        return {p.group_size for p in made.precisions()}

    assert sizes(256, 128) == {128}
    assert sizes(192, 128) == {64}
    assert sizes(128, 96) == {32}
    assert sizes(128, 40) == {-1}
    assert [str(p) for p in inventory().precisions([2, 3], symmetric=True)] == ["2g32s", "3g32s"]
    assert [str(p) for p in inventory().precisions([4], 64)] == ["4g64"]
