"""Killed, interrupted, out of space, files lost: the same call goes on, and makes what it would have made."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import killing
from mopeq import measure as measuring
from mopeq.checkpoint import verify
from mopeq.checkpoint import writer as writing
from mopeq.errors import InputError, OutputError
from mopeq.journal import JOURNAL, Journal
from mopeq.measure import Calibration, measure
from mopeq.precision import Precision
from mopeq.quantize import quantize
from mopeq.stats import Stats, read_json

Make = Callable[..., Path]


class Made(NamedTuple):
    model: Path
    calibration: Calibration
    out: Path


@pytest.fixture(scope="module", params=list(killing.JOBS))
def made(request: pytest.FixtureRequest, tiny_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A job and what it makes undisturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    model, calibration = tiny_model("qwen2_moe"), killing.text(folder)
    killing.made(model, folder / request.param, request.param, calibration)
    return Made(model, calibration, folder / request.param)


def stopped(made: Made, out: Path, at: int) -> None:
    """A run that meets a full disk when it writes its file number ``at``."""
    real, calls = writing._write, 0

    def full(path: Path, *parts: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == at:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_write", full)
        killing.made(made.model, out, made.out.name, made.calibration)


def check(made: Made, out: Path) -> None:
    """What was made is whole and the same, and nothing else is there."""
    verify(out)
    assert killing.contents(out) == killing.contents(made.out)
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_run_goes_on(made: Made, seed: int, tmp_path: Path) -> None:
    draw, out = random.Random(f"{seed} {made.out.name}"), tmp_path / "out"
    killing.killed_and_resumed(made.model, out, made.out.name, made.calibration, draw, 0.4)
    check(made, out)
    assert killing.done_again(out) == []


@pytest.mark.parametrize("at", [2, 4, 6])
def test_a_full_disk_leaves_what_can_be_gone_on_with(made: Made, at: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"the disk is full: .*free space and go on with --resume"):
        stopped(made, out, at)
    assert not out.exists()
    killing.made(made.model, out, made.out.name, made.calibration, resume=True)
    check(made, out)
    assert killing.done_again(out) == []


def test_lost_and_damaged_files_are_made_again(made: Made, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(OutputError, match="the disk is full"):
        stopped(
            made, out, {"budget": 13, "output error": 9, "uniform": 7, "compensated": 11, "data-free": 3}[made.out.name]
        )
    journal = [json.loads(line) for line in (partial / JOURNAL).read_text().splitlines()]
    work = [line for line in journal if line.get("step", "").startswith(("measure", "pack "))]
    lost, cut = (partial / next(iter(work[at]["files"])) for at in (0, -1))
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-100])
    cut_bytes = cut.stat().st_size
    killing.made(made.model, out, made.out.name, made.calibration, resume=True)
    check(made, out)
    journal = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines()]
    assert [line["event"] for line in journal].count("resume") == 1
    redone = [line for line in journal if line["event"] == "redo"]
    assert [line["step"] for line in redone if "is missing" in line["why"]] == [work[0]["step"]]
    assert [line["step"] for line in redone if f"has {cut_bytes} bytes" in line["why"]] == [work[-1]["step"]]


def test_resuming_what_is_finished_does_nothing_more(made: Made, tmp_path: Path) -> None:
    out = tmp_path / made.out.name
    shutil.copytree(made.out, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = quantize(
        made.model, out, **killing.JOBS[out.name], calibration=made.calibration, evaluated=False, resume=True
    )
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert again.bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert list(again.fallbacks) == json.loads((out / "mopeq" / "run.json").read_text())["fallbacks"]


def unfinished(tiny_model: Make, tmp_path: Path) -> Made:
    made = Made(tiny_model("qwen2_moe"), killing.text(tmp_path), tmp_path / "uniform")
    with pytest.raises(OutputError, match="the disk is full"):
        stopped(made, tmp_path / "out", 5)
    return made


def test_another_command_or_model_is_refused(tiny_model: Make, tmp_path: Path) -> None:
    made, out = unfinished(tiny_model, tmp_path), tmp_path / "out"
    job = {"uniform": Precision(3, 32), "calibration": made.calibration, "evaluated": False, "resume": True}
    with pytest.raises(OutputError, match=r"out.partial holds an unfinished run; the same command with --resume"):
        quantize(made.model, out, **{**job, "resume": False})
    with pytest.raises(OutputError, match=r'was begun with map "[0-9a-f]+", and this command has "'):
        quantize(made.model, out, **{**job, "uniform": Precision(4, 32)})
    with pytest.raises(
        OutputError, match=r"begun with calibration seed 0, and this command has 1; give the same command"
    ):
        quantize(made.model, out, **{**job, "calibration": replace(made.calibration, seed=1)})
    with pytest.raises(OutputError, match=r'was begun with dtype null, and this command has "torch.bfloat16"'):
        quantize(made.model, out, **job, dtype=torch.bfloat16)
    copy = Path(shutil.copytree(made.model, tmp_path / "copy"))
    with pytest.raises(OutputError, match="was begun with model "):
        quantize(copy, out, **job)
    assert quantize(made.model, out, **job).path == out
    with pytest.raises(OutputError, match=r"out is finished, and was made with map .*; give a new folder"):
        quantize(made.model, out, **{**job, "uniform": Precision(4, 32)})


def test_two_runs_into_one_folder(tiny_model: Make, tmp_path: Path) -> None:
    made, out = unfinished(tiny_model, tmp_path), tmp_path / "out"
    partial = tmp_path / "out.partial"
    begin = json.loads((partial / JOURNAL).read_text().splitlines()[0])
    with Journal(partial, begin["job"]):
        for resume in (False, True):
            with pytest.raises(OutputError, match=r"another mopeq is writing .*out.partial; wait for it"):
                killing.made(made.model, out, "uniform", made.calibration, resume=resume)
    killing.made(made.model, out, "uniform", made.calibration, resume=True)
    verify(out)


def test_measuring_spills_and_goes_on(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``analyze`` stopped at every layer, and not: the same statistics, and nothing left beside them."""
    model, calibration, out = tiny_model("qwen2_moe"), killing.text(tmp_path), tmp_path / "stats.json"
    partial = tmp_path / "stats.json.partial"
    metrics = ("frequency", "fisher_error")
    asked: dict[str, Any] = {"calibration": calibration, "options": [Precision(2, 32), Precision(4, 32)]}
    wanted = measure(model, metrics, **asked)
    real, done = measuring.layer_metrics, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        if "fisher_error" not in args[4]:
            return real(*args, **kwargs)
        assert any(partial.glob("scratch/hidden-*.safetensors")), "activations are on the disk"
        assert not any(partial.glob("scratch/options-*"))
        if done == 1:
            raise KeyboardInterrupt
        done += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(measuring, "layer_metrics", counted)
    with pytest.raises(KeyboardInterrupt, match="keeps what is finished"):
        measure(model, metrics, **asked, out=out)
    done = 0
    with pytest.raises(OutputError, match="holds an unfinished run"):
        measure(model, metrics, **asked, out=out)
    with pytest.raises(OutputError, match="was begun with quantizer"):
        measure(model, metrics, **asked, quantizer="rtn", out=out, resume=True)
    found = measure(model, metrics, **asked, out=out, resume=True)
    assert done == 1, "the finished layer is not measured again"
    assert found.metrics == wanted.metrics
    assert list(tmp_path.glob("stats.json*")) == [out]
    assert Stats.from_json(read_json(out)).to_json() == found.to_json()
    out.write_text("{}")  # is replaced
    assert measure(model, ("frequency",), **asked, out=out).metrics["frequency"] == wanted.metrics["frequency"]
    assert list(tmp_path.glob("stats.json*")) == [out]


