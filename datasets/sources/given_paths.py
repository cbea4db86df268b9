"""The images that a command names: files, folders, patterns, files that list paths, and standard input."""

import glob
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from tailtune.configs.errors import UserError
from tailtune.datasets.images.image_files import EXTENSIONS
from tailtune.datasets.sources.image_folder import is_hidden
from tailtune.datasets.sources.path_list import PathList
from tailtune.datasets.sources.text_files import numbered_lines

STANDARD_INPUT = "-"
LIST_FILES = (".txt", ".lst", ".list")
"""Extensions of files that hold one path in each line."""

log = logging.getLogger("tailtune")


def given_paths(sources: Sequence[str], left_out: Path | None = None) -> PathList:
    """The paths of images, in the order of the sources. Only names are read, so the files may be missing or damaged.

    Args:
        sources: each is an image file; a folder, which is searched with its subfolders; a pattern such as
            `photos/**/*.jpg`; a file of `LIST_FILES`; or `-` for paths on standard input, one a line.
        left_out: a folder that is not searched, because the command writes into it.

    Returns:
        Paths as they were given, or that begin with the folder as it was given.

    Raises:
        UserError: a source does not exist, cannot be read, or has no image.
    """
    return PathList(path for source in sources for path in _some(source, left_out))


def _some(source: str, left_out: Path | None) -> Iterator[str]:
    """The paths of a source, of which there is at least one."""
    paths = _paths_of(source, left_out)
    first = next(paths, None)
    if first is None:
        where = "standard input" if source == STANDARD_INPUT else source
        raise UserError(f"no image in {where}: give files whose names end in {', '.join(EXTENSIONS)}, or their paths")
    return chain([first], paths)


def _paths_of(source: str, left_out: Path | None) -> Iterator[str]:
    if source == STANDARD_INPUT:
        return _paths_on_standard_input()
    if os.path.isdir(source):
        return _images_below(source, left_out)
    if os.path.lexists(source):
        return _listed(Path(source)) if source.lower().endswith(LIST_FILES) else iter([source])
    if not glob.has_magic(source):
        raise UserError(f"no such file or folder: {source}")
    found = sorted(glob.glob(source, recursive=True))
    if not found:
        raise UserError(f"no file or folder fits the pattern {source}")
    below = [path for path in found if os.path.isdir(path) and "**" not in source]
    images = (path for path in found if path.lower().endswith(EXTENSIONS) and not os.path.isdir(path))
    return chain(images, *(_images_below(path, left_out) for path in below))


def _paths_on_standard_input() -> Iterator[str]:
    if sys.stdin is None:
        raise UserError("there is no standard input to read paths from")
    lines = (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
    return (os.fsdecode(line) for line in lines if line)


def _images_below(folder: str, left_out: Path | None) -> Iterator[str]:
    """The images in a folder and its subfolders, by name. Links are followed, but no folder is read twice."""
    visited = set() if left_out is None else {os.path.realpath(left_out)}
    others = 0
    for path, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(path)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(files):
            if not is_hidden(name) and name.lower().endswith(EXTENSIONS):
                yield os.path.join(path, name)
            else:
                others += 1
    if others:
        log.info("left out of %s: %d hidden files and files of other kinds", folder, others)


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")


def _listed(file: Path) -> Iterator[str]:
    """The paths in a file, one a line. Where they start from, and whether a label follows, is seen from the first."""
    lines = (line for _, line in numbered_lines(file) if line)
    first = next(lines, None)
    if first is None:
        return iter(())
    ways = [(folder, labelled) for labelled in (False, True) for folder in (str(file.parent), "")]
    folder, labelled = next((way for way in ways if os.path.lexists(_entry(first, *way))), ways[0])
    return (_entry(line, folder, labelled) for line in chain([first], lines))


def _entry(line: str, folder: str, labelled: bool) -> str:
    return os.path.join(folder, re.sub(r"\s+\d+$", "", line) if labelled else line)
