"""Reads the files of a shard set: from a folder, or through fsspec from any address that it knows (https, s3, …)."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from tailtune.configs.errors import UserError
from tailtune.datasets.images.regular_files import NotARegularFile, file_size, open_regular
from tailtune.datasets.sources.named_source import MissingData

MAX_OPEN_FILES = 256
"""Shards of a folder that stay open. Further ones are opened for each image, because a process may have few files open;
none is closed, because another thread may be reading it."""
ATTEMPTS, FIRST_WAIT_SECONDS = 4, 0.5
"""How often a server is asked, and the time before the second attempt. Each further wait is twice as long."""
CONNECT_SECONDS, SILENT_SECONDS = 30.0, 45.0
"""Time after which an HTTP server counts as silent, before and after it has accepted the connection."""
THREADS = 16
"""Threads that ask a server for the sizes of shards."""
CONTINUES = "the same command continues"

Result = TypeVar("Result")


class Span(NamedTuple):
    """Some bytes of a file of the set."""

    name: str
    start: int
    size: int


class ShardStore(Protocol):
    """The files of a shard set, by their names."""

    where: str
    """The folder or address, for messages."""
    remote: bool
    """Whether every read waits for a server."""

    def whole(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: it is not there.
            UserError: it cannot be read.
        """

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Sizes of files in bytes; None for a file that is not there, −1 for one whose size the server does not tell.

        Raises:
            MissingData: the server does not answer.
        """

    def span(self, span: Span) -> bytes:
        """Some bytes of a file; fewer if it ends before.

        Raises:
            FileNotFoundError: it is not there.
            OSError: it cannot be read.
            MissingData: the server does not answer.
        """

    def spans(self, spans: Sequence[Span]) -> list[bytes | None]:
        """Bytes of files, read at the same time; None for those that have to be asked for again by `span`."""


class FolderStore:
    """A shard set in a folder. Reading is safe in threads and in forked processes: no read moves a file position.

    Args:
        folder: the folder.
    """

    remote = False

    def __init__(self, folder: Path) -> None:
        self.folder, self.where = folder, str(folder)
        self._descriptors: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}  # a process that is not forked opens the files itself

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def whole(self, name: str) -> bytes:
        """As `ShardStore.whole`."""
        try:
            with os.fdopen(self._open(name), "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"cannot read {self.folder / name}: {error.strerror or error}") from error

    def _open(self, name: str) -> int:
        try:
            return open_regular(self.folder / name)[0]
        except NotARegularFile as reason:
            kind = FileNotFoundError if str(reason).startswith("not found") else OSError
            raise kind(str(reason)) from None

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """As `ShardStore.sizes`."""
        return [self._size(name) for name in names]

    def _size(self, name: str) -> int | None:
        try:
            return file_size(self.folder / name)
        except NotARegularFile:
            return None

    def span(self, span: Span) -> bytes:
        """As `ShardStore.span`."""
        descriptor = self._descriptors.get(span.name)
        if descriptor is not None:
            return os.pread(descriptor, span.size, span.start)
        opened = self._open(span.name)
        keep = len(self._descriptors) < MAX_OPEN_FILES
        if keep and self._descriptors.setdefault(span.name, opened) == opened:  # or another thread was faster
            return os.pread(opened, span.size, span.start)
        try:
            return os.pread(opened, span.size, span.start)
        finally:
            os.close(opened)

    def spans(self, spans: Sequence[Span]) -> list[bytes | None]:
        """As `ShardStore.spans`: reading a folder ahead gains nothing."""
        return [None] * len(spans)


class RemoteStore:
    """A shard set at an address that fsspec can read. Every process has connections of its own.

    Args:
        url: the address of the folder.

    Raises:
        UserError: fsspec does not know the protocol, or the package for it is missing.
    """

    remote = True

    def __init__(self, url: str) -> None:
        self.where = url.rstrip("/")
        self._opened: tuple[int, Any, str] | None = None
        self._files()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def whole(self, name: str) -> bytes:
        """As `ShardStore.whole`."""
        files, base = self._files()
        return bytes(self._asked(name, lambda: files.cat_file(f"{base}/{name}")))

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """As `ShardStore.sizes`."""
        self._files()
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(self._size, names))

    def _size(self, name: str) -> int | None:
        files, base = self._files()
        try:
            size = self._asked(name, lambda: files.size(f"{base}/{name}"))
        except FileNotFoundError:
            return None
        return -1 if size is None else int(size)

    def span(self, span: Span) -> bytes:
        """As `ShardStore.span`."""
        files, base = self._files()
        stop = span.start + span.size
        read = partial(files.cat_file, f"{base}/{span.name}", start=span.start, end=stop)
        return self._checked(span, bytes(self._asked(span.name, read)))

    def spans(self, spans: Sequence[Span]) -> list[bytes | None]:
        """As `ShardStore.spans`."""
        files, base = self._files()
        paths, starts = [f"{base}/{span.name}" for span in spans], [span.start for span in spans]
        stops = [span.start + span.size for span in spans]
        found = files.cat_ranges(paths, starts, stops, on_error="return")
        return [
            self._checked(span, bytes(each)) if isinstance(each, bytes) else None
            for span, each in zip(spans, found, strict=True)
        ]

    def _checked(self, span: Span, content: bytes) -> bytes:
        if len(content) > span.size:
            raise UserError(
                f"{self.where}/{span.name}: the server sends the whole file and not a part of it; use a server that "
                "answers range requests, or copy the shards to a folder"
            )
        return content

    def _files(self) -> tuple[Any, str]:
        """The file system of this process, and the address as it names it."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *_file_system(self.where))
        return self._opened[1], self._opened[2]

    def _asked(self, name: str, read: Callable[[], Result]) -> Result:
        """The result of a read, which is tried again if the server does not answer."""
        wait = FIRST_WAIT_SECONDS
        for attempt in range(ATTEMPTS):
            try:
                return read()
            except FileNotFoundError:
                raise
            except PermissionError as error:
                raise UserError(f"{self.where}/{name}: the server refuses access ({_reason(error)})") from error
            except Exception as error:  # every file system of fsspec has exceptions of its own
                if attempt + 1 == ATTEMPTS:
                    raise MissingData(
                        f"cannot read {self.where}/{name}: {_reason(error)} ({ATTEMPTS} attempts); {CONTINUES}"
                    ) from error
            time.sleep(wait)
            wait *= 2
        raise AssertionError("the last attempt returns or raises")


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the address as it names it."""
    import fsspec  # imported here because it takes time, and folders do not need it

    options: dict[str, Any] = {}
    try:
        if url.startswith(("http://", "https://")):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
            options = {"client_kwargs": {"timeout": timeout}}
        files, base = fsspec.url_to_fs(url, **options)
    except ImportError as error:  # fsspec says which package is missing, or Python names a module
        remedy = f"install {error.name}" if error.name else _reason(error)
        raise UserError(f"root {url}: {remedy} (with pip), or copy the shards to a folder") from error
    except (ValueError, OSError) as error:
        raise MissingData(f"root {url}: {_reason(error)}; give a folder, or an address such as https://…") from error
    return files, base.rstrip("/")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
