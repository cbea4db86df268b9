"""Sends warnings and log messages to standard output where no run shows its log. Standard error has only errors."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

OURS = "tailtune"
"""Name of TailTune's own log."""


class WarnOnce(logging.Filter):
    """Lets each of TailTune's warnings through once. A command reads its image lists several times."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name != OURS or record.levelno < logging.WARNING:
            return True
        text, before = record.getMessage(), len(self._shown)
        self._shown.add(text)
        return len(self._shown) > before


class _StandardOutputHandler(logging.Handler):
    """Prints each log record as one line on the current standard output."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.addFilter(WarnOnce())

    def emit(self, record: logging.LogRecord) -> None:
        source = "" if record.name == OURS else f"library: {record.name}: "
        _print_line(f"{source}{record.getMessage()}")


@contextmanager
def libraries_on_stdout() -> Iterator[None]:
    """Within the block, print warnings and log messages of libraries on standard output, one line each. They begin with
    `library:`. TailTune's own warnings are printed as they are, until `start_console` shows its whole log.

    Messages of libraries that have their own log handler, such as transformers, are not redirected. `main.py` sets
    these libraries to report only errors (`TRANSFORMERS_VERBOSITY`).
    """
    handler = _StandardOutputHandler(logging.WARNING)
    root = logging.getLogger()
    root.addHandler(handler)
    with warnings.catch_warnings():

        def print_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
            _print_line(f"library: {category.__name__}: {message}")

        warnings.showwarning = print_warning
        try:
            yield
        finally:
            root.removeHandler(handler)


def _print_line(text: str) -> None:
    with suppress(OSError, ValueError):  # standard output is closed, as in `main.py … | head`
        print(" ".join(text.split()), file=sys.stdout, flush=True)
