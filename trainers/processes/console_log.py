"""The log of a run: lines on the console, and in `log.txt` as soon as the run has a folder."""

import codecs
import io
import logging
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

MOST_KEPT = 1000
"""How many lines are kept for a file that may be opened later."""
ASCII_OF = str.maketrans({"─": "-", "±": "+/-", "×": "x", "·": "-", "…": "...", "–": "-", "→": "->", "∞": "inf"})
"""Sign → what a terminal shows if its encoding does not have the sign."""
REPLACE = "tailtune.plain"
"""Name under which Python knows `_replace_signs`."""
NO_FILE = "warning: cannot write %s (%s): the run goes on without it"

Kind = TypeVar("Kind", bound=logging.Handler)

log = logging.getLogger("tailtune")


def start_console(main: bool) -> None:
    """Show log lines on the console from now on, and keep them for `attach_file`.

    Args:
        main: whether this is the main process; other processes show errors only.
    """
    for handler in list(log.handlers):
        _drop(handler)
    log.propagate = False
    log.setLevel(logging.INFO if main else logging.ERROR)
    logging.raiseExceptions = False  # errors of other handlers, such as tqdm's while there is a bar
    show_any_text()
    if sys.stdout is not None:
        log.addHandler(_Console(sys.stdout))
    if main:
        log.addHandler(_Kept())


def attach_file(path: Path) -> None:
    """Write log lines into a file as well, first those that were kept since the start or since the last file.

    Args:
        path: the file; a file that exists already is continued.
    """
    kept = [record for handler in _handlers(_Kept) for record in handler.records]
    detach_file()
    for handler in _handlers(_Kept):
        _drop(handler)
    try:
        file = _File(path, encoding="utf-8")
    except OSError as error:
        log.warning(NO_FILE, path, error.strerror)
        return
    log.addHandler(file)
    for record in kept:
        file.handle(record)


def detach_file() -> None:
    """Close the file. Lines from now on are kept for the next one."""
    for handler in _handlers(_File):
        _drop(handler)
        log.addHandler(_Kept())


def show_any_text() -> None:
    """Let the console replace signs that its encoding does not have, by ASCII or by `?`, instead of failing."""
    codecs.register_error(REPLACE, _replace_signs)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=REPLACE)


def _replace_signs(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(ASCII_OF)
    return text.encode("ascii", "replace").decode(), error.end


class _Console(logging.StreamHandler):
    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.setFormatter(logging.Formatter("%(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a console that was closed, as by `main.py … | head`. The log file has the rest."""
        if not isinstance(sys.exc_info()[1], (OSError, ValueError)):
            raise


class _File(logging.FileHandler):
    def __init__(self, path: Path, encoding: str) -> None:
        super().__init__(path, encoding=encoding)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """Warn once, on the console, that the disk is full. Results do not depend on this file."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            raise
        _drop(self)
        log.warning(NO_FILE, self.baseFilename, error.strerror)


class _Kept(logging.Handler):
    """Keeps the lines for a file that may be opened later."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=MOST_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def _handlers(kind: type[Kind]) -> list[Kind]:
    return [handler for handler in log.handlers if isinstance(handler, kind)]


def _drop(handler: logging.Handler) -> None:
    log.removeHandler(handler)
    with suppress(OSError):  # closing writes the rest, which may fail again
        handler.close()
