"""Collects what the readers of lists and folders log, such as the files that they leave out."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.notes: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.notes.append(record.getMessage())


@contextmanager
def collected_notes() -> Iterator[list[str]]:
    """Within the block, collect the messages of TailTune's log instead of showing them.

    Yields:
        The messages so far.
    """
    log, collector = logging.getLogger("tailtune"), _Collector()
    level, propagate = log.level, log.propagate
    log.addHandler(collector)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield collector.notes
    finally:
        log.removeHandler(collector)
        log.setLevel(level)
        log.propagate = propagate
