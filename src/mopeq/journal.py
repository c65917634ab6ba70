"""What a long run has finished: one JSON object a line, in a file that a person can read and a run can go on from.

The first line says what the run is (its ``job``), every further one what happened: a step done, with the facts and the
files that it left; a step to be done again, with the reason; a step that is not needed any more; a folder whose files
are not, though the steps that left them stay done; a run that went on. A line is written when its files are on the
disk, and before files go, so a process that is killed loses the step it was in and nothing else. The file is locked
while a run goes on; the lock ends with the process, however it ends.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Self

from mopeq.errors import OutputError

__all__ = ["JOURNAL", "Journal", "check_free", "difference", "digest", "read_journal"]

JOURNAL = "mopeq/journal.jsonl"
"""The journal's place in the folder that it speaks of."""

Entry = dict[str, Any]


class Journal:
    """The journal of ``folder``; its lines are those of every run that worked there, oldest first.

    Raises :class:`OutputError` where another process holds it, where it is of another job, and where a line other than
    the last one is damaged.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self.folder = folder
        self.job = json.loads(json.dumps(job))  # as it reads back
        self.steps: dict[str, Entry] = {}
        file = folder / JOURNAL
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file.open("a+b", buffering=0)
        try:
            self._lock(file)
            self._read(file)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the lock."""
        self._file.close()

    def done(self, step: str) -> Mapping[str, Any] | None:
        """The facts of a finished step whose files are all as it left them; None where it is to be done."""
        entry = self.steps.get(step)
        if entry is None:
            return None
        for name, wanted in entry["files"].items():
            found = digest(self.folder / name)
            if found != wanted:
                has = "is missing" if found is None else f"has {found['bytes']} bytes, sha256 {found['sha256'][:16]}"
                self._write({"event": "redo", "step": step, "why": f"{name} {has}; expected {wanted}"})
                del self.steps[step]
                return None
        facts: Mapping[str, Any] = entry["facts"]
        return facts

    def files(self, step: str) -> Mapping[str, Mapping[str, Any]]:
        """``{name: {"bytes": ..., "sha256": ...}}`` of what a finished step left."""
        files: Mapping[str, Mapping[str, Any]] = self.steps[step]["files"]
        return files

    def record(
        self, step: str, facts: Mapping[str, Any] | None = None, files: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        """A step is done: ``files`` are the :func:`digest` of each that it left, by name below the folder."""
        entry = {"event": "done", "step": step, "files": dict(files or {}), "facts": dict(facts or {})}
        self._write(entry)
        self.steps[step] = json.loads(json.dumps(entry))

    def drop(self, step: str) -> None:
        """What a step left is not needed any more: its files go."""
        if step in self.steps:
            self._write({"event": "drop", "step": step})
            for name in self.steps.pop(step)["files"]:
                (self.folder / name).unlink(missing_ok=True)

    def spend(self, below: str) -> None:
        """The files in the folder ``below`` may go; the steps that left them stay done, for the facts they have."""
        self._write({"event": "spend", "below": below})
        self._spent(below)

    def _spent(self, below: str) -> None:
        for step, entry in list(self.steps.items()):
            kept = {name: file for name, file in entry["files"].items() if Path(name).parts[0] != below}
            if kept != entry["files"] and not entry["facts"]:  # it left nothing else
                del self.steps[step]
            entry["files"] = kept

    def _lock(self, file: Path) -> None:
        _hold(self._file, self.folder)
        if not file.exists() or not os.path.samestat(file.stat(), os.fstat(self._file.fileno())):
            raise OutputError(f"another mopeq has just finished {self.folder}; look there, or give another folder")

    def _read(self, file: Path) -> None:
        self._file.seek(0)
        raw = self._file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):  # killed while it wrote a line
            os.truncate(file, len(whole))
        lines = [self._parsed(file, number, line) for number, line in enumerate(whole.splitlines(), 1)]
        if not lines:
            self._write({"event": "begin", "format": "mopeq-journal", "version": 1, "job": self.job})
            return
        self._check(file, lines[0])
        for line in lines[1:]:
            if line.get("event") == "done":
                self.steps[line["step"]] = line
            elif line.get("event") in ("redo", "drop"):
                self.steps.pop(line["step"], None)
            elif line.get("event") == "spend":
                self._spent(line["below"])
        self._write({"event": "resume"})

    def _parsed(self, file: Path, number: int, line: bytes) -> Entry:
        try:
            entry = json.loads(line)
            if entry["event"] == "done":
                entry["step"], entry["facts"].keys(), entry["files"].keys()
            if entry["event"] == "spend":
                entry["below"]
            return dict(entry)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise OutputError(f"line {number} of {file} is damaged; remove {self.folder} and begin again") from error

    def _check(self, file: Path, begin: Entry) -> None:
        if begin.get("format") != "mopeq-journal" or begin.get("version") != 1:
            raise OutputError(f"{file} is no journal of this mopeq; remove {self.folder} and begin again")
        if (found := difference(begin.get("job", {}), self.job)) is not None:
            raise OutputError(
                f"{self.folder} was begun with {found}; give the same command and model, or remove that folder"
            )

    def _write(self, entry: Entry) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry}
        raw = json.dumps(line).encode() + b"\n"
        if self._file.write(raw) != len(raw):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / JOURNAL))
        os.fsync(self._file.fileno())


def read_journal(folder: Path) -> tuple[Mapping[str, Any], dict[str, Mapping[str, Any]]] | None:
    """The job of a finished folder and the facts of its steps; None where there is no such journal."""
    try:
        begin, *lines = map(json.loads, (folder / JOURNAL).read_bytes().splitlines())
        return dict(begin["job"]), {line["step"]: line["facts"] for line in lines if line["event"] == "done"}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def check_free(folder: Path) -> None:
    """Raise :class:`OutputError` if a process holds the journal of a folder."""
    with (folder / JOURNAL).open("rb") as file:
        _hold(file, folder)


def _hold(file: BinaryIO, folder: Path) -> None:
    """Lock an open journal until it is closed."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputError(f"another mopeq is writing {folder}; wait for it, or give another folder") from error


def digest(file: Path) -> dict[str, Any] | None:
    """Bytes and sha256 of a file; None where there is none."""
    try:
        with file.open("rb") as stream:
            return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    except FileNotFoundError:
        return None


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first thing that one job has and another has not, in words, or None where they are the same."""
    for key in [*now, *before]:
        old, new = before.get(key), now.get(key)
        if old != new:
            if isinstance(old, dict) and isinstance(new, dict):
                return f"{key} {difference(old, new)}"
            return f"{key} {_short(old)}, and this command has {_short(new)}"
    return None


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
