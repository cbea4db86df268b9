"""Decodes many image files in parallel threads, with a bounded number of images and results in memory."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from tailtune.datasets.images.decoding_room import DecodingRoom
from tailtune.datasets.images.image_files import DecodeError, load_rgb

FILES_PER_TASK = 32
"""Number of images that a thread decodes before it takes the next ones."""


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

    The images that are decoded at the same time have a bounded number of pixels together (`DecodingRoom`). So the
    memory that this takes does not grow with the number of threads.

    A progress bar appears on a terminal if this takes longer than two seconds.

    Args:
        paths: N files. FIFOs, devices, broken files and files with too many pixels are problems.
        use: gets each image in mode RGB, and must not keep it; None if only the problems are of interest.
        description: text of the progress bar.

    Yields:
        What became of each file, in the order of the files.
    """
    threads, room = os.cpu_count() or 1, DecodingRoom()

    def decode(start: int) -> list[Decoded]:
        done = []
        for position in range(start, min(start + step, len(paths))):
            with room.one_image():
                done.append(_decode(position, paths[position], use))
        return done

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


def _decode(position: int, path: Path, use: Callable[[Image.Image], object] | None) -> Decoded:
    try:
        image = load_rgb(path)
    except DecodeError as error:
        return Decoded(position, None, str(error))
    return Decoded(position, use(image) if use else None, "")
