"""The folder beside what is being made: it is there until that is finished, and can be gone on with."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mopeq.errors import MopeqError, OutputError
from mopeq.journal import JOURNAL, Journal, check_free

__all__ = ["Unfinished"]


class Unfinished:
    """``partial``, which is ``out`` with ``.partial`` behind its name.

    Leaving the block by an error or Ctrl-C removes everything. With a ``job``, which says what is made of what and how,
    the folder has a :class:`~mopeq.journal.Journal`, and what that has noted stays if the process is killed,
    interrupted, or the disk fills up; the same job with ``resume`` goes on from there. Errors that the same job would
    meet again remove everything all the same.

    Raises :class:`OutputError` where ``needed_bytes`` are not free, where the disk refuses or fills up, where another
    process is writing, and where another job, or this one without ``resume``, left something unfinished.
    """

    def __init__(
        self, out: str | Path, *, needed_bytes: int = 0, job: Mapping[str, Any] | None = None, resume: bool = False
    ) -> None:
        self.out = Path(os.path.abspath(Path(out).expanduser()))
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.needed_bytes = needed_bytes
        self.job, self.resume = job, resume
        self.journal: Journal | None = None

    def __enter__(self) -> Self:
        with self.disk():
            if self.partial.exists():
                self._check_partial()
            self.out.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.out.parent).free
            there = sum(file.stat().st_size for file in self.partial.rglob("*"))
            if free + there < self.needed_bytes:
                raise OutputError(
                    f"{self.out.parent} has {free:,} bytes free and {self.out.name} needs {self.needed_bytes:,}; "
                    f"free space or give another folder"
                )
            fresh = True
            try:
                self.partial.mkdir()
            except FileExistsError as error:
                fresh = False
                if not self.resume:  # it is there since a moment ago
                    raise OutputError(f"another mopeq is writing {self.partial}; wait for it") from error
            try:
                if self.job is not None:
                    self.journal = Journal(self.partial, self.job)
            except KeyboardInterrupt as error:  # the disk may take its time
                self._leave(not fresh, error)
                raise
        return self

    def _check_partial(self) -> None:
        """Raise :class:`OutputError` unless what is there may be gone on with."""
        if self.job is None or not (self.resume or (self.partial / JOURNAL).is_file()):
            raise OutputError(
                f"{self.partial} exists: another mopeq is writing it, or one was killed; wait for it or remove it"
            )
        if not self.resume:
            check_free(self.partial)
            raise OutputError(
                f"{self.partial} holds an unfinished run; the same command with --resume goes on with it; "
                f"or remove that folder"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(self.journal is not None and bool(self.journal.steps) and _passing(error), error)

    def _leave(self, kept: bool, error: BaseException | None) -> None:
        if not kept:
            shutil.rmtree(self.partial, ignore_errors=True)
        if self.journal is not None:
            self.journal.close()
        if kept and isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(
                f"interrupted; {self.partial} keeps what is finished, and the same command with --resume goes on"
            ) from error

    def remove(self) -> None:
        """What is made is finished: nothing is needed any more."""
        shutil.rmtree(self.partial)

    @contextmanager
    def disk(self) -> Iterator[None]:
        """What the disk refuses inside becomes an :class:`OutputError`."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(self.out.parent).free
                raise OutputError(
                    f"the disk is full: {self.out} needs {self.needed_bytes:,} bytes in all and {free:,} are free; "
                    f"free space{' and go on with --resume' if self.journal else ''}, or give another folder"
                ) from error
            raise OutputError(f"cannot write {self.out}: {error}; give a folder that can be written to") from error


def _passing(error: BaseException | None) -> bool:
    """Whether the same job may get further another time: not after an error that lies in what it was given."""
    return not isinstance(error, MopeqError) or isinstance(error, OutputError)
