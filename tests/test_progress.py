"""What a long run says while it goes on, and to whom."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import killing
from mopeq.checkpoint import read_packed
from mopeq.cli import main
from mopeq.measure import open_model
from mopeq.precision import GROUPS
from mopeq.progress import Stage, Stages, drawn, note, silent
from mopeq.qtensor import dequantize
from mopeq.source import read_group

Make = Callable[..., Path]
ALWAYS = {"event", "time", "stage", "done", "total", "seconds", "seconds_left", "memory_bytes"}


def said(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    """The events of a command, which says nothing else."""
    assert main([*map(str, words), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return [json.loads(line) for line in out.splitlines()]


def test_events_of_a_run_with_a_budget(tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = killing.text(tmp_path).data
    flags = ("--budget", "3.2bpw", "--group-size", 32, "--samples", 8, "--length", 32, "--data", text, "--no-eval")
    *events, result = said(capsys, "quantize", tiny_model("olmoe"), "-o", tmp_path / "out", *flags)
    assert (result["event"], result["out"]) == ("result", str(tmp_path / "out"))
    assert {event["event"] for event in events} == {"progress", "end"}
    assert all(event.keys() >= ALWAYS and event["memory_bytes"] > 2**27 for event in events)
    stages = list(dict.fromkeys(event["stage"] for event in events))
    assert stages == ["calibration data forward", "and back", "quantize with gptq", "everything else"]
    tokens = [event["tokens"] for event in events if event["stage"] == "and back" and "tokens" in event]
    assert max(tokens) == 8 * 32
    measured = [event for event in events if event["stage"] == "and back" and "experts" in event]
    layers = list(dict.fromkeys(event["layer"] for event in measured))
    assert layers == sorted(layers, reverse=True)
    assert all(event["experts"] == 8 and event["error_of"] == "fisher_error at 3g32" for event in measured)
    assert [event["error"] for event in measured] == sorted(event["error"] for event in measured)
    assert all(event["seconds_left"] >= 0 for event in measured)
    ends = {event["stage"]: event for event in events if event["event"] == "end"}
    assert all(ends[stage]["done"] == ends[stage]["total"] for stage in stages)


def test_every_stage_of_a_run_with_a_map_ends_where_it_said(
    tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--uniform", 3, "--group-size", 32, "--samples", 4, "--length", 32, "--data", killing.text(tmp_path).data)
    events = said(capsys, "quantize", tiny_model("olmoe"), "-o", tmp_path / "out", "--no-eval", *flags)
    ends = {event["stage"]: (event["done"], event["total"]) for event in events if event["event"] == "end"}
    assert set(ends) == {"calibration data through the model", "quantize with gptq", "everything else"}
    assert all(done == total for done, total in ends.values())


def test_the_error_is_that_of_the_checkpoint(
    tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mopeq.pack.JUDGED_ROWS", None)
    folder, out = tiny_model("qwen3_moe"), tmp_path / "out"
    flags = ("--uniform", 3, "--group-size", 32, "--method", "rtn", "--no-eval")
    events = said(capsys, "quantize", folder, "-o", out, *flags)
    opened, lost, whole = open_model(folder), 0.0, 0.0
    for layer in opened.spec.layers:
        for group in GROUPS:
            weights = read_group(opened.source, layer, group)
            for expert, weight in zip(layer.experts, weights, strict=True):
                matrices = ("gate", "up") if group == "gate_up" else ("down",)
                found = torch.cat([dequantize(read_packed(out, expert.names[m])) for m in matrices])
                lost += float((found - weight).square().sum())
                whole += float(weight.square().sum())
    told = [event for event in events if "expert" in event]
    assert [event["expert"] for event in told] == [8] * len(opened.spec.layers)
    assert told[-1]["error"] == pytest.approx(lost / whole, rel=1e-5)


def test_events_of_analyze(tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--metrics", "frequency", "--samples", 4, "--length", 32, "--data", killing.text(tmp_path).data)
    *events, result = said(capsys, "analyze", tiny_model("olmoe"), "-o", tmp_path / "stats.json", *flags)
    assert result["event"] == "result"
    assert "frequency" in result["metrics"]
    assert {event["stage"] for event in events} == {"calibration data through the model"}


def test_time_left_counts_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("mopeq.progress.time.monotonic", lambda: now[0])
    stage = Stage("quantize", 4, began=100.0)
    assert stage.seconds_left is None
    stage.add({"layer": 0, "expert": 16, "experts": 64, "lost": 1.0, "whole": 8.0})
    now[0] = 110.0
    assert stage.seconds_left == 10 * 15  # a quarter of one layer of four
    stage.add({"lost": 1.0, "whole": 2.0})
    assert stage.error == 0.2


def test_stages_end_when_nobody_asks_for_more() -> None:
    seen: list[tuple[str, int, bool]] = []
    track = Stages(lambda stage, goes_on: seen.append((stage.name, stage.done, goes_on)))
    for item in track(range(3), "outer", 3):
        for _ in track("ab", "inner"):
            note(track, tokens=1)
            break
        if item == 1:
            break
    inner = [("inner", 0, True), ("inner", 0, True), ("inner", 0, False)]
    assert seen == [("outer", 0, True), *inner, ("outer", 1, True), *inner, ("outer", 1, False)]
    note(silent, tokens=1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with drawn() as track:
        for layer in track(range(2), "quantize", 2):
            note(track, layer=layer, expert=3, experts=8, tokens=512, lost=1.0, whole=4.0)
            time.sleep(0.15)  # bars are drawn ten times a second
    said = screen.getvalue()
    assert ("layer 1, expert 3 of 8, 512 tokens, error 0.25" in said) is terminal
    assert bool(said) is terminal
