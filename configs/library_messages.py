"""Keeps standard error for what the toolkit itself says there: the line of a refusal."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class _Lines(logging.Handler):
    """Messages of other people's code on standard output, as it is when they come; one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(f"{record.name}: {record.getMessage()}")


@contextmanager
def libraries_on_stdout() -> Iterator[None]:
    """Within the block warnings and log messages of libraries go to standard output, none is lost.

    Those with a handler of their own, such as transformers, are asked for errors only when they are imported
    (`TRANSFORMERS_VERBOSITY`).
    """
    handler = _Lines(logging.WARNING)
    root = logging.getLogger()
    root.addHandler(handler)
    with warnings.catch_warnings():

        def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
            _say(f"{category.__name__}: {message}")

        warnings.showwarning = show
        try:
            yield
        finally:
            root.removeHandler(handler)


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # `main.py … | head` has closed it
        print("library:", " ".join(text.split()), file=sys.stdout, flush=True)
