"""Damaged image files from a seed: for campaigns, and for a short one in every run of the tests.

Pictures of every format and of many modes, cut, flipped, spliced and re-labelled; headers that promise far more than
the file holds; and what is no picture at all under a picture's name. The same seed gives the same bytes as long as
Pillow's encoders stay the same.
"""

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache

import numpy as np
from PIL import Image, features

EXTENSION = {"JPEG": "jpg", "PNG": "png", "BMP": "bmp", "PPM": "ppm", "GIF": "gif", "TIFF": "tif"}
EXTENSION |= {"WEBP": "webp", "AVIF": "avif"}
LARGE = (0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"
CONTENTS: Mapping[str, bytes] = {
    "empty": b"",
    "byte": b"P",
    "html": b"<!DOCTYPE html><html><title>404 Not Found</title></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "eps": EPS,
    "eps_dos": struct.pack("<IIIIIIIH", 0xC6D3D0C5, 30, len(EPS), 0, 0, 0, 0, 0xFFFF) + EPS,
    "pdf": b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n",
    "zip": b"PK\x03\x04\x14\x00\x00\x00\x08\x00",
    "pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "xpm": b'/* XPM */\nstatic char *x[] = {\n"1 1 1 1",\n"a c #000000",\n"a"};\n',
    "zeros": bytes(4096),
}


def damaged(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of `count` files; a few of them can still be read.

    Args:
        seed: of every choice.
        count: files.
    """
    draw = random.Random(seed)
    kinds = [*DAMAGES]
    for number in range(count):
        kind = kinds[number % len(kinds)]
        name, data = draw.choice(pictures())
        data = DAMAGES[kind](draw, data)
        if data.startswith(b"\x89PNG") and draw.random() < 0.5:
            data = _checked(data)  # else hardly a damage would pass the checksum
        extension = draw.choice([*EXTENSION.values()]) if draw.random() < 0.1 else EXTENSION[name.split("_")[0]]
        yield f"{number:05}_{kind}_{name}.{extension}", data


@cache
def pictures() -> list[tuple[str, bytes]]:
    """Sound pictures: (format and what is particular, content)."""
    values = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    rgb, grey = Image.fromarray(values[..., :3].copy()), Image.fromarray(values[..., 0].copy())
    rgba, palette = Image.fromarray(values), rgb.quantize(16)
    deep, floats = Image.fromarray(values[..., 0].astype(np.uint16) * 257), Image.fromarray(values[..., 0] / 255.0)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgba.rotate(90)]}
    wanted = [
        ("JPEG", rgb, {"exif": exif}), ("JPEG", rgb, {"progressive": True}), ("JPEG", grey, {}),
        ("JPEG", rgb.convert("CMYK"), {}), ("PNG", rgb, {}), ("PNG", rgba, {"exif": exif}), ("PNG", grey, {}),
        ("PNG", palette, {"transparency": bytes(16)}), ("PNG", deep, {}), ("PNG", rgba.convert("LA"), {}),
        ("PNG", rgba, frames), ("PNG", grey.convert("1"), {}), ("BMP", rgb, {}), ("BMP", palette, {}), ("PPM", rgb, {}),
        ("PPM", deep.convert("I"), {}), ("PPM", floats.convert("F"), {}), ("GIF", palette, {}), ("GIF", rgba, frames),
        ("TIFF", rgb, {}), ("TIFF", deep, {"compression": "tiff_lzw"}), ("TIFF", floats.convert("F"), {}),
        ("TIFF", rgb, {"compression": "tiff_adobe_deflate"}), ("TIFF", rgb, {"compression": "jpeg"}),
        ("TIFF", rgb.convert("CMYK"), {}), ("TIFF", rgb.convert("LAB"), {}), ("TIFF", rgba, frames),
        ("TIFF", grey.convert("1"), {"compression": "group4"}), ("TIFF", rgb, {"big_tiff": True}),
        ("WEBP", rgb, {}), ("WEBP", rgba, {"lossless": True, "exif": exif}), ("WEBP", rgba, frames),
        ("AVIF", rgb, {"exif": exif}), ("AVIF", rgba, frames),
    ]  # fmt: skip
    found = [(f"PPM_{magic}", text) for magic, text in _texts().items()]
    for number, (name, image, options) in enumerate(wanted):
        if name in ("WEBP", "AVIF") and not features.check(name.lower()):
            continue
        buffer = io.BytesIO()
        image.save(buffer, name, **options)
        found.append((f"{name}_{number}", buffer.getvalue()))
    return found


def _texts() -> dict[str, bytes]:
    """The formats of PPM that are written in digits."""
    digits = " ".join(str(value % 8) for value in range(8 * 8 * 3)).encode()
    ones = " ".join(str(value % 2) for value in range(64)).encode()
    return {"P1": b"P1\n8 8\n" + ones, "P2": b"P2\n8 8\n7\n" + digits, "P3": b"P3\n8 8\n7\n" + digits}


def _cut(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data))]


def _flip(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 4, 32))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _flip_header(draw: random.Random, data: bytes) -> bytes:
    return _flip(draw, data[:64]) + data[64:]


def _splice(draw: random.Random, data: bytes) -> bytes:
    other = draw.choice(pictures())[1]
    return data[: draw.randrange(len(data))] + other[draw.randrange(len(other)) :]


def _overwrite(draw: random.Random, data: bytes) -> bytes:
    start, length = draw.randrange(len(data)), draw.randrange(1, 200)
    filling = draw.choice((bytes(length), b"\xff" * length, draw.randbytes(length)))
    return data[:start] + filling + data[start + length :]


def _repeat(draw: random.Random, data: bytes) -> bytes:
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.randrange(1, 200))
    return data[:end] + data[start:end] * draw.choice((1, 10, 1000)) + data[end:]


def _drop(draw: random.Random, data: bytes) -> bytes:
    start = draw.randrange(len(data))
    return data[:start] + data[start + draw.randrange(1, 200) :]


def _number(draw: random.Random, data: bytes) -> bytes:
    """A number somewhere in the first 200 bytes becomes one at which arithmetic breaks."""
    form = draw.choice(("<H", ">H", "<I", ">I"))
    value = struct.pack(form, draw.choice(LARGE) & (0xFFFF if form[1] == "H" else 0xFFFFFFFF))
    start = draw.randrange(min(200, len(data)))
    return data[:start] + value + data[start + len(value) :]


def _noise(draw: random.Random, data: bytes) -> bytes:
    """The first bytes, then anything."""
    return data[: draw.choice((2, 8, 16, 40))] + draw.randbytes(draw.randrange(2000))


def _bomb(draw: random.Random, data: bytes) -> bytes:
    """A header that promises a picture of many pixels, before next to nothing."""
    width, height = draw.choice(
        ((9_000, 9_900), (12_000, 12_000), (65_535, 65_535), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1))
    )
    short = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    header = struct.pack(">IIBBBBB", width, height, 8, draw.choice((0, 2, 6)), 0, 0, draw.randrange(2))
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 4, height), (279, 4, 100)]
    return draw.choice((
        b"P%d %d %d 255\n" % (draw.choice((5, 6)), width, height) + bytes(100),
        b"P%d %d %d 9\n1 2 3\n" % (draw.choice((2, 3)), width, height),
        b"Pf\n%d %d\n-1.0\n" % (width, height) + bytes(100),
        b"GIF89a" + short + b"\x80\x00\x00" + bytes(6) + b"," + bytes(4) + short + b"\x00\x02\x02\x4c\x01\x00;",
        b"BM" + struct.pack("<IIIIiiHHI", 154, 0, 54, 40, width, height, 1, 24, 0) + bytes(120),
        b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags) + bytes(104),
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(bytes(10**6))) + png_chunk(b"IEND"),
        b"\xff\xd8\xff\xc0\x00\x11\x08" + struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
        + b"\x03\x01\x11\x00\x02\x11\x00\x03\x11\x00" + data[:100],
    ))  # fmt: skip


def _other(draw: random.Random, data: bytes) -> bytes:
    return draw.choice([*CONTENTS.values()])


DAMAGES: Mapping[str, Callable[[random.Random, bytes], bytes]] = {
    "cut": _cut,
    "flip": _flip,
    "flip_header": _flip_header,
    "splice": _splice,
    "overwrite": _overwrite,
    "repeat": _repeat,
    "drop": _drop,
    "number": _number,
    "noise": _noise,
    "bomb": _bomb,
    "other": _other,
}


def png_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _checked(data: bytes) -> bytes:
    """A PNG with the checksums that its chunks should have, as far as these can be followed."""
    result, position = data[:8], 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        if position + 12 + length > len(data):
            break
        result += png_chunk(data[position + 4 : position + 8], data[position + 8 : position + 8 + length])
        position += 12 + length
    return result + data[position:]
