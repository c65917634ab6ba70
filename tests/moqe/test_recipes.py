from __future__ import annotations

from pathlib import Path

import pytest

from mopeq.errors import InputError, MopeqError
from mopeq.moqe.recipes import parse_recipes


def test_recipes_are_read(tmp_path: Path) -> None:
    (tmp_path / "code.txt").write_text("x")
    (tmp_path / "packed").mkdir()
    texts = ["rtn-3bit", "awq-like-4g64s", "code=mixed-2.5@" + str(tmp_path / "code.txt"),
             f"gptq-2@{tmp_path / 'code.txt'}", str(tmp_path / "packed")]  # fmt: skip
    rtn, awq, mixed, gptq, folder = parse_recipes(texts)
    assert (rtn.name, rtn.method, rtn.level, rtn.calibrated) == ("rtn-3bit", "rtn", "3", False)
    assert (awq.quantizer, awq.level, awq.calibrated) == ("rtn-mse", "4g64s", True)
    assert (mixed.name, mixed.quantizer, mixed.level, mixed.data) == ("code", "gptq", "2.5", str(tmp_path / "code.txt"))
    assert gptq.name == "gptq-2-code"
    assert (folder.name, folder.folder, folder.calibrated) == ("packed", tmp_path / "packed", False)


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        (["rtn-3bit"], "one variant"),
        ([""], "no variants"),
        (["rtn-3bit", "rtn-3bit"], "two variants are named rtn-3bit"),
        (["rtn-3bit", "awk-3bit"], "'awk'"),
        (["rtn-3bit", "gptq-2.5bit"], "whole bits"),
        (["rtn-3bit", "mixed-3g64"], "no group size"),
        (["rtn-3bit", "gptq-3bit@nowhere.txt"], "no text nowhere.txt"),
        (["rtn-3bit", "rtn-4bit@setup.py"], "no text"),
        (["rtn-3bit", "no/such/folder"], "neither a recipe"),
        (["rtn-3bit", "../x=gptq-3bit"], "variant name '../x'"),
    ],
)
def test_what_cannot_be_read_is_said(variants: list[str], said: str) -> None:
    with pytest.raises(MopeqError, match=r"expected|check the path") as error:
        parse_recipes(variants)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_rounding_takes_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="reads no calibration text"):
        parse_recipes(["gptq-3bit", f"rtn-3bit@{tmp_path / 'a.txt'}"])
