"""Opens regular files only. A folder, a FIFO or a device is refused at once, so that no read can block on it."""

import os
import stat
from pathlib import Path

OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""With O_NONBLOCK, opening a FIFO that nobody writes to returns at once."""
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device"}
KINDS |= {stat.S_IFBLK: "a device"}
EMPTY = "an empty file"


class NotARegularFile(Exception):
    """There is no regular file that can be opened. The message is the reason, without the path."""


def open_regular(path: Path) -> tuple[int, os.stat_result]:
    """Open a regular file for reading.

    Args:
        path: the file.

    Returns:
        A file descriptor, and what `os.fstat` says of the file.

    Raises:
        NotARegularFile: nothing is there, it is no regular file, or it cannot be opened.
    """
    try:
        descriptor = os.open(path, OPEN_FLAGS)
    except (OSError, ValueError) as error:
        raise NotARegularFile(_reason(path, error)) from None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        return descriptor, status
    os.close(descriptor)
    raise NotARegularFile(_kind(status))


def file_size(path: Path) -> int:
    """The size of a regular file in bytes, without opening it.

    Args:
        path: the file.

    Raises:
        NotARegularFile: nothing is there, or it is no regular file.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise NotARegularFile(_reason(path, error)) from None
    if not stat.S_ISREG(status.st_mode):
        raise NotARegularFile(_kind(status))
    return status.st_size


def _reason(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"not found: a link to {os.readlink(path)}" if os.path.islink(path) else "not found"
    return str(error.strerror) if isinstance(error, OSError) else str(error)  # ValueError: NUL in the name


def _kind(status: os.stat_result) -> str:
    return f"{KINDS.get(stat.S_IFMT(status.st_mode), 'something else')}, not a file"
