"""Decodes images to uint8 tensors: JPEG with torchvision, everything else with Pillow.

torchvision decodes a JPEG into a tensor without a copy. Both libraries decode with libjpeg-turbo and give the same
pixels. What torchvision would treat in another way goes to Pillow: CMYK, a rotation by EXIF data, a damaged file.
"""

import io
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image
from PIL.ExifTags import Base

from tailtune.configs.lazy_module import lazy_module
from tailtune.datasets.images.bounded_reads import MAX_BYTES, MAX_PIXELS, has_too_many_scans
from tailtune.datasets.images.decoding_room import take_room_for_file, take_room_for_pixels
from tailtune.datasets.images.deep_grey import STRIP_PIXELS
from tailtune.datasets.images.image_files import DECODE_ERRORS, LONGEST, decode_errors, open_image, upright_rgb

if TYPE_CHECKING:
    from torch import Tensor

torch, tv_io = lazy_module("torch"), lazy_module("torchvision.io")

START_OF_IMAGE, START_OF_SCAN = b"\xff\xd8", 0xDA
START_OF_FRAME = (0xC0, 0xC1, 0xC2)
"""Markers of frames that are compressed by Huffman codes: baseline, extended, progressive."""
SKIPPED = frozenset((0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE))
"""Markers of tables, comments and data of programs."""
APP1 = 0xE1
"""The marker of EXIF and XMP data, which may say that the image is rotated."""
EXIF = b"Exif\0\0"
ROTATIONS = range(2, 9)
"""Values of EXIF's orientation for images that are rotated or mirrored."""
XMP_ROTATION = re.compile(rb"""(?<!/)tiff:Orientation(?!="1"|='1'|>1<)""")
SCANNED_BYTES = 1 << 17
"""Where the first scan of a JPEG begins at the latest, if it is decoded here."""


def decode_pixels(file: BinaryIO) -> "Tensor":
    """Decode an image.

    Args:
        file: the encoded image, which can be read from any position.

    Returns:
        RGB pixels, uint8 [3, H, W], rotated as the EXIF data say.

    Raises:
        DecodeError: as `load_rgb`.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    count = plain_jpeg_pixels(file.read(SCANNED_BYTES))
    if count and size <= MAX_BYTES and not has_too_many_scans(file, size, count):
        take_room_for_file(size)
        take_room_for_pixels(count)
        if (pixels := _plain_jpeg(file)) is not None:
            return pixels
    with open_image(file) as image, decode_errors():
        return pixels_of(upright_rgb(image))


def _plain_jpeg(file: BinaryIO) -> "Tensor | None":
    """Decode a JPEG with torchvision. None if it cannot: Pillow decodes it after all, or says what is wrong."""
    file.seek(0)
    encoded = file.getbuffer() if isinstance(file, io.BytesIO) else bytearray(file.read())
    try:
        pixels: Tensor = tv_io.decode_jpeg(torch.frombuffer(encoded, dtype=torch.uint8), tv_io.ImageReadMode.RGB)
    except RuntimeError:
        return None
    return pixels


def pixels_of(image: Image.Image) -> "Tensor":
    """The pixels of an image of mode RGB, uint8 [3, H, W]. Strips are copied, so there is never a third copy of all."""
    width, height = image.size
    pixels: Tensor = torch.empty(height, width, 3, dtype=torch.uint8)
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels.numpy()[top : top + rows] = np.asarray(strip)
    return pixels.permute(2, 0, 1)


def plain_jpeg_pixels(header: bytes) -> int:
    """The number of pixels of a JPEG of which both libraries give the same pixels, and not too many.

    Pillow can tell this too, but takes ten times longer, because it reads all tables of the header.

    Args:
        header: the first bytes of the file.

    Returns:
        Width times height; 0 for any other file.
    """
    if not header.startswith(START_OF_IMAGE):
        return 0
    place, count, exif = len(START_OF_IMAGE), 0, 0
    while place + 10 <= len(header):  # a marker, its length, and what a frame begins with
        mark, kind, length = header[place], header[place + 1], int.from_bytes(header[place + 2 : place + 4])
        if mark == 0xFF and kind == START_OF_SCAN:
            return count
        if mark == 0xFF and kind in START_OF_FRAME and not count:
            precision, components = header[place + 4], header[place + 9]
            height, width = (int.from_bytes(header[place + n : place + n + 2]) for n in (5, 7))
            count = height * width
            if precision != 8 or components not in (1, 3) or not 0 < count <= MAX_PIXELS:
                return 0
            if max(height, width) > LONGEST * min(height, width):
                return 0
        elif mark != 0xFF or kind not in SKIPPED or length < 2:  # Pillow would refuse it, or find its frame elsewhere
            return 0
        if kind == APP1:
            data = header[place + 4 : place + 2 + length]
            exif += data.startswith(EXIF)
            if exif > 1 or not _is_upright(data):  # Pillow joins several segments of EXIF data
                return 0
        place += 2 + length
    return 0


def _is_upright(data: bytes) -> bool:
    """Whether the data of a segment `APP1` can be read and rotate nothing."""
    with suppress(*DECODE_ERRORS):
        exif = Image.Exif()
        if data.startswith(EXIF):
            exif.load(data)
        return exif.get(Base.Orientation) not in ROTATIONS and not XMP_ROTATION.search(data)
    return False
