"""Statistics, cost tables and their files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mopeq.errors import MapError
from mopeq.precision import FULL, GROUPS, Precision
from mopeq.spec import Inventory, LayerShape
from mopeq.stats import (
    CostTable,
    Stats,
    Unit,
    cost_metric,
    cost_options,
    cost_table,
    read_json,
    write_json,
)

MODEL = Inventory("olmoe", {0: LayerShape(2, 64, 32, 1), 2: LayerShape(3, 64, 32, 1)}, {}, 10, 20)
P2, P3 = Precision(2, 32), Precision(3, 32)


def rows(start: float) -> dict[int, tuple[float, ...]]:
    return {0: (start, start + 1), 2: (start + 2, start + 3, start + 4)}


def costs() -> Stats:
    metrics = {cost_metric("c", g, p): rows(100 * i + 10 * p.bits) for i, g in enumerate(GROUPS) for p in (P3, P2)}
    return Stats(MODEL, metrics)


def test_metrics_are_added_and_replaced() -> None:
    stats = Stats(MODEL, {"frequency": rows(0)}, {"tokens": 5})
    more = stats.with_metrics({"fisher": {0: [1, 2], 2: [3, 4, 5]}, "frequency": rows(7)}, seed=3)
    assert more.metric("fisher") == {0: (1.0, 2.0), 2: (3.0, 4.0, 5.0)}
    assert more.metric("frequency") == rows(7)
    assert more.info == {"tokens": 5, "seed": 3}
    assert stats.metric("frequency") == rows(0)


def test_an_unknown_metric_names_those_there_are() -> None:
    stats = Stats(MODEL, {"frequency": rows(0), "frequency.stderr": rows(0), "c/down/2g32": rows(0)})
    with pytest.raises(MapError, match="no metric 'fisher' in these statistics; they have frequency; measure it"):
        stats.metric("fisher")


@pytest.mark.parametrize("bad", [{0: (1.0, 2.0)}, {0: (1.0,), 2: (1.0, 2.0, 3.0)}, {**rows(0), 3: (1.0,)}])
def test_a_metric_of_another_shape_is_refused(bad: Any) -> None:
    with pytest.raises(MapError, match="does not have one value for each expert of this olmoe"):
        Stats(MODEL, {"frequency": bad})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_refused_with_the_expert(value: float) -> None:
    with pytest.raises(MapError, match=r"metric 'fisher' is not finite for experts 2\.1"):
        Stats(MODEL, {"fisher": {0: (1.0, 2.0), 2: (1.0, value, 3.0)}})


def test_statistics_survive_json() -> None:
    stats = Stats(MODEL, {"frequency": {0: (0.123456789, 1e-30), 2: (1e30, 0.0, -3.5)}}, {"seed": 1, "data": ["a"]})
    assert Stats.from_json(json.loads(json.dumps(stats.to_json()))) == stats


def test_numbers_are_written_with_nine_digits() -> None:
    stats = Stats(MODEL, {"frequency": {0: (1 / 3, 2 / 3), 2: (0.0, 0.0, 0.0)}})
    assert stats.to_json()["metrics"]["frequency"]["0"] == [0.333333333, 0.666666667]
    once = Stats.from_json(stats.to_json())
    assert once == Stats.from_json(once.to_json())


def changed(**changes: Any) -> dict[str, Any]:
    return {**Stats(MODEL, {"frequency": rows(0)}).to_json(), **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("x", "not a statistics file"),
        ({"format": "mopeq-precision"}, '"format": "mopeq-stats"'),
        (changed(version=9), "statistics version 9"),
        (changed(metrics={"f": {"0": "x", "2": [1, 2, 3]}}), "malformed statistics file"),
        (changed(metrics=[]), "malformed statistics file"),
        (changed(metrics={"f": {"0": [1, 2]}}), "one value for each expert"),
        (changed(metrics={"f": {"0": [1, "nan"], "2": [1, 2, 3]}}), r"not finite for experts 0\.1"),
        (changed(model={}), "malformed model block"),
        (changed(info=[1]), "malformed statistics file"),
    ],
)
def test_what_is_not_a_statistics_file_is_refused(data: Any, message: str) -> None:
    with pytest.raises(MapError, match=message):
        Stats.from_json(data)


def test_options_are_those_measured_for_both_groups() -> None:
    stats = costs().with_metrics({"c/down/4g32": rows(0), "other/down/8g32": rows(0), "other/gate_up/8g32": rows(0)})
    assert cost_options(stats, "c") == (P2, P3)
    assert cost_options(stats, "other") == (Precision(8, 32),)
    assert cost_options(stats, "none") == ()


def test_a_table_by_group() -> None:
    table = cost_table(costs(), "c")
    assert table.options == (P2, P3)
    assert [str(u) for u in table.units[:4]] == ["0.0.gate_up", "0.0.down", "0.1.gate_up", "0.1.down"]
    assert len(table.units) == 10
    assert table.loss.shape == table.size.shape == (10, 2)
    at = table.units.index(Unit(2, 1, "down"))
    assert table.loss[at].tolist() == [123.0, 133.0]
    assert table.size[at].tolist() == [P2.nbytes(64, 32), P3.nbytes(64, 32)]
    assert table.size[table.units.index(Unit(0, 0, "gate_up"))].tolist() == [
        2 * P2.nbytes(32, 64),
        2 * P3.nbytes(32, 64),
    ]


def test_a_table_by_expert_adds_the_groups() -> None:
    by_group, by_expert = cost_table(costs(), "c"), cost_table(costs(), "c", granularity="expert")
    assert [str(u) for u in by_expert.units] == ["0.0", "0.1", "2.0", "2.1", "2.2"]
    assert np.array_equal(by_expert.loss, by_group.loss[0::2] + by_group.loss[1::2])
    assert np.array_equal(by_expert.size, by_group.size[0::2] + by_group.size[1::2])


def test_a_table_of_chosen_options() -> None:
    assert cost_table(costs(), "c", [P3]).loss.shape == (10, 1)
    assert cost_table(costs(), "c", [P3, P2]).options == (P2, P3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none",), "cost 'none' was not measured at any precision; it was at: none"),
        (("c", [P2, FULL]), "cost 'c' was not measured at 16; it was at: 2g32, 3g32"),
        (("c", [P2], "layer"), "granularity 'layer'; expected group or expert"),
    ],
)
def test_tables_that_cannot_be_made(arguments: Any, message: str) -> None:
    with pytest.raises(MapError, match=message):
        cost_table(costs(), *arguments)


@pytest.mark.parametrize("granularity", ["group", "expert"])
def test_choices_become_a_map_with_the_bytes_of_the_table(granularity: str) -> None:
    table = cost_table(costs(), "c", granularity=granularity)
    choice = np.arange(len(table.units)) % 2
    made = table.to_map(choice, {"lm_head": FULL}, {"method": "by hand"})
    assert made.layers == MODEL.experts
    assert made.note == {"method": "by hand"}
    assert MODEL.expert_bytes(made) == int(table.size[np.arange(len(choice)), choice].sum())
    for unit, index in zip(table.units, choice, strict=True):
        for group in GROUPS if unit.group is None else (unit.group,):
            assert made.of(unit.layer, unit.expert, group) == table.options[index]


def test_a_choice_for_every_unit_is_needed() -> None:
    table = CostTable((Unit(0, 0),), (P2,), np.zeros((1, 1)), np.ones((1, 1), dtype=np.int64))
    with pytest.raises(ValueError, match="shorter"):
        table.to_map([], {}, {})


def test_json_files_keep_rows_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    data = changed(info={"short": [{"a": 1}, {"b": [1, 2]}], "empty": {}, "text": "é"})
    write_json(path, data)
    assert read_json(path) == data
    assert '"0": [0.0, 1.0]' in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["stats.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": math.nan})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["stats.json"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MapError, match=r"no file .*none\.json; check the path"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name in ("bad.json", "binary.json"):
        with pytest.raises(MapError, match="not readable JSON"):
            read_json(tmp_path / name)
    with pytest.raises(MapError, match="not readable JSON"):
        read_json(tmp_path)
