"""Picture files: which formats are read, how each becomes an RGB image, and one cheap look at many of them.

What Pillow's `convert("RGB")` makes of a mode is what comes out (transparency is dropped, CMYK is converted without a
profile), with three exceptions: grey of more than 8 bits (`datasets/grey.py`), mode La, which Pillow does not convert,
and pictures with an EXIF orientation, which are turned upright. Of an animation the first frame is read.
"""

import logging
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features
from tqdm import tqdm

from datasets.grey import eight_bits, is_deep

KNOWN = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
}
NEEDS = {"JPEG": "jpg", "PNG": "zlib", "WEBP": "webp", "AVIF": "avif"}
"""Format → the library that Pillow may have been built without."""


def _built_in(library: str) -> bool:
    known = library in features.modules or library in features.codecs  # an old Pillow does not know avif
    return known and bool(features.check(library))


FORMATS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: ends for name, ends in KNOWN.items() if name not in NEEDS or _built_in(NEEDS[name])}
)
"""Pillow's name of a format → extensions. No other format is tried, so EPS named x.jpg never starts Ghostscript."""
EXTENSIONS: tuple[str, ...] = tuple(end for ends in FORMATS.values() for end in ends)

MAX_PIXELS = 89_478_485
"""Where Pillow begins to warn of a decompression bomb; such a picture takes 0.7 GB while it is converted."""
MAX_BYTES = 1 << 28
"""Of a file in a format that Pillow reads as a whole before it looks at the size of the picture."""
TOO_LARGE = f"more than {MAX_PIXELS:,} pixels are not read: make it smaller"
READ_WHOLE = ("WEBP", "AVIF")
EMPTY = "an empty file"
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device"}
KINDS |= {stat.S_IFBLK: "a device"}
PREFIX = 16
"""First bytes of a file that tell its format; what Pillow's own `accept` functions get."""
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error)
"""What Pillow's decoders raise on bytes they cannot read (AVIF's a RuntimeError); TypeError and NameError are bugs."""

AT_HAND = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""How a file is opened: a FIFO without a writer is there at once, to be refused."""
THREADS = 16
"""That look at files; more than processors, since on a network file system each look waits for an answer."""
AT_ONCE = 256
"""Files that a thread looks at before it takes the next ones."""

# Pillow warns of oddities in single files (damaged EXIF, transparency, size) from wherever it notices them: thousands
# of lines in which nobody finds ours. What cannot be read is an error and is reported as one.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


class BadPicture(Exception):
    """A file that is missing or is no picture that can be read; the message is the reason, without the path."""


def load_rgb(path: Path) -> Image.Image:
    """The picture in a file, upright, in mode RGB. Never waits for a FIFO or a device.

    Raises:
        BadPicture: missing, not a regular file, not in `FORMATS`, damaged, cut short, or of too many pixels.
    """
    descriptor, status = _open(path)
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > MAX_BYTES and format_of(file.read(PREFIX)) in READ_WHOLE:
            raise BadPicture(f"larger than {MAX_BYTES >> 20} MiB")
        try:
            with Image.open(file, formats=tuple(FORMATS)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadPicture(f"of {image.width} × {image.height} pixels; {TOO_LARGE}")
                return _upright_rgb(image)
        except UnidentifiedImageError:
            file.seek(0)
            raise BadPicture(_unidentified(file.read(PREFIX))) from None
        except Image.DecompressionBombError:
            raise BadPicture(TOO_LARGE) from None
        except DECODE_ERRORS as error:
            raise BadPicture(" ".join(str(error).split()) or type(error).__name__) from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    with suppress(*DECODE_ERRORS):  # damaged EXIF data, which say nothing about the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if is_deep(image.mode):
        image = eight_bits(image)
    elif image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGB")


@dataclass(frozen=True)
class Inspection:
    """What one look at N files found."""

    sizes: np.ndarray
    """Bytes, int64 [N]; −1 where there is no regular file."""
    problems: dict[int, str]
    """Position of each file that cannot be a picture → why, ascending."""


def inspect_files(paths: Sequence[Path], headers: bool = True) -> Inspection:
    """Look at every file without decoding any: is it there, is it a regular file, do its first bytes name a format?

    A bar stands on a terminal when that takes longer than two seconds.

    Args:
        paths: N files.
        headers: read the first bytes; else ask for no more than kind and size.
    """
    sizes = np.full(len(paths), -1, dtype=np.int64)
    problems: dict[int, str] = {}

    def look(start: int) -> int:
        chunk = paths[start : start + AT_ONCE]
        for index, path in enumerate(chunk, start):
            sizes[index], problem = _look(path) if headers else _ask(path)
            if problem:
                problems[index] = problem
        return len(chunk)

    starts = range(0, len(paths), AT_ONCE)
    _accepts()  # imports Pillow's formats before threads would do so side by side
    with (
        tqdm(total=len(paths), desc="looking at the images", delay=2, leave=False, disable=None) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for done in pool.map(look, starts):
            bar.update(done)
    return Inspection(sizes, dict(sorted(problems.items())))


def format_of(prefix: bytes) -> str | None:
    """The entry of `FORMATS` that the first bytes of a file name, by Pillow's own rules."""
    prefix = prefix.ljust(PREFIX, b"\0")
    return next((name for name, accept in _accepts() if accept(prefix) is True), None)


def _look(path: Path) -> tuple[int, str]:
    """(size, problem or an empty text) of a file, of which the first bytes are read."""
    try:
        descriptor, status = _open(path)
    except BadPicture as problem:
        return -1, str(problem)
    try:
        prefix = os.read(descriptor, PREFIX)
    except OSError as error:
        return status.st_size, str(error.strerror)
    finally:
        os.close(descriptor)
    return status.st_size, "" if format_of(prefix) else _unidentified(prefix)


def _ask(path: Path) -> tuple[int, str]:
    """(size, problem or an empty text) of a file that is not opened."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        return -1, _not_opened(path, error)
    if not stat.S_ISREG(status.st_mode):
        return -1, _not_regular(status)
    return status.st_size, "" if status.st_size else EMPTY


def _open(path: Path) -> tuple[int, os.stat_result]:
    """A descriptor of a regular file, and what the system says of it. Raises `BadPicture` for anything else."""
    try:
        descriptor = os.open(path, AT_HAND)
    except (OSError, ValueError) as error:
        raise BadPicture(_not_opened(path, error)) from None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        return descriptor, status
    os.close(descriptor)
    raise BadPicture(_not_regular(status))


@cache
def _accepts() -> list[tuple[str, Callable[[bytes], bool | str]]]:
    """Format → Pillow's function that knows its first bytes (a string says that a library is missing)."""
    Image.init()
    return [(name, accept) for name in FORMATS if (accept := Image.OPEN[name][1])]


def _not_opened(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"not found: a link to {os.readlink(path)}" if os.path.islink(path) else "not found"
    return str(error.strerror) if isinstance(error, OSError) else str(error)


def _not_regular(status: os.stat_result) -> str:
    return f"{KINDS.get(stat.S_IFMT(status.st_mode), 'something else')}, not a file"


def _unidentified(prefix: bytes) -> str:
    """Why Pillow makes no picture of a file that begins like this."""
    if not prefix:
        return EMPTY
    if name := format_of(prefix):
        return f"the header of this {name} file is damaged"
    return f"in no format that is read ({', '.join(FORMATS)}): it begins with {prefix!r}"
