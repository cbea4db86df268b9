"""TensorBoard's event file of a run, written in this thread.

torch's `SummaryWriter` writes in a thread of its own, where a full disk ends in a traceback.
"""

import itertools
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

log = logging.getLogger("tailtune")
_numbers = itertools.count()
"""Of the files of this process, which may begin two in a second."""


class Events:
    """One file of scalars; where the disk refuses that is said once, and the run goes on without.

    Args:
        folder: where TensorBoard looks for it.
        purge_step: steps from here on that an earlier file has are not to be shown.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self.path = folder / name
        self.writer: RecordWriter | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.writer = RecordWriter(self.path.open("wb"))
        except OSError as error:
            self._give_up(error)
        self._write(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._write(Event(session_log=SessionLog(status=SessionLog.START)), purge_step)

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_scalar(self, tag: str, value: float, step: int = 0) -> None:
        self._write(Event(summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])), step)

    def flush(self) -> None:
        if self.writer is not None:
            try:
                self.writer.flush()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        self.flush()
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def _write(self, event: Event, step: int = 0) -> None:
        if self.writer is None:
            return
        event.wall_time, event.step = time.time(), step
        try:
            self.writer.write(event.SerializeToString())
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if self.writer is not None:
            with suppress(OSError):  # of what was not written before
                self.writer.close()
            self.writer = None
        log.warning("warning: cannot write %s (%s): the run goes on without its curves", self.path, error.strerror)
