"""Decodes many images in parallel threads, with a bounded number of images and results in memory."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from tailtune.datasets.images.image_files import DecodeError, load_rgb

FILES_PER_TASK = 32
"""Number of images that a thread decodes before it takes the next ones."""


class Decoded(NamedTuple):
    """What became of one image."""

    position: int
    """Position of the image in the sequence."""
    result: object
    """What the function returned; None if the image cannot be decoded."""
    problem: str
    """Why the image cannot be decoded; empty if it can."""


def decode_many(
    items: Sequence[Any],
    use: Callable[[Image.Image], object] | None = None,
    load: Callable[[Any], Image.Image] = load_rgb,
    description: str = "decoding images",
) -> Iterator[Decoded]:
    """Decode images, and call a function with each image. Pillow's decoders let other threads run.

    A progress bar appears on a terminal if this takes longer than two seconds.

    Args:
        items: N files, or what else `load` takes. FIFOs, devices, broken files and too many pixels are problems.
        use: gets each image in mode RGB; None if only the problems are of interest.
        load: gives the image of an item in mode RGB, or raises DecodeError.
        description: text of the progress bar.

    Yields:
        What became of each item, in their order.
    """
    threads = os.cpu_count() or 1

    def decode(start: int) -> list[Decoded]:
        stop = min(start + step, len(items))
        return [_decode(position, items[position], load, use) for position in range(start, stop)]

    step = max(1, min(FILES_PER_TASK, len(items) // (4 * threads)))
    waiting: deque[Future[list[Decoded]]] = deque()
    with (
        tqdm(total=len(items), desc=description, delay=2, leave=False, unit="image", disable=None) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        try:
            for start in range(0, len(items), step):
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


def _decode(
    position: int, item: Any, load: Callable[[Any], Image.Image], use: Callable[[Image.Image], object] | None
) -> Decoded:
    try:
        image = load(item)
    except DecodeError as error:
        return Decoded(position, None, str(error))
    return Decoded(position, use(image) if use else None, "")
