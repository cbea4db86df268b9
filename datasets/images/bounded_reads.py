"""Bounds for the work that an image file may cause, because some files are damaged or made to stop a program."""

from typing import Any, BinaryIO

MAX_PIXELS = 89_478_485
"""Pillow warns of a decompression bomb above this number. Such an image takes 0.8 GB while it is converted."""
MAX_BYTES = 1 << 28
"""Most bytes that are read for a header. Formats that Pillow reads whole may not be larger."""
HEADER_READS, PIXEL_READS = 100_000, 4_000_000
"""Most reads that a header, and then the pixels, may take."""
BYTES_PER_PIXEL = 16
"""Most bytes of a pixel in a file, as digits in PPM. Beside them the pixels may have `MAX_BYTES`."""
SCAN_PIXELS = 100 * MAX_PIXELS
"""Most pixels of a JPEG times its scans: a few seconds, which allows a hundred scans of the largest images."""
LEAST_SCAN_BYTES = 10
"""The header of a scan has so many bytes."""
START_OF_SCAN = b"\xff\xda"
BLOCK = 1 << 20


class BoundedReads:
    """A file from which only so much can be read. Else Pillow would follow a damaged header through a sparse file.

    Args:
        file: the file; everything but `read` is passed on to it. The first bounds are those of a header.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.reads, self.bytes = HEADER_READS, MAX_BYTES
        self.problem = "its header is damaged, or larger than any header"

    def begin_pixels(self, width: int, height: int) -> None:
        """Set the bounds of the pixels, after the header has been read.

        Args:
            width, height: size of the image in pixels.
        """
        self.reads, self.bytes = PIXEL_READS, most_bytes(width * height)
        self.problem = f"more data than {width} × {height} pixels can have"

    def read(self, size: int | None = -1) -> bytes:
        """Read as the file does.

        Raises:
            OSError: a bound is exceeded.
        """
        most = max(self.bytes, 0) + 1
        data = self.file.read(most if size is None or size < 0 else min(size, most))
        self.reads -= 1
        self.bytes -= len(data)
        if self.reads < 0 or self.bytes < 0:
            raise OSError(self.problem)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def most_bytes(pixels: int) -> int:
    """The most bytes that are read for an image.

    Args:
        pixels: width times height.
    """
    return MAX_BYTES + BYTES_PER_PIXEL * pixels


def has_too_many_scans(file: BinaryIO, size: int, pixels: int) -> bool:
    """Whether the scans of a JPEG are more work than an image can need: each one goes over all pixels.

    Args:
        file: the file; its position stays the same.
        size: its size in bytes.
        pixels: width times height.
    """
    most, left = SCAN_PIXELS // max(pixels, 1), min(size, most_bytes(pixels))
    if left // LEAST_SCAN_BYTES <= most:
        return False
    position, scans, last = file.tell(), 0, b""
    file.seek(0)
    while scans <= most and left > 0 and (block := file.read(min(BLOCK, left))):
        scans += (last + block).count(START_OF_SCAN)
        last, left = block[-1:], left - len(block)
    file.seek(position)
    return scans > most
