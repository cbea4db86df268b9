"""Decodes many image files in parallel threads, with a bounded number of images and results in memory."""

import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image
from tqdm import tqdm

from tailtune.datasets.images.bounded_reads import MAX_PIXELS
from tailtune.datasets.images.image_files import DecodeError, decode_errors, open_file, open_image, upright_rgb

FILES_PER_TASK = 32
"""Number of images that a thread decodes before it takes the next ones."""
LARGE_FILE = 1 << 26
"""Only one file of more bytes is read at a time, because a damaged header can take 512 MB in memory."""
LARGE_IMAGE = 1 << 24
"""Number of pixels from which on the memory of an image is given back at once."""


class Decoded(NamedTuple):
    """What became of one file."""

    position: int
    """Position of the file in the sequence."""
    result: object
    """What the function returned; None if the file cannot be decoded."""
    problem: str
    """Why the file cannot be decoded; empty if it can."""


def decode_many(
    paths: Sequence[Path], use: Callable[[Image.Image], object] | None = None, description: str = "decoding images"
) -> Iterator[Decoded]:
    """Decode image files, and call a function with each image. Pillow's decoders let other threads run.

    The images that are decoded at the same time have at most `MAX_PIXELS` pixels together. So the memory that this
    takes does not grow with the number of threads.

    A progress bar appears on a terminal if this takes longer than two seconds.

    Args:
        paths: N files. FIFOs, devices, broken files and files with too many pixels are problems.
        use: gets each image in mode RGB; None if only the problems are of interest.
        description: text of the progress bar.

    Yields:
        What became of each file, in the order of the files.
    """
    threads, room = os.cpu_count() or 1, _Room()

    def decode(start: int) -> list[Decoded]:
        positions = range(start, min(start + step, len(paths)))
        return [_decode(position, paths[position], use, room) for position in positions]

    step = max(1, min(FILES_PER_TASK, len(paths) // (4 * threads)))
    waiting: deque[Future[list[Decoded]]] = deque()
    with (
        tqdm(total=len(paths), desc=description, delay=2, leave=False, unit="image", disable=None) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        try:
            for start in range(0, len(paths), step):
                waiting.append(pool.submit(decode, start))
                if len(waiting) > 2 * threads:
                    yield from _finished(waiting.popleft(), bar)
            while waiting:
                yield from _finished(waiting.popleft(), bar)
        finally:  # after Ctrl-C, what has not begun must not be waited for
            for task in waiting:
                task.cancel()


def _finished(task: "Future[list[Decoded]]", bar: "tqdm[None]") -> list[Decoded]:
    done = task.result()
    bar.update(len(done))
    return done


def _decode(position: int, path: Path, use: Callable[[Image.Image], object] | None, room: "_Room") -> Decoded:
    try:
        with open_file(path) as (file, size), room.large_file if size > LARGE_FILE else nullcontext():
            return Decoded(position, *_decoded(file, size, use, room))
    except DecodeError as error:
        return Decoded(position, None, str(error))


def _decoded(
    file: BinaryIO, size: int, use: Callable[[Image.Image], object] | None, room: "_Room"
) -> tuple[object, str]:
    """The result and the problem of a file. What it has taken in memory is freed before another thread may use it."""
    try:
        image = open_image(file, size)
        pixels = image.width * image.height
        with room.taken(pixels):
            try:
                return _used(image, use), ""
            finally:
                image.close()
                if pixels > LARGE_IMAGE:
                    _give_back_memory()
    except DecodeError as error:
        return None, str(error)
    finally:
        if size > LARGE_FILE:
            _give_back_memory()


def _used(image: Image.Image, use: Callable[[Image.Image], object] | None) -> object:
    with decode_errors():
        rgb = upright_rgb(image)
    return use(rgb) if use else None


def _give_back_memory() -> None:
    """Give freed memory back to the system: glibc keeps blocks of up to 32 MiB for the thread that has freed them."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


class _Room:
    """Lets threads wait until there is room in memory for what they want to read."""

    def __init__(self) -> None:
        self.large_file = threading.Lock()
        self._pixels = MAX_PIXELS
        self._freed = threading.Condition()
        self._next = threading.Lock()
        """Held by the thread that waits longest, so that small images do not overtake a large one for ever."""

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Within the block, room for so many pixels is taken; it is waited for, if necessary."""
        with self._next, self._freed:
            self._freed.wait_for(lambda: self._pixels >= pixels)
            self._pixels -= pixels
        try:
            yield
        finally:
            with self._freed:
                self._pixels += pixels
                self._freed.notify_all()
