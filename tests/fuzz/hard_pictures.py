"""What a picture's path may lead to besides a damaged file: HARD, name → a function that makes it at a path.

Files that are no files, headers that promise more than a machine has, files that claim more bytes than they hold, and
sound pictures of kinds that decoders forget. Each function says whether such a picture can be decoded; None: it may.
"""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from tailtune.tests.fuzz.pictures import png_chunk

GIGA = 2**30
SPARSE = 10 * GIGA
"""Size of a sparse file, which takes no space on the disk."""
SIDES = ((9_600, 9_400), (20_000, 20_000), (65_500, 65_500), (2**14 - 1, 2**14 - 1))
"""Widths and heights that are too large for every format."""
LARGEST = (9_400, 9_500)
"""Just below the limit. It is drawn seldom, because it takes a second."""

Make = Callable[[Path, Random], bool | None]


def saved(kind: str, image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(draw: Random, mode: str = "RGB", side: int = 32) -> Image.Image:
    """A picture whose pixels come from the seed."""
    values = np.frombuffer(draw.randbytes(side * side * 4), dtype=np.uint8).reshape(side, side, 4)
    return Image.fromarray(values[..., :3].copy()).convert(mode)


# --- no regular files ------------------------------------------------------------------------------------------------


def fifo(path: Path, draw: Random) -> bool:
    os.mkfifo(path)
    return False


def folder(path: Path, draw: Random) -> bool:
    path.mkdir()
    return False


def link(path: Path, draw: Random, target: str) -> bool:
    path.symlink_to(target.replace("ITSELF", path.name))
    return False


def link_circle(path: Path, draw: Random) -> bool:
    """A folder that leads to itself, and a path that goes round and round in it."""
    inner = path.with_name(f"{path.stem}_circle")
    inner.mkdir()
    (inner / "again").symlink_to(".")
    path.symlink_to(Path(inner.name, *["again"] * draw.choice((3, 39, 41, 200)), "nothing.png"))
    return False


def unix_socket(path: Path, draw: Random) -> bool:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)
    return False


def forbidden(path: Path, draw: Random) -> bool:
    path.write_bytes(saved("PNG", noise(draw)))
    path.chmod(0)
    return False


# --- headers that promise too much -----------------------------------------------------------------------------------


def dimensions(path: Path, draw: Random, kind: str) -> bool:
    """A small picture whose header says that it is huge."""
    width, height = draw.choice(SIDES)
    data = bytearray(_lossless(draw) if kind == "WEBP" else saved(kind, noise(draw)))
    short, long = struct.pack("<HH", min(width, 65_535), min(height, 65_535)), struct.pack("<ii", width, height)
    if kind == "PNG":
        header = struct.pack(">II", width, height) + data[24:29]
        data[8:33] = png_chunk(b"IHDR", bytes(header))
    elif kind == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", min(height, 65_500), min(width, 65_500))
    elif kind == "GIF":
        place = data.index(b",", 6 + 7 + 3 * 2 ** ((data[10] & 7) + 1))
        data[6:10] = data[place + 5 : place + 9] = short
    elif kind == "WEBP":
        (packed,) = struct.unpack("<I", data[21:25])
        data[21:25] = struct.pack("<I", packed & 0xF0000000 | 16_382 << 14 | 16_382)
    elif kind == "BMP":
        data[18:26] = long
    else:
        data = bytearray(_tiff_with(data, {256: width, 257: height}))
    path.write_bytes(data)
    return False


def _lossless(draw: Random) -> bytes:
    return saved("WEBP", noise(draw), lossless=True)


