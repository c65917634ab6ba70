"""Progress of long loops: library functions take a ``track``; the CLI gives one that draws, or one that writes events.

A track passes items through. One that also has ``note`` is told, with :func:`note`, what is worked on: ``layer``,
``expert`` (how many of ``experts`` are done), ``tokens``, and errors to be added up: ``lost``, of ``whole``, with what
they are in ``error_of``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar, runtime_checkable

__all__ = ["Clock", "Noting", "Track", "drawn", "events", "note", "resident", "silent"]

T = TypeVar("T")


class Track(Protocol):
    """Passes items through; ``description`` and ``total`` are for people."""

    def __call__(self, items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
        """The same items in the same order."""
        ...


@runtime_checkable
class Noting(Protocol):
    """A track that shows more than counts."""

    def note(self, **facts: Any) -> None:
        """What is worked on."""
        ...


def silent(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Shows nothing."""
    return items


def note(track: Track, **facts: Any) -> None:
    """Tell a track what is worked on, if it shows that."""
    if isinstance(track, Noting):
        track.note(**facts)


class Clock:
    """Seconds of each stage since the last call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        """Note the stage that ends now."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 2)
        self._last = now


@dataclass
class Stage:
    """A loop that is going on: ``done`` of ``total`` items, and what was noted of the one in turn."""

    name: str
    total: int | None
    done: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    error_of: str = "error"
    lost: float = 0.0
    whole: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def add(self, facts: dict[str, Any]) -> None:
        """Take what was noted."""
        self.error_of = facts.pop("error_of", self.error_of)
        self.lost += facts.pop("lost", 0.0)
        self.whole += facts.pop("whole", 0.0)
        self.facts |= facts

    @property
    def part(self) -> float:
        """Items done, the one in turn by its share of experts."""
        experts = self.facts.get("experts")
        return self.done + (self.facts.get("expert", 0) / experts if experts else 0)

    @property
    def error(self) -> float | None:
        """What was lost so far: a share, where it is known of what."""
        return None if not self.lost else self.lost / self.whole if self.whole else self.lost

    @property
    def seconds_left(self) -> float | None:
        """If the rest takes as long as what is done, item for item."""
        if self.total is None or not self.part:
            return None
        return (time.monotonic() - self.began) * (self.total - self.part) / self.part

    def words(self) -> str:
        """What was noted, for people."""
        f, said = self.facts, []
        if "layer" in f:
            said.append(f"layer {f['layer']}")
        if f.get("experts"):
            said.append(f"expert {f['expert']} of {f['experts']}")
        if "tokens" in f:
            said.append(f"{f['tokens']} tokens")
        if self.error is not None:
            said.append(f"{self.error_of} {self.error:.3g}")
        return ", ".join([*said, f"{resident() / 1e9:.2f} GB"])


class Stages:
    """A track that keeps what goes on and calls ``show`` whenever that changes, with False when a stage ends."""

    def __init__(self, show: Callable[[Stage, bool], None]) -> None:
        self.show = show
        self.running: list[Stage] = []

    def __call__(self, items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
        """The items; the stage ends with the last one, or when nobody asks for more."""
        stage = Stage(description, total)
        self.running.append(stage)
        try:
            self.show(stage, True)
            for item in items:
                yield item
                stage.done += 1
                stage.facts.clear()
                self.show(stage, True)
        finally:
            self.running.remove(stage)
            self.show(stage, False)

    def note(self, **facts: Any) -> None:
        """Of the stage that began last."""
        if self.running:
            self.running[-1].add(facts)
            self.show(self.running[-1], True)


@contextmanager
def events() -> Iterator[Track]:
    """A ``track`` that writes a JSON object to a line of standard output when something changes (docs/large.md)."""

    def write(stage: Stage, goes_on: bool) -> None:
        known = {
            "event": "progress" if goes_on else "end",
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "stage": stage.name,
            "done": stage.done,
            "total": stage.total,
            "seconds": round(time.monotonic() - stage.began, 3),
            "seconds_left": None if stage.seconds_left is None else round(stage.seconds_left, 3),
            "memory_bytes": resident(),
            **stage.facts,
        }
        if stage.error is not None:
            known |= {"error": stage.error, "error_of": stage.error_of}
        print(json.dumps(known, allow_nan=False), flush=True)

    yield Stages(write)


@contextmanager
def drawn() -> Iterator[Track]:
    """A ``track`` that draws bars on standard error; silent where that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield silent
        return
    left = TextColumn("{task.fields[left]}")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeElapsedColumn())
    with Progress(*columns, left, TextColumn("{task.fields[words]}"), console=console, transient=True) as bars:
        tasks: dict[int, TaskID] = {}

        def draw(stage: Stage, goes_on: bool) -> None:
            shown: dict[str, Any] = {
                "total": stage.total,
                "completed": stage.part,
                "count": f"{stage.done}/{'?' if stage.total is None else stage.total}",
                "left": "" if stage.seconds_left is None or not goes_on else f"{_clock(stage.seconds_left)} left",
                "words": stage.words() if goes_on else "",
            }
            if id(stage) not in tasks:
                tasks[id(stage)] = bars.add_task(stage.name, **shown)
            bars.update(tasks[id(stage)], **shown)
            if not goes_on:
                bars.stop_task(tasks.pop(id(stage)))

        yield Stages(draw)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def resident() -> int:
    """Bytes of this process in memory, mapped files counted; the most so far where the system tells no more."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
