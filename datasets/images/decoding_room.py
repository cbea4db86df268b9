"""Bounds the memory of the images that threads of one process decode at the same time."""

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tailtune.datasets.images.bounded_reads import MAX_PIXELS

LARGE_FILE = 1 << 26
"""Only one file of more bytes is read at a time, because a damaged header can take 512 MB in memory."""
LARGE_IMAGE = 1 << 24
"""Number of pixels from which on the memory of an image is given back to the system at once."""


class DecodingRoom:
    """Lets threads wait until there is room for the image that they want to decode: `MAX_PIXELS` for all together."""

    def __init__(self) -> None:
        self._free = MAX_PIXELS
        self._freed = threading.Condition()
        self._next = threading.Lock()
        """Held by the thread that waits longest, so that small images do not overtake a large one for ever."""
        self._large_file = threading.Lock()

    @contextmanager
    def one_image(self) -> Iterator[None]:
        """Within the block, the image that this thread opens takes room. At its end, the image must not be used."""
        share = _Share(self)
        _thread.share = share
        try:
            yield
        finally:
            _thread.share = None
            share.give_back()

    def take(self, pixels: int) -> None:
        """Take room, and wait for it if necessary."""
        with self._next, self._freed:
            self._freed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels

    def free(self, pixels: int) -> None:
        """Give room back."""
        with self._freed:
            self._free += pixels
            self._freed.notify_all()

    def take_large_file(self) -> None:
        """Wait until no other large file is read."""
        self._large_file.acquire()

    def free_large_file(self) -> None:
        """Let another thread read a large file."""
        self._large_file.release()


class _Share:
    """What one thread has taken of a room."""

    def __init__(self, room: DecodingRoom) -> None:
        self.room, self.pixels, self.large_file = room, 0, False

    def give_back(self) -> None:
        if self.large_file or self.pixels > LARGE_IMAGE:
            _give_back_memory()
        if self.pixels:
            self.room.free(self.pixels)
        if self.large_file:
            self.room.free_large_file()
        self.pixels, self.large_file = 0, False


class _Thread(threading.local):
    share: _Share | None = None


_thread = _Thread()


def take_room_for_file(size: int) -> None:
    """Before a file is opened as an image in `DecodingRoom.one_image`, wait until there is room; elsewhere do nothing.

    Args:
        size: its size in bytes.
    """
    if share := _thread.share:
        share.give_back()  # of an image that was opened before; who holds room must not wait for more
        if size > LARGE_FILE:
            share.room.take_large_file()
            share.large_file = True


def take_room_for_pixels(pixels: int) -> None:
    """As `take_room_for_file`, before an image is decoded.

    Args:
        pixels: width times height, at most `MAX_PIXELS`.
    """
    if share := _thread.share:
        share.room.take(pixels)
        share.pixels = pixels


def _give_back_memory() -> None:
    """Give freed memory back to the system: glibc keeps blocks of up to 32 MiB for the thread that has freed them."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
