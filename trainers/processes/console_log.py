"""What a run says: lines on the console, and in `log.txt` once there is a folder for it."""

import codecs
import io
import logging
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

MOST_KEPT = 1000
"""Lines that are kept for a file that may come later."""
PLAIN = str.maketrans({"─": "-", "±": "+/-", "×": "x", "·": "-", "…": "...", "–": "-", "→": "->", "∞": "inf"})
"""What a terminal shows that cannot show the sign."""
REPLACE = "tailtune.plain"

NO_FILE = "warning: cannot write %s (%s): the run goes on without it"

Kind = TypeVar("Kind", bound=logging.Handler)

log = logging.getLogger("tailtune")


def start_console(main: bool) -> None:
    """Lines to the console from here on; they are kept for `attach_file`, too.

    Args:
        main: whether this is the first process; others show errors only.
    """
    for handler in list(log.handlers):
        _drop(handler)
    log.propagate = False
    log.setLevel(logging.INFO if main else logging.ERROR)
    logging.raiseExceptions = False  # of handlers that are not ours: tqdm's, while there is a bar
    show_any_text()
    if sys.stdout is not None:
        log.addHandler(_Console(sys.stdout))
    if main:
        log.addHandler(_Kept())


def attach_file(path: Path) -> None:
    """Lines into a file, too: first those that were said since the start or since the last file."""
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
    """Close the file; what is said from here on is kept for the next one."""
    for handler in _handlers(_File):
        _drop(handler)
        log.addHandler(_Kept())


def show_any_text() -> None:
    """Let the console show `-` for a line, and `?` for any sign that its encoding does not have, not fail."""
    codecs.register_error(REPLACE, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=REPLACE)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "replace").decode(), error.end


class _Console(logging.StreamHandler):
    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.setFormatter(logging.Formatter("%(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """`main.py … | head` closes the console; that is no error of ours. The log has the rest."""
        if not isinstance(sys.exc_info()[1], (OSError, ValueError)):
            raise


class _File(logging.FileHandler):
    def __init__(self, path: Path, encoding: str) -> None:
        super().__init__(path, encoding=encoding)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk is said once, on the console. The results are written elsewhere, or say so themselves."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            raise
        _drop(self)
        log.warning(NO_FILE, self.baseFilename, error.strerror)


class _Kept(logging.Handler):
    """Keeps the lines for a file that may come."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=MOST_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def _handlers(kind: type[Kind]) -> list[Kind]:
    return [each for each in log.handlers if isinstance(each, kind)]


def _drop(handler: logging.Handler) -> None:
    log.removeHandler(handler)
    with suppress(OSError):  # of what was not written before
        handler.close()
