"""`loading_shown` tells a user that a command is alive while it imports torch and other large libraries."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LATE = 1.0
"""Seconds after which the line is printed."""
_shown = threading.Event()


@contextmanager
def loading_shown() -> Iterator[None]:
    """Print `loading …` on standard error if the block takes longer than `LATE`, once in the first process of a launch.

    The line is for people: it is left out if standard error is no terminal, so that programs find an error in the only
    line there.
    """
    if sys.stderr is None or not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0" or _shown.is_set():
        yield
        return
    timer = threading.Timer(LATE, _show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _show() -> None:
    _shown.set()
    print("loading …", file=sys.stderr, flush=True)
