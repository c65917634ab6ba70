"""Recipes set what is not given, and are recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mopeq.cli import main
from mopeq.cli.flags import parser
from mopeq.cli.recipes import RECIPES, parse, recipe_line
from mopeq.precision import parse_precision
from mopeq.quantizers import QUANTIZERS
from mopeq.stats import read_json

COMMAND = ["quantize", "model", "-o", "out", "--budget", "3bpw"]
PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_defaults_of_flags_that_exist(name: str) -> None:
    plain = vars(parse(parser(), COMMAND))
    options = parse(parser(), [*COMMAND, "--recipe", name])
    changed = {key: value for key, value in vars(options).items() if key in RECIPES[name] and plain[key] != value}
    assert changed, "it differs from no recipe"
    assert set(RECIPES[name]) <= set(plain)
    assert {key: getattr(options, key) for key in RECIPES[name]} == RECIPES[name]
    assert options.method in QUANTIZERS
    assert all(parse_precision(level) for level in options.levels.split(","))


@pytest.mark.parametrize("flags", [["--recipe", "best", "--samples", "7"], ["--samples", "7", "--recipe", "best"]])
def test_flags_that_are_given_win_wherever_they_stand(flags: list[str]) -> None:
    options = parse(parser(), [*COMMAND, *flags])
    assert options.samples == 7
    assert options.levels == RECIPES["best"]["levels"]
    assert "--samples 7" in recipe_line(options)


def test_what_a_recipe_turns_on_can_be_turned_off() -> None:
    assert parse(parser(), [*COMMAND, "--recipe", "best"]).compensate
    options = parse(parser(), [*COMMAND, "--recipe", "best", "--no-compensate"])
    assert not options.compensate
    assert recipe_line(options).endswith(" --no-compensate")


def test_without_a_recipe_nothing_is_said() -> None:
    assert recipe_line(parse(parser(), COMMAND)) == ""


def test_every_recipe_has_its_part_of_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, flags in RECIPES.items():
        said = " ".join(f"--{flag}" if value is True else f"--{flag} {value}" for flag, value in flags.items())
        assert f"`--recipe {name}`" in page
        assert f"`{said}`" in page


def test_a_recipe_is_printed_and_recorded(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--recipe", "data-free", "--samples", "4", "--length", "32", "--group-size", "32", "--levels", "2,3,4"]
    assert main(["quantize", str(tiny_model("olmoe")), "-o", str(out), "--budget", "3.5bpw", *words]) == 0
    said = capsys.readouterr().out
    assert "recipe data-free: --method gptq --cost fisher_error --data self" in said
    run = read_json(out / "mopeq" / "run.json")
    assert run["recipe"] == "data-free: --method gptq --cost fisher_error --data self"
    assert run["calibration"]["data"] == "self"
    assert json.loads((out / "mopeq" / "evaluation.json").read_text())["info"]["windows"] == 32
