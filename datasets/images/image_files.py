"""Picture files: which formats are read, how each becomes an RGB image, and one cheap look at many of them.

What Pillow's `convert("RGB")` makes of a mode is what comes out (transparency is dropped, CMYK is converted without a
profile), with three exceptions: grey of more than 8 bits (`deep_grey.py`), mode La, which Pillow does not convert,
and pictures with an EXIF orientation, which are turned upright. Of an animation the first frame is read.
"""

import logging
import os
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

from tailtune.datasets.images.deep_grey import eight_bits, is_deep
from tailtune.datasets.images.regular_files import EMPTY, NoFile, open_regular, size_of

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
"""Where Pillow begins to warn of a decompression bomb; such a picture takes 0.8 GB while it is converted."""
READ_WHOLE = ("WEBP", "AVIF")
"""Formats that Pillow reads as a whole and decodes into copies of its own: half as many pixels, and `MAX_BYTES`."""
MAX_BYTES = 1 << 28
PREFIX = 16
"""First bytes of a file that tell its format; what Pillow's own `accept` functions get."""
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error)
"""What Pillow's decoders raise on bytes they cannot read (AVIF's a RuntimeError); TypeError and NameError are bugs."""

THREADS = 16
"""That look at files; more than processors, since on a network file system each look waits for an answer."""
AT_ONCE = 256
"""Files that a thread looks at before it takes the next ones."""


def quiet() -> None:
    """Silence what Pillow says of oddities in single files (damaged EXIF data, transparency, many pixels).

    Over thousands of files these lines would bury ours. What cannot be read is an error, and is reported as one.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").addHandler(logging.NullHandler())


quiet()


class BadPicture(Exception):
    """A file that is missing or is no picture that can be read; the message is the reason, without the path."""


def load_rgb(path: Path) -> Image.Image:
    """The picture in a file, upright, in mode RGB. Never waits for a FIFO or a device.

    Raises:
        BadPicture: missing, not a regular file, not in `FORMATS`, damaged, cut short, or of too many pixels.
    """
    try:
        descriptor, status = open_regular(path)
    except NoFile as reason:
        raise BadPicture(str(reason)) from None
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > MAX_BYTES and format_of(file.read(PREFIX)) in READ_WHOLE:
            raise BadPicture(f"larger than {MAX_BYTES >> 20} MiB")
        try:
            with Image.open(file, formats=tuple(FORMATS)) as image:
                limit = MAX_PIXELS // 2 if image.format in READ_WHOLE else MAX_PIXELS
                if image.width * image.height > limit:
                    raise BadPicture(f"{image.width} × {image.height}, {_too_large(limit)}")
                return _upright_rgb(image)
        except UnidentifiedImageError:
            file.seek(0)
            raise BadPicture(_unidentified(file.read(PREFIX))) from None
        except Image.DecompressionBombError:
            raise BadPicture(_too_large(MAX_PIXELS)) from None
        except DECODE_ERRORS as error:
            raise BadPicture(" ".join(str(error).split()) or type(error).__name__) from error


def _too_large(limit: int) -> str:
    return f"more than {limit:,} pixels: make it smaller"


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
        descriptor, status = open_regular(path)
    except NoFile as reason:
        return -1, str(reason)
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
        size = size_of(path)
    except NoFile as reason:
        return -1, str(reason)
    return size, "" if size else EMPTY


@cache
def _accepts() -> list[tuple[str, Callable[[bytes], bool | str]]]:
    """Format → Pillow's function that knows its first bytes (a string says that a library is missing)."""
    Image.init()
    return [(name, accept) for name in FORMATS if (accept := Image.OPEN[name][1])]


def _unidentified(prefix: bytes) -> str:
    """Why Pillow makes no picture of a file that begins like this."""
    if not prefix:
        return EMPTY
    if name := format_of(prefix):
        return f"the header of this {name} file is damaged"
    return f"in no format that is read ({', '.join(FORMATS)}): it begins with {prefix!r}"
