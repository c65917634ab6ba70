"""The journal: what is done stays done, whatever the process met."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mopeq.errors import OutputError
from mopeq.journal import JOURNAL, Journal, digest, read_journal

JOB = {"budget": "3bpw", "options": ["2g64", "3g64"], "dtype": None}


def written(folder: Path, name: str, content: bytes) -> dict[str, dict[str, object]]:
    (folder / name).write_bytes(content)
    found = digest(folder / name)
    assert found is not None
    return {name: found}


def begun(folder: Path) -> None:
    with Journal(folder, JOB) as journal:
        journal.record("one", {"values": [0.1, 1e-30]}, written(folder, "a", b"first"))
        journal.record("two", files=written(folder, "b", b"second"))


def test_a_person_can_read_it(tmp_path: Path) -> None:
    begun(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert [(line["event"], line.get("step")) for line in lines] == [("begin", None), ("done", "one"), ("done", "two")]
    assert lines[0]["job"] == JOB
    assert lines[1]["files"] == {"a": {"bytes": 5, "sha256": lines[1]["files"]["a"]["sha256"]}}
    assert all(line["time"].startswith("20") for line in lines)
    assert read_journal(tmp_path) == (JOB, {"one": {"values": [0.1, 1e-30]}, "two": {}})


def test_steps_stay_done_until_their_files_change(tmp_path: Path) -> None:
    begun(tmp_path)
    with Journal(tmp_path, JOB) as journal:
        assert journal.done("one") == {"values": [0.1, 1e-30]}
        assert journal.done("three") is None
        (tmp_path / "a").write_bytes(b"tampered")
        (tmp_path / "b").unlink()
        assert journal.done("one") is None
        assert journal.done("two") is None
    lines = (tmp_path / JOURNAL).read_text().splitlines()
    assert ["a has 8 bytes" in lines[-2], "b is missing" in lines[-1]] == [True, True]
    with Journal(tmp_path, JOB) as journal:
        assert journal.steps == {}
        journal.record("two", files=written(tmp_path, "b", b"again"))
        journal.drop("two")
        assert journal.done("two") is None
    assert not (tmp_path / "b").exists()


def test_files_that_are_spent_leave_the_facts(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with Journal(tmp_path, JOB) as journal:
        journal.record("measure", {"cost": 1.5}, written(tmp_path, "scratch/a", b"codes"))
        journal.record("hidden", files=written(tmp_path, "scratch/b", b"activations"))
        journal.record("pack", {"fallbacks": []}, written(tmp_path, "shard", b"packed"))
        journal.spend("scratch")
        before = list(journal.steps)
    (tmp_path / "scratch/a").unlink()
    with Journal(tmp_path, JOB) as journal:
        assert list(journal.steps) == before == ["measure", "pack"]
        assert journal.done("measure") == {"cost": 1.5}
        assert journal.done("hidden") is None
        assert list(journal.files("pack")) == ["shard"]


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_line_that_was_cut_off_is_forgotten(tmp_path: Path, cut: int) -> None:
    begun(tmp_path)
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(tmp_path, JOB) as journal:
        assert list(journal.steps) == ["one"]
        journal.record("three")
    with Journal(tmp_path, JOB) as journal:
        assert list(journal.steps) == ["one", "three"]


def test_an_empty_one_begins(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b'{"event": "beg')
    with Journal(tmp_path, {"another": "job"}) as journal:
        assert journal.steps == {}


def test_damage_another_job_and_another_process_are_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(OutputError, match=r'was begun with budget "3bpw", and this command has "2bpw"; give the same'):
        Journal(tmp_path, {**JOB, "budget": "2bpw"})
    with pytest.raises(OutputError, match=r"was begun with options .*, and this command has null"):
        Journal(tmp_path, {"budget": "3bpw", "dtype": None})
    with Journal(tmp_path, JOB), pytest.raises(OutputError, match="another mopeq is writing"):
        Journal(tmp_path, JOB)
    path = tmp_path / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (b"{}\n", b'{"event": "done", "step": "x"}\n', b"[1]\n", b"\xff\n"):
        path.write_bytes(b"".join([lines[0], damaged, *lines[2:]]))
        with pytest.raises(OutputError, match=r"line 2 of .*journal.jsonl is damaged; remove"):
            Journal(tmp_path, JOB)
    path.write_bytes(b'{"event": "begin", "format": "something else"}\n')
    with pytest.raises(OutputError, match="is no journal of this mopeq"):
        Journal(tmp_path, JOB)
    assert read_journal(tmp_path) is None
