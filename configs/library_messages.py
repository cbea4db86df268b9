"""Sends warnings and log messages to standard output where no run shows its log. Standard error has only errors."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

OURS = "tailtune"
"""Name of TailTune's own log."""


class _StandardOutputHandler(logging.Handler):
    """Prints each log record as one line on the current standard output. One of TailTune itself appears once."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.name != OURS:
            _print_line(f"library: {record.name}: {text}")
        elif text not in self._shown:
            self._shown.add(text)
            _print_line(text)


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
