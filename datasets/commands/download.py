"""Downloads one file, or copies it, so that it has its final name only once its checksum is right."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from tqdm import tqdm

from tailtune.configs.atomic_file import atomic_file, sync_folder
from tailtune.configs.errors import UserError
from tailtune.datasets.commands.checksums import checksum
from tailtune.datasets.commands.published_files import PublishedFile
from tailtune.datasets.commands.result_files import cannot_write
from tailtune.datasets.images.regular_files import NotARegularFile, file_size

ATTEMPTS = 3
"""Connections that are tried for one file. Each continues where the last one broke."""
TIMEOUT = 60
"""Seconds without an answer after which a connection counts as broken."""
BLOCK = 1 << 20
MAX_BYTES = 1 << 30
"""Largest file that is accepted; the largest one in the table has 170 MB."""


class Broken(Exception):
    """A connection ended early. The message says how much had been received."""


def has_checksum(path: Path, file: PublishedFile) -> bool:
    """Whether a file exists and has the published checksum.

    Args:
        path: the file; a FIFO or a folder is none.
        file: the published file.
    """
    try:
        return file_size(path) <= MAX_BYTES and checksum(path, file.kind) in file.checksums
    except NotARegularFile:
        return False


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; it gets its final name when it is complete.

    Args:
        source: an existing file.
        target: the new file.

    Raises:
        UserError: it cannot be read, or the file system refuses to write.
    """
    try:
        with source.open("rb") as content, atomic_file(target) as copy:
            for block in iter(lambda: content.read(BLOCK), b""):
                copy.write(block)
    except OSError as error:
        raise cannot_write(target, error) from error


def download(file: PublishedFile, url: str, target: Path) -> None:
    """Download a file. What has been received of a broken download stays in `.<name>.part` and is continued.

    Args:
        file: the published file.
        url: its address.
        target: the new file.

    Raises:
        UserError: the file cannot be downloaded or written, or its checksum is wrong.
    """
    part = target.with_name(f".{target.name}.part")
    if part.is_symlink() or (part.exists() and not part.is_file()):
        raise UserError(f"{part} is a link or no regular file: remove it")
    try:
        continued = part.exists()
        _receive(url, part)
        if not has_checksum(part, file) and continued:
            part.unlink()  # the earlier part may be of another file
            _receive(url, part)
        if not has_checksum(part, file):
            size = part.stat().st_size
            part.unlink()
            expected = f"{file.kind} {' or '.join(file.checksums)}"
            received = f"{url}: the {size:,} bytes that were received"
            raise UserError(f"{received} do not have the published {expected}; try again")
        part.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise cannot_write(target, error) from error


def _receive(url: str, part: Path) -> None:
    """Receive a file, with several connections if they break."""
    reason = ""
    for _ in range(ATTEMPTS):
        try:
            return _receive_once(url, part)
        except Broken as broken:
            reason = str(broken)
    raise UserError(f"{url}: the connection broke {ATTEMPTS} times ({reason}); the same command continues the download")


def _receive_once(url: str, part: Path) -> None:
    """Receive a file, or the rest of it.

    Raises:
        Broken: the connection ended early.
        UserError: the server refuses, or cannot be reached.
    """
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to be sent, or the part is longer than the file
            return
        raise _cannot_download(url, f"{error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise _cannot_download(url, str(error.reason)) from None
    except (ConnectionError, TimeoutError, HTTPException) as error:
        raise Broken(str(error) or type(error).__name__) from None
    except (OSError, ValueError) as error:
        raise _cannot_download(url, str(error) or type(error).__name__) from None
    with answer:
        start = start if answer.status == 206 else 0
        length = answer.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else None
        with part.open("ab" if start else "wb") as file, _bar(url, start, total) as bar:
            for block in _blocks(answer):
                if file.tell() + len(block) > MAX_BYTES:
                    part.unlink()
                    raise UserError(f"{url}: more than {MAX_BYTES >> 20} MiB; this is not the published file")
                file.write(block)
                bar.update(len(block))
            received = file.tell()
            file.flush()
            os.fsync(file.fileno())
    if total is not None and received < total:
        raise Broken(f"{received:,} of {total:,} bytes were received")


def _blocks(answer: HTTPResponse) -> Iterator[bytes]:
    """The content of an answer. The end of a connection ends it, early or not."""
    while True:
        try:
            block = answer.read1(BLOCK)
        except (HTTPException, OSError):  # the caller compares the length
            return
        if not block:
            return
        yield block


def _bar(url: str, start: int, total: int | None) -> "tqdm[None]":
    name = url.rpartition("/")[2]
    return tqdm(total=total, initial=start, desc=name, unit="B", unit_scale=True, delay=2, leave=False, disable=None)


def _cannot_download(url: str, reason: str) -> UserError:
    return UserError(
        f"cannot download {url} ({' '.join(reason.split())}): try again, or give a folder with copies by --from"
    )
