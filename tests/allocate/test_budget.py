"""What budgets mean and how a wrong one is refused."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopeq.allocate import expert_budget, parse_budget
from mopeq.allocate.budget import check_budget
from mopeq.errors import BudgetError
from mopeq.precision import DEFAULT_REST, FULL, Precision, PrecisionMap
from tables import P2, P3, model


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("3.0bpw", "bpw", 3.0),
        ("3.0", "bpw", 3.0),
        ("2.25 BPW", "bpw", 2.25),
        (2.5, "bpw", 2.5),
        (".5", "bpw", 0.5),
        ("3.", "bpw", 3.0),
        ("1.4GB", "bytes", 1_400_000_000),
        ("900MB", "bytes", 900_000_000),
        ("1.4GiB", "bytes", math.floor(1.4 * 2**30)),
        ("5 mb", "bytes", 5_000_000),
        ("7KiB", "bytes", 7168),
        ("123456B", "bytes", 123456),
        ("1TB", "bytes", 10**12),
    ],
)
def test_budgets_are_read(text: str | float, kind: str, amount: float) -> None:
    budget = parse_budget(text)
    assert (budget.kind, budget.amount) == (kind, amount)
    assert parse_budget(budget) is budget


def test_a_budget_prints_as_it_was_written() -> None:
    assert str(parse_budget("1.4GB")) == "1.4GB"
    assert str(parse_budget("3.0")) == "3.0bpw"
    assert str(parse_budget(2.5)) == "2.5bpw"


@pytest.mark.parametrize(
    "text", ["", "GB", "3 bits", "1,4GB", "-3", "3.0.0bpw", "1e3", "nan", "inf", "three", "1.4Gb/s"]
)
def test_what_is_not_a_budget_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match=r"expected bits per expert weight such as 3.0bpw, or a size such as 1.4GB"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["0", "0GB", "0.0bpw"])
def test_nothing_is_not_a_budget(text: str) -> None:
    with pytest.raises(BudgetError, match="is not a positive number"):
        parse_budget(text)


def test_bits_count_expert_weights_only() -> None:
    inventory = model()
    assert expert_budget(parse_budget("3.0"), inventory, {}) == 3 * inventory.expert_parameters // 8
    assert expert_budget(parse_budget("3.0"), inventory, DEFAULT_REST) == 3 * inventory.expert_parameters // 8


@given(st.integers(1, 10**7), st.sampled_from([{}, DEFAULT_REST, {"attention": Precision(4, 32)}]))
def test_bytes_count_the_whole_checkpoint(total: int, rest: dict[str, Precision]) -> None:
    inventory = model(uneven=True)
    uniform = PrecisionMap.uniform(inventory.experts, P3, rest)
    fixed = inventory.total_bytes(uniform) - inventory.expert_bytes(uniform)
    assert expert_budget(parse_budget(f"{total}B"), inventory, rest) == total - fixed


def test_the_cheapest_map_and_sixteen_bits_are_within() -> None:
    inventory = model()
    floor = inventory.expert_bytes(PrecisionMap.uniform(inventory.experts, P2))
    bits = 8 * floor / inventory.expert_parameters
    assert check_budget(parse_budget(bits), inventory, {}, floor) == floor
    assert check_budget(parse_budget("16"), inventory, {}, floor) == 2 * inventory.expert_parameters


def test_below_the_floor() -> None:
    inventory = model()
    floor = inventory.expert_bytes(PrecisionMap.uniform(inventory.experts, P2))
    # 2 bits, 16 of a scale and 2 of a zero point in 32 weights
    message = (
        "budget 2.5bpw is below the smallest map that the options allow, 2.563bpw; expected 2.563bpw to 16bpw; "
        "raise the budget, or allow lower bits or larger groups"
    )
    with pytest.raises(BudgetError, match=f"^{re.escape(message)}$"):
        check_budget(parse_budget("2.5bpw"), inventory, {}, floor)
    with pytest.raises(BudgetError, match=r"0.01MB is below .*MB \(2.563bpw\); .*lower the precision of the rest"):
        check_budget(parse_budget("0.01MB"), inventory, DEFAULT_REST, floor)


def test_the_number_told_works() -> None:
    inventory = model(uneven=True)
    floor = inventory.expert_bytes(PrecisionMap.uniform(inventory.experts, P3)) + 1
    for text in ("1bpw", "1KB"):
        with pytest.raises(BudgetError) as told:
            check_budget(parse_budget(text), inventory, DEFAULT_REST, floor)
        number = re.search(r"expected ([\d.]+(?:bpw|MB))", str(told.value))
        assert number
        assert check_budget(parse_budget(number[1]), inventory, DEFAULT_REST, floor) >= floor


def test_above_sixteen_bits() -> None:
    inventory = model()
    with pytest.raises(
        BudgetError, match=r"budget 16.1 ?bpw is above 16 bits per expert weight; .* keep the model as it"
    ):
        check_budget(parse_budget("16.1bpw"), inventory, {}, 0)
    full = inventory.total_bytes(PrecisionMap.uniform(inventory.experts, FULL, {}))
    check_budget(parse_budget(f"{full}B"), inventory, {}, 0)
    with pytest.raises(BudgetError, match="above 16 bits per expert weight"):
        check_budget(parse_budget(f"{full + 1}B"), inventory, {}, 0)