def _tiff_with(data: bytes, values: Mapping[int, int]) -> bytes:
    """A TIFF whose first folder has other values, as 32-bit numbers."""
    changed = bytearray(data)
    (start,) = struct.unpack_from("<I", changed, 4)
    (count,) = struct.unpack_from("<H", changed, start)
    for place in range(start + 2, start + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from("<H", changed, place)
        if tag in values:
            struct.pack_into("<HHII", changed, place, tag, 4, 1, values[tag])
    return bytes(changed)


def largest(path: Path, draw: Random) -> bool:
    """As many pixels as are allowed: 1 bit, 8 bits with transparency, or 16 bits each."""
    kind, bits, size = draw.choice(((0, 1, 1), (6, 8, 32), (2, 16, 48)))
    path.write_bytes(_largest(kind, bits, size))
    return True


@cache
def _largest(kind: int, bits: int, size: int) -> bytes:
    width, height = LARGEST
    deflate = zlib.compressobj(1)
    row = bytes(1 + (width * size + 7) // 8)
    pixels = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    return _png(struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0), png_chunk(b"IDAT", pixels))


def _png(header: bytes, *chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(chunks) + png_chunk(b"IEND")


SMALL = struct.pack(">IIBBBBB", 40, 36, 8, 2, 0, 0, 0)
PIXELS = png_chunk(b"IDAT", zlib.compress(bytes(36 * 121)))


def compressed_text(path: Path, draw: Random, kind: bytes) -> None:
    """Chunks of a few bytes that unpack to a gigabyte, or many that unpack to a megabyte each."""
    data = b"key\0\0" + (b"\0\0" if kind == b"iTXt" else b"")
    bomb = data + _zeros(GIGA if draw.random() < 0.5 else 2**20 - 100)
    path.write_bytes(_png(SMALL, *[png_chunk(kind, bomb)] * draw.choice((1, 200)), PIXELS))


@cache
def _zeros(size: int) -> bytes:
    deflate, block = zlib.compressobj(9), bytes(2**20)
    return b"".join(deflate.compress(block[: size - start]) for start in range(0, size, 2**20)) + deflate.flush()


def many_scans(path: Path, draw: Random) -> None:
    """A progressive JPEG whose last scan is repeated. With many pixels, each scan takes long."""
    side, times = draw.choice(((300, 100), (300, 20_000), (6_000, 3_000), (9_000, 50_000)))
    data = _progressive(side)
    last = data[data.rindex(b"\xff\xda") : -2]
    path.write_bytes(data[:-2] + last * times + data[-2:])


@cache
def _progressive(side: int) -> bytes:
    return saved("JPEG", Image.new("RGB", (side, side), (90, 120, 30)), progressive=True)


# --- sparse files ----------------------------------------------------------------------------------------------------

_CLAIM = struct.pack(">I", 2**31 - 1)
HEADS: Mapping[str, bytes] = {
    "nothing": b"",
    "jpeg_marker": b"\xff\xd8\xff\xe0",
    "png_text": _png(SMALL)[:33] + _CLAIM + b"tEXt",
    "png_pixels": _png(SMALL)[:33] + _CLAIM + b"IDAT",
    "gif": b"GIF89a" + struct.pack("<HH", 40, 40) + bytes(3),
    "bmp_runs": b"BM" + struct.pack("<IIIIiiHHI", 1078, 0, 1078, 40, 40, 40, 1, 8, 1) + bytes(1044),
    "tiff": b"II*\0" + struct.pack("<IH", 8, 65_535),
    "big_tiff": b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**28),
    "ppm_comment": b"P6\n#",
    "ppm_digits": b"P3\n40 40\n255\n",
    "webp": b"RIFF\xff\xff\xff\x7fWEBPVP8L",
    "avif": b"\0\0\0\x1cftypavif",
}


def sparse(path: Path, draw: Random, head: str) -> bool:
    """The beginning of a file, and then ten gigabytes of zeros."""
    with path.open("wb") as file:
        file.write(HEADS[head])
        file.truncate(SPARSE)
    return False


def sparse_picture(path: Path, draw: Random) -> None:
    """A whole picture, or a part of one, and then ten gigabytes of zeros."""
    kind, options = draw.choice((("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("BMP", {})))
    data = saved(kind, noise(draw), **options)
    with path.open("wb") as file:
        file.write(data[: draw.choice((len(data), draw.randrange(len(data))))])
        file.truncate(SPARSE)


# --- sound pictures --------------------------------------------------------------------------------------------------


def animated(path: Path, draw: Random) -> bool:
    frames = [noise(draw) for _ in range(draw.choice((2, 60)))]
    kind = draw.choice(("GIF", "PNG", "TIFF", "WEBP"))
    path.write_bytes(saved(kind, frames[0], save_all=True, append_images=frames[1:]))
    return True


def modes(path: Path, draw: Random) -> bool:
    """CMYK, and grey or colour of 16 bits."""
    kind, image = draw.choice((
        ("JPEG", noise(draw, "CMYK")),
        ("TIFF", noise(draw, "CMYK")),
        ("PNG", Image.fromarray(np.asarray(noise(draw, "L")).astype(np.uint16) * 257)),
        ("TIFF", Image.fromarray(np.asarray(noise(draw, "L")).astype(np.uint16) * 257)),
        ("PNG", None),
    ))  # fmt: skip
    if image is None:
        rows = b"".join(b"\0" + draw.randbytes(40 * 6) for _ in range(36))
        header = struct.pack(">IIBBBBB", 40, 36, 16, 2, 0, 0, 0)
        path.write_bytes(_png(header, png_chunk(b"IDAT", zlib.compress(rows))))
    else:
        path.write_bytes(saved(kind, image))
    return True


def exif(path: Path, draw: Random) -> bool:
    """Garbage where a camera writes its notes: the pixels are sound."""
    notes = Image.Exif()
    notes[0x0112], notes[0x9003] = draw.randrange(12), "2024:01:01 00:00:00"
    whole = bytearray(notes.tobytes())
    for _ in range(draw.randrange(1, 12)):
        whole[draw.randrange(6, len(whole))] = draw.randrange(256)
    cut = whole[: draw.randrange(6, len(whole))]
    garbage = bytes(draw.choice((whole, cut, b"Exif\0\0" + draw.randbytes(90))))
    path.write_bytes(saved(draw.choice(("JPEG", "PNG", "WEBP")), noise(draw), exif=garbage))
    return True


HARD: Mapping[str, Make] = {
    "fifo": fifo,
    "folder": folder,
    "socket": unix_socket,
    "forbidden": forbidden,
    "dangling": partial(link, target="nothing.png"),
    "itself": partial(link, target="ITSELF"),
    "circle": link_circle,
    "device": partial(link, target="/dev/zero"),
    "terminal": partial(link, target="/dev/tty"),
    "memory": partial(link, target="/proc/self/mem"),
    **{f"dimensions_{kind}": partial(dimensions, kind=kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")},
    "largest": largest,
    **{f"text_{kind.decode()}": partial(compressed_text, kind=kind) for kind in (b"zTXt", b"iTXt", b"iCCP")},
    "many_scans": many_scans,
    **{f"sparse_{head}": partial(sparse, head=head) for head in HEADS},
    "sparse_picture": sparse_picture,
    "animated": animated,
    "modes": modes,
    "exif": exif,
}
