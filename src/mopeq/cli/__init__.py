"""The command line: flags in, one public function each, a short table out.

Exit codes: 0 done; 1 the model or checkpoint is not what it should be; 2 the command cannot be carried out as given;
130 interrupted, by Ctrl-C or by a request to terminate. ``--json`` prints one JSON object instead of a table; long
commands print one a line, progress and then the result (docs/large.md).
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from mopeq.cli.flags import parser
from mopeq.cli.recipes import parse
from mopeq.errors import MopeqError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(parser(), given)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars too
    options.command_line = shlex.join(["mopeq", *given])
    try:
        with _terminable():
            options.run(options)
        return 0
    except MopeqError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted; nothing unfinished was left behind", 130)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _fail(f"the disk is full ({error.filename or 'while writing'}); free space and run again", 2)
        return _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 2)


@contextmanager
def _terminable() -> Iterator[None]:
    """A request to terminate (SIGTERM) cleans up as Ctrl-C does; signals can be handled in the main thread alone."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(sentence: str, code: int) -> int:
    print(f"mopeq: {sentence}", file=sys.stderr)
    return code
