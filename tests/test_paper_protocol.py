"""The script of the paper's comparison, on the bundled model."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import paper_protocol
from mopeq.cli.flags import parser
from mopeq.data.samples import bundled_images, bundled_vlm


def test_the_plan_is_commands_that_mopeq_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert paper_protocol.main(["--tables", "tables", "-o", "out", "--plan", "--device", "cuda"]) == 0
    lines = [line.split()[1:] for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4 * (1 + 10 + 2 * 10)
    for words in lines:
        parser().parse_args([word.strip("'") for word in words])
    assert {words[1] for words in lines if words[0] == "quantize"} == set(paper_protocol.MODELS)


def test_a_run_and_going_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = str(bundled_images("heldout.tsv").parent)
    given = ["--models", str(bundled_vlm()), "--tables", tables, "--benchmarks", "heldout", "--samples", "2",
             "--group-size", "32", "--limit", "7", "-o", str(tmp_path / "out")]  # fmt: skip
    assert paper_protocol.main([*given, "--maps", "hessian-model"]) == 0
    done = capsys.readouterr().out.count("mopeq quantize")
    assert paper_protocol.main([*given, "--maps", "hessian-model", "knapsack"]) == 0
    assert (done, capsys.readouterr().out.count("mopeq quantize")) == (1, 1)
    with (tmp_path / "out" / "summary.tsv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["metric"] == "exact answers"]
    found = {row["map"]: row for row in rows}
    assert set(found) == {"hessian-model", "knapsack"}
    assert 0.98 * int(found["hessian-model"]["bytes"]) < int(found["knapsack"]["bytes"])
    assert int(found["knapsack"]["bytes"]) <= int(found["hessian-model"]["bytes"])
    assert all(row["questions"] == "7" and float(row["original"]) > 0.5 for row in rows)


def test_missing_tables_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        paper_protocol.main(["--tables", str(tmp_path), "-o", str(tmp_path / "out"), "--benchmarks", "MME", "X"])
    assert "has no MME, X (.tsv)" in capsys.readouterr().err
