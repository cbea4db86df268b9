"""Regular files only: what is a folder, a FIFO or a device is refused at once, and nothing waits for it."""

import os
import stat
from pathlib import Path

AT_HAND = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""How a file is opened: a FIFO without a writer is there at once, to be refused."""
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device"}
KINDS |= {stat.S_IFBLK: "a device"}
EMPTY = "an empty file"


class NoFile(Exception):
    """There is no regular file that can be opened; the message is the reason, without the path."""


def open_regular(path: Path) -> tuple[int, os.stat_result]:
    """A descriptor to read from, and what the system says of the file. Raises `NoFile`."""
    try:
        descriptor = os.open(path, AT_HAND)
    except (OSError, ValueError) as error:
        raise NoFile(_reason(path, error)) from None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        return descriptor, status
    os.close(descriptor)
    raise NoFile(_kind(status))


def size_of(path: Path) -> int:
    """Bytes of a regular file, which is not opened. Raises `NoFile`."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise NoFile(_reason(path, error)) from None
    if not stat.S_ISREG(status.st_mode):
        raise NoFile(_kind(status))
    return status.st_size


def _reason(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"not found: a link to {os.readlink(path)}" if os.path.islink(path) else "not found"
    return str(error.strerror) if isinstance(error, OSError) else str(error)  # ValueError: NUL in the name


def _kind(status: os.stat_result) -> str:
    return f"{KINDS.get(stat.S_IFMT(status.st_mode), 'something else')}, not a file"
