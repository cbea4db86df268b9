"""Writes the log of a run to the console, and to `log.txt` as soon as the run has a folder."""

import codecs
import io
import logging
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from tailtune.configs.console_text import wrapped
from tailtune.configs.library_messages import WarnOnce

MOST_KEPT = 1000
"""Largest number of lines that are kept for a log file that may be opened later."""
ASCII_OF = str.maketrans({"─": "-", "±": "+/-", "×": "x", "·": "-", "…": "...", "–": "-", "→": "->", "∞": "inf"})
"""Character → its ASCII replacement, for a terminal whose encoding lacks the character."""
REPLACE = "tailtune.plain"
"""Name under which `_replace_signs` is registered as an error handler of Python's codecs."""
SHORT = "short"
"""Attribute of a log record: the text for a terminal, where a log file has a longer one."""
NO_FILE = "warning: cannot write %s (%s): the run goes on without it"
"""Message for a log file that cannot be written, with its path and the reason."""

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
    logging.raiseExceptions = False  # hides errors of other handlers, such as tqdm's handler for progress bars
    show_any_text()
    if sys.stdout is not None:
        log.addHandler(_Console(sys.stdout))
    if main:
        log.addHandler(_Kept())


@contextmanager
def console_restored() -> Iterator[None]:
    """After the block, the log and the standard streams are as they were before `start_console`.

    The Python API runs inside the process of another program, which has a log of its own.
    """
    handlers, propagates, level, raises = list(log.handlers), log.propagate, log.level, logging.raiseExceptions
    streams = {stream: stream.errors for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)}
    try:
        yield
    finally:
        for handler in list(log.handlers):
            if handler not in handlers:
                _drop(handler)
        log.handlers[:], log.propagate, logging.raiseExceptions = handlers, propagates, raises
        log.setLevel(level)
        for stream, errors in streams.items():
            stream.reconfigure(errors=errors)


@contextmanager
def warnings_later() -> Iterator[None]:
    """Within the block, no warning is shown. It is for checks before a run, which gives the same warnings."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def attach_file(path: Path) -> None:
    """Write log lines into a file too. The lines kept since the start, or since the previous file, are written first.

    Args:
        path: the file; lines are appended to an existing file.
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
    """Close the log file. From now on, lines are kept for the next log file."""
    for handler in _handlers(_File):
        _drop(handler)
        log.addHandler(_Kept())


def show_any_text() -> None:
    """Let the console replace characters that its encoding lacks by ASCII or by `?`, instead of raising an error."""
    codecs.register_error(REPLACE, _replace_signs)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=REPLACE)


def _replace_signs(error: UnicodeError) -> tuple[str, int]:
    """Error handler for codecs: returns the replacement text, and the position at which encoding continues."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(ASCII_OF)
    return text.encode("ascii", "replace").decode(), error.end


class _Console(logging.StreamHandler):
    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.setFormatter(_Short() if stream.isatty() else logging.Formatter("%(message)s"))
        self.addFilter(WarnOnce())

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a closed console, as in `main.py … | head`. The log file receives the remaining lines."""
        if not isinstance(sys.exc_info()[1], (OSError, ValueError)):
            raise


class _Short(logging.Formatter):
    """Takes the short text of a record, if it has one, and breaks other lines between words. Paths stay whole."""

    def format(self, record: logging.LogRecord) -> str:
        text = str(getattr(record, SHORT, None) or super().format(record))
        return "\n".join(part for line in text.split("\n") for part in wrapped(line, "  ", whole=True))


class _File(logging.FileHandler):
    def __init__(self, path: Path, encoding: str) -> None:
        super().__init__(path, encoding=encoding)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.addFilter(WarnOnce())

    def handleError(self, record: logging.LogRecord) -> None:
        """Warn once on the console that writing failed, for example on a full disk. Results do not need this file."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            raise
        _drop(self)
        log.warning(NO_FILE, self.baseFilename, error.strerror)


class _Kept(logging.Handler):
    """Keeps log records for a file that may be opened later."""

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
