"""What the user reads: lines on the console, and the same in the run's `log.txt`."""

import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

log = logging.getLogger("tailtune")


def start_console(main: bool) -> None:
    """Lines to the console; a process that is not the first shows errors only. They are kept for `attach_file`."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.propagate = False
    log.setLevel(logging.INFO if main else logging.ERROR)
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(console)
    log.addHandler(MemoryHandler(10**6, logging.CRITICAL + 1, flushOnClose=False))
    logging.raiseExceptions = False  # `main.py … | head` closes the console; that is no error of ours


def attach_file(path: Path) -> None:
    """Lines also to a file, those that have been said before first."""
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for handler in list(log.handlers):
        if isinstance(handler, MemoryHandler):
            handler.setTarget(file)
            handler.flush()
            log.removeHandler(handler)
    log.addHandler(file)


def detach_file() -> None:
    """No more lines to the file."""
    for handler in list(log.handlers):
        if isinstance(handler, logging.FileHandler):
            log.removeHandler(handler)
            handler.close()
