"""Ctrl-C and SIGTERM end a run at the next step, with its state saved."""

import signal
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """The run was asked to stop and did; `main.py` exits with 130."""


class Interrupt:
    """Within the block a signal sets `requested`; a second one acts as it would outside."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Interrupt":
        self._before: dict[int, Any] = {
            each: signal.signal(each, self._note) for each in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._before[number])
