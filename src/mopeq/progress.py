"""Progress of long loops: library functions take a ``track``; the CLI gives one that draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

__all__ = ["Track", "drawn", "silent"]

T = TypeVar("T")


class Track(Protocol):
    """Passes items through; ``description`` and ``total`` are for people."""

    def __call__(self, items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
        """The same items in the same order."""
        ...


def silent(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Shows nothing."""
    return items


@contextmanager
def drawn() -> Iterator[Track]:
    """A ``track`` that draws bars on standard error; silent where that is not a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:

        def track(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
            return bars.track(items, total=total, description=description)

        yield track
