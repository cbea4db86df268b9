"""Sends warnings and log messages of libraries to standard output, so that standard error has only our own errors."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class _StandardOutputHandler(logging.Handler):
    """Prints each log record as one line on what is standard output at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        _print_line(f"{record.name}: {record.getMessage()}")


@contextmanager
def libraries_on_stdout() -> Iterator[None]:
    """Within the block, print warnings and log messages of libraries on standard output, one line each.

    Libraries with a log handler of their own, such as transformers, are not caught here. `main.py` tells them to
    report errors only (`TRANSFORMERS_VERBOSITY`).
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
