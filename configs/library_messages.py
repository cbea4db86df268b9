"""Sends warnings and log messages of libraries to standard output. Standard error contains only TailTune's errors."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class _StandardOutputHandler(logging.Handler):
    """Prints each log record as one line on the current standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        _print_line(f"{record.name}: {record.getMessage()}")


@contextmanager
def libraries_on_stdout() -> Iterator[None]:
    """Within the block, print warnings and log messages of libraries on standard output, one line each.

    Messages of libraries that have their own log handler, such as transformers, are not redirected. `main.py` sets
    these libraries to report only errors (`TRANSFORMERS_VERBOSITY`).
    """
    handler = _StandardOutputHandler(logging.WARNING)
    root = logging.getLogger()
    root.addHandler(handler)
    with warnings.catch_warnings():

        def print_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
            _print_line(f"{category.__name__}: {message}")

        warnings.showwarning = print_warning
        try:
            yield
        finally:
            root.removeHandler(handler)


def _print_line(text: str) -> None:
    with suppress(OSError, ValueError):  # standard output is closed, as in `main.py … | head`
        print("library:", " ".join(text.split()), file=sys.stdout, flush=True)
