"""Writes event files for TensorBoard in the calling thread.

torch's `SummaryWriter` writes in a separate thread, in which a full disk causes a traceback.
"""

import io
import itertools
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams

log = logging.getLogger("tailtune")
_file_numbers = itertools.count()
"""Numbers for file names, because a process may create two files in the same second."""


class Events:
    """One file of scalars and pictures. If writing fails, one warning is logged, and the run goes on without the file.

    Args:
        folder: folder of the file.
        purge_step: TensorBoard hides this step and all later steps of earlier files; None: it hides nothing.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_file_numbers)}"
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
        """Add a point to the curve `tag`."""
        self._write(Event(summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])), step)

    def add_picture(self, tag: str, png: bytes, step: int = 0) -> None:
        """Add a picture, the content of a PNG file in RGB or RGBA."""
        with Image.open(io.BytesIO(png)) as opened:
            width, height, channels = *opened.size, len(opened.getbands())
        picture = Summary.Image(width=width, height=height, colorspace=channels, encoded_image_string=png)
        self._write(Event(summary=Summary(value=[Summary.Value(tag=tag, image=picture)])), step)

    def add_options(self, options: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Add a line to TensorBoard's tab of hyperparameters, as `SummaryWriter.add_hparams` does.

        Args:
            options: name → value.
            metrics: tags of the curves whose last values the line shows.
        """
        plain = (bool, int, float, str)
        shown = {name: value if isinstance(value, plain) else str(value) for name, value in options.items()}
        for summary in hparams(shown, dict.fromkeys(metrics, 0.0)):
            self._write(Event(summary=summary))

    def flush(self) -> None:
        """Write everything that was added so far."""
        if self.writer is not None:
            try:
                self.writer.flush()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Write everything and close the file."""
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
            with suppress(OSError):  # closing writes the rest, which fails again
                self.writer.close()
            self.writer = None
        log.warning("warning: cannot write %s (%s): the run goes on without its curves", self.path, error.strerror)
