"""A quick check of many image files, without decoding them."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tailtune.datasets.images.image_files import HEADER_BYTES, accept_functions, format_of, unidentified
from tailtune.datasets.images.regular_files import EMPTY, NotARegularFile, file_size, open_regular

THREADS = 16
"""Threads that check files. They may be more than the processors, because on a network file system they mostly wait."""
FILES_PER_TASK = 256
"""Number of files that a thread checks before it takes the next ones."""


@dataclass(frozen=True)
class Inspection:
    """The result of checking N files."""

    sizes: np.ndarray
    """Size of each file in bytes, int64 [N]; −1 where there is no regular file."""
    problems: dict[int, str]
    """Position of each file that cannot be an image → the reason, in ascending order."""


def inspect_files(paths: Sequence[Path], read_headers: bool = True) -> Inspection:
    """Check files without decoding them: does each exist, is it a regular file, do its first bytes name a format?

    A progress bar appears on a terminal if this takes longer than two seconds.

    Args:
        paths: N files.
        read_headers: open each file and read its first bytes. If false, only its kind and size are checked.

    Returns:
        Sizes and problems.
    """
    sizes = np.full(len(paths), -1, dtype=np.int64)
    problems: dict[int, str] = {}

    def inspect_chunk(start: int) -> int:
        chunk = paths[start : start + FILES_PER_TASK]
        for index, path in enumerate(chunk, start):
            sizes[index], problem = _check_header(path) if read_headers else _check_size(path)
            if problem:
                problems[index] = problem
        return len(chunk)

    starts = range(0, len(paths), FILES_PER_TASK)
    accept_functions()  # lets Pillow import its formats before several threads would do so at the same time
    with (
        tqdm(total=len(paths), desc="checking the images", delay=2, leave=False, disable=None) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for count in pool.map(inspect_chunk, starts):
            bar.update(count)
    return Inspection(sizes, dict(sorted(problems.items())))


def _check_header(path: Path) -> tuple[int, str]:
    """Size and problem (empty if there is none) of a file, judged by its first bytes."""
    try:
        descriptor, status = open_regular(path)
    except NotARegularFile as reason:
        return -1, str(reason)
    try:
        header = os.read(descriptor, HEADER_BYTES)
    except OSError as error:
        return status.st_size, str(error.strerror)
    finally:
        os.close(descriptor)
    return status.st_size, "" if format_of(header) else unidentified(header)


def _check_size(path: Path) -> tuple[int, str]:
    """Size and problem (empty if there is none) of a file, which is not opened."""
    try:
        size = file_size(path)
    except NotARegularFile as reason:
        return -1, str(reason)
    return size, "" if size else EMPTY
