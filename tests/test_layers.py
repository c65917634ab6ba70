"""Keys of MoE layers: numbers that print as what they stand for."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from mopeq.errors import MapError
from mopeq.layers import decoder_of, image_experts, layer_key
from mopeq.precision import Precision, PrecisionMap
from mopeq.spec import ExpertId, Inventory, LayerShape
from mopeq.stats import Stats, Unit


def test_a_key_is_written_and_read() -> None:
    key = image_experts(3)
    for same in (key, pickle.loads(pickle.dumps(key)), copy.deepcopy(key), layer_key("3.vision")):
        assert str(same) == repr(same) == f"{same}" == "3.vision"
        assert same == key
        assert decoder_of(same) == 3
    assert layer_key("3") == decoder_of(3) == 3
    assert type(layer_key("3")) is int
    assert sorted([key, 12, image_experts(0), 3]) == [3, 12, image_experts(0), key]
    assert {3: "text", key: "image"}[layer_key("3.vision")] == "image"
    assert (str(ExpertId(key, 17)), str(Unit(key, 17, "down"))) == ("3.vision.17", "3.vision.17.down")


@pytest.mark.parametrize("text", ["", "03", "-1", "3.text", "3.vision.vision", ".vision", "vision", str(1 << 20), "²"])
def test_what_is_no_key(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected its number, such as 3, or 3\.vision"):
        layer_key(text)


def test_files_with_two_sets_of_experts_in_a_layer() -> None:
    """Inventory, statistics and map, through JSON as text; a map of one set alone is another model's."""
    layers = {1: LayerShape(2, 64, 128, 1), image_experts(1): LayerShape(3, 64, 32, 1)}
    model = Inventory("ernie4_5_vl_moe", layers, {}, 0, 0)
    assert Inventory.from_json(json.loads(json.dumps(model.to_json()))) == model
    stats = Stats(model, {"tokens": {1: (4.0, 5.0), image_experts(1): (0.0, 1.0, 2.0)}})
    assert Stats.from_json(json.loads(json.dumps(stats.to_json()))) == stats
    made = PrecisionMap.uniform(model.experts, Precision(4, 32))
    written = json.loads(json.dumps(made.to_json()))
    assert written["experts"]["down"] == {"1": [4, 4], "1.vision": [4, 4, 4]}
    assert PrecisionMap.from_json(written) == made
    weights = 3 * 64 * (2 * 128 + 3 * 32)
    assert model.expert_parameters == weights
    assert model.expert_bytes(made) == weights * 4 // 8 + weights // 32 * (16 + 4) // 8  # codes, scales, zero points
    for rows in written["experts"].values():
        del rows["1.vision"]
    with pytest.raises(MapError, match="another model"):
        model.check(PrecisionMap.from_json(written))
