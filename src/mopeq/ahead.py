"""Reading ahead: the bytes of what is wanted next are brought into the page cache while this process computes."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from mopeq.source import Source

__all__ = ["Ahead"]

CHUNK = 1 << 20


class Ahead:
    """A thread that reads tensors' bytes and throws them away: the system keeps them, this process holds one MiB.

    Mapping them instead would count as resident memory of this process. One set of tensors is read at a time; a new one
    ends the one before.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.read = 0

    def begin(self, keys: Sequence[str]) -> None:
        """Begin to read these tensors, and return."""
        self.end()
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, args=(list(keys),), name="mopeq-read-ahead", daemon=True)
        self._thread.start()

    def end(self, wait: bool = False) -> None:
        """Stop reading; ``wait`` reads to the end first."""
        if self._thread is not None:
            if not wait:
                self._stop.set()
            self._thread.join()
            self._thread = None

    def _run(self, keys: Sequence[str]) -> None:
        buffer = memoryview(bytearray(CHUNK))
        spans = sorted((self.source.files[key], *self.source.spans[key]) for key in keys)
        for name in dict.fromkeys(name for name, _, _ in spans):
            with (self.source.path / name).open("rb", buffering=0) as file:
                for begin, end in [(begin, end) for other, begin, end in spans if other == name]:
                    file.seek(begin)
                    while begin < end and not self._stop.is_set():
                        got = file.readinto(buffer[: end - begin])
                        if not got:
                            return  # shorter than when it was opened: whoever needs it will say so
                        begin += got
                        self.read += got