def dies_where_it_removes(work: Callable[[], object], name: str) -> None:
    """Carry ``work`` out in a process that is killed when it is about to remove a folder of that name, half of it."""
    process = os.fork()
    if process == 0:
        real = shutil.rmtree

        def half(path: Path, *args: Any, **kwargs: Any) -> None:
            if Path(path).name != name:
                return real(path, *args, **kwargs)
            for file in sorted(file for file in Path(path).rglob("*") if file.is_file())[::2]:
                file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

        shutil.rmtree = half
        try:
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def test_measured_and_killed_while_it_cleans_up(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statistics are there, whole, before what they are made of goes; asked again, nothing runs again."""
    model, out = tiny_model("qwen2_moe"), tmp_path / "stats.json"
    asked: dict[str, Any] = {"calibration": killing.text(tmp_path), "options": [Precision(2, 32)], "out": out}
    metrics = ("frequency", "inverse_norm", "output_error")
    dies_where_it_removes(lambda: measure(model, metrics, **asked), "stats.json.partial")
    wanted = Stats.from_json(read_json(out))
    assert set(metrics[:2]) < set(wanted.metrics)
    with pytest.raises(OutputError, match=r"stats.json.partial (exists|holds)"):
        measure(model, metrics, **asked)
    monkeypatch.setattr(measuring, "Shell", None)
    assert measure(model, metrics, **asked, resume=True) == wanted
    assert list(tmp_path.glob("stats.json*")) == [out]
    with pytest.raises(TypeError):  # of another job nothing is there
        measure(model, ("frequency",), **asked, resume=True)


def test_killed_while_the_finished_folder_is_cleaned_up(made: Made, tmp_path: Path) -> None:
    """Candidates and activations are gone, in part: what was made of them is not made again."""
    out = tmp_path / "out"
    dies_where_it_removes(lambda: killing.made(made.model, out, made.out.name, made.calibration), "scratch")
    assert not out.exists()
    killing.made(made.model, out, made.out.name, made.calibration, resume=True)
    check(made, out)
    events = [json.loads(line)["event"] for line in (out / JOURNAL).read_text().splitlines()]
    assert "redo" not in events
    assert "done" not in events[events.index("resume") :]


def test_measuring_keeps_below_a_limit_or_tells_the_number(tiny_model: Make, tmp_path: Path) -> None:
    model, out = tiny_model("olmoe"), tmp_path / "stats.json"
    with pytest.raises(InputError, match=r"--max-memory is 0\.1 GB and this needs (\d\.\d\d) GB"):
        measure(model, ["output_error"], calibration=killing.text(tmp_path), out=out, max_memory=10**8)
    with pytest.raises(InputError, match="fisher takes the whole model in memory at once"):
        measure(model, ["fisher"], calibration=killing.text(tmp_path), out=out, max_memory=10**12)
    assert list(tmp_path.glob("stats*")) == []
    assert measure(model, ["frequency"], calibration=killing.text(tmp_path), out=out, max_memory=2 * 10**9).metrics
    assert list(tmp_path.glob("stats*")) == [out]
