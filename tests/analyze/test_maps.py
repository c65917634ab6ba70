"""Slabs worked on by several threads give the bits of one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import killing
from mopeq.analyze.slab import over
from mopeq.cli import main
from mopeq.errors import ModelError
from mopeq.precision import Precision
from mopeq.quantize import quantize
from tiny import rewrite, tensors

Make = Callable[..., Path]


@pytest.mark.parametrize("job", ["output error", "data-free"])
def test_threads_give_the_same_bits(
    job: str, tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mopeq.quantize.slab_bytes", lambda limit, need: 1)  # one expert a unit
    model, calibration = tiny_model("gpt_oss"), killing.text(tmp_path)
    for name, flags in (("one", {}), ("three", {"across": over(["cpu"] * 3)})):
        quantize(model, tmp_path / name, **killing.JOBS[job], calibration=calibration, evaluated=False, **flags)
    assert killing.contents(tmp_path / "one") == killing.contents(tmp_path / "three")


def test_as_many_at_once_as_devices_in_order() -> None:
    both = threading.Barrier(2)

    def work(shared: int, item: int, device: torch.device) -> int:
        both.wait(timeout=30)  # nobody goes on alone
        return shared + item

    assert list(over(["cpu", "cpu"])(work, 100, range(6))) == [100, 101, 102, 103, 104, 105]


def test_errors_of_threads_and_devices(tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model("olmoe", num_hidden_layers=3)
    words = ["quantize", str(folder), "--uniform", "3", "--group-size", "32", "--method", "rtn", "--no-eval"]
    assert main([*words, "-o", str(tmp_path / "a"), "--devices", "cpu,cpu"]) == 0
    assert main([*words, "-o", str(tmp_path / "b"), "--devices", "cpu,nowhere:3"]) == 2
    assert "device 'nowhere:3' cannot be used" in capsys.readouterr().err
    name = next(key for key in tensors(folder) if "experts.3.up_proj" in key)
    rewrite(folder, {name: torch.full_like(tensors(folder)[name], torch.nan)})
    with pytest.raises(ModelError, match="NaN"):
        quantize(
            folder, tmp_path / "c", uniform=Precision(3, 32), method="rtn", evaluated=False, across=over(["cpu", "cpu"])
        )
    assert not (tmp_path / "c").exists()
