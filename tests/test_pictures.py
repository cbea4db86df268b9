"""Picture files: every format and mode, what lies about itself, and what is no file at all."""

import io
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from fuzz.hard_pictures import HARD
from fuzz.pictures import CONTENTS, damaged
from PIL import EpsImagePlugin, Image, ImageOps

from tailtune.datasets.images import bounded_reads, decode_many, decoding_room
from tailtune.datasets.images import image_files as pictures
from tailtune.datasets.images import inspect_files as checks
from tailtune.datasets.images.image_files import EXTENSIONS, FORMATS, DecodeError, load_rgb, upright_rgb
from tailtune.datasets.images.inspect_files import inspect_files
from tailtune.datasets.sources.image_sources import FileSource
from tailtune.datasets.sources.named_source import BadImage

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # Pillow's; see `quiet`
RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8))
RAMP = np.tile(np.arange(256), (4, 1))
"""Each of the 256 shades, [4, 256]."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """What waits for ever fails instead."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def shades(path: Path) -> np.ndarray:
    """The first row of a picture that must be grey, [W]."""
    pixels = np.asarray(load_rgb(path))
    assert (pixels == pixels[..., :1]).all()
    assert (pixels == pixels[:1]).all()
    return pixels[0, :, 0]


def tiff(path: Path, rows: bytes, bits: int, kind: int = 1, white_is_zero: bool = False, alpha: bool = False) -> Path:
    """A grey TIFF of `RAMP`'s size that Pillow does not write: `bits` a sample, of `kind` 1 unsigned or 2 signed."""
    height, width = RAMP.shape
    tags = [(256, 1, width), (257, 1, height), (258, 1, bits), (259, 1, 1), (262, 1, int(not white_is_zero))]
    tags += [(273, 1, 200), (277, 1, 1), (278, 1, height), (279, 1, len(rows)), (339, 1, kind)]
    if alpha:  # two samples a pixel, the second one associated alpha
        changed = {258: (258, 2, bits | bits << 16), 277: (277, 1, 2), 339: (338, 1, 1)}
        tags = [changed.get(tag[0], tag) for tag in tags]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag == 279 else 3, n, value) for tag, n, value in tags)
    header = b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(header.ljust(200, b"\0") + rows)
    return path


# --- formats and modes -----------------------------------------------------------------------------------------------


def test_the_formats_are_those_of_this_pillow() -> None:
    assert set(FORMATS) >= {"JPEG", "PNG", "BMP", "PPM", "GIF", "TIFF"}
    assert {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".gif"} <= set(EXTENSIONS)
    assert not {".eps", ".ps", ".pdf", ".txt"} & set(EXTENSIONS)
    assert all(end == end.lower() and Image.registered_extensions().get(end, name) == name for name, ends in
               FORMATS.items() for end in ends)  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_as_pillow_reads_it(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / "a.picture", RGB, format=name)  # the content decides, not the name
    with Image.open(path) as image:
        assert load_rgb(path).tobytes() == image.convert("RGB").tobytes()
    assert not inspect_files([path]).problems


@pytest.mark.parametrize(
    ("end", "mode"),
    [
        *(("png", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("tif", mode) for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")),
        *(("jpg", mode) for mode in ("L", "RGB", "CMYK", "YCbCr")),
    ],
)
def test_modes_of_8_bits_are_converted_by_pillow(tmp_path: Path, end: str, mode: str) -> None:
    source = Image.merge("PA", (RGB.convert("P"), RGB.convert("L"))) if mode == "PA" else RGB.convert(mode)
    options = {"transparency": bytes(range(256))} if mode == "P" and end == "png" else {}
    path = saved(tmp_path / f"a.{end}", source, **options)
    with Image.open(path) as image:
        image.load()
        expected = image.convert("RGB")
    loaded = load_rgb(path)
    assert (loaded.mode, loaded.size, loaded.tobytes()) == ("RGB", RGB.size, expected.tobytes())


def test_grey_with_associated_alpha(tmp_path: Path) -> None:
    rows = np.stack([RAMP // 2, np.full_like(RAMP, 128)], -1).astype(np.uint8).tobytes()
    found = shades(tiff(tmp_path / "a.tif", rows, 8, alpha=True)).astype(int)  # half transparent, so shade × 255 / 128
    assert (np.diff(found) >= 0).all()
    assert found[-1] >= 253


def test_oddities_come_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    pictures.silence_pillow()  # as at import; pytest has put its own filters over that
    load_rgb(saved(tmp_path / "a.png", RGB.quantize(16), transparency=bytes(16)))
    load_rgb(saved(tmp_path / "a.jpg", RGB, exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0garbage"))
    assert not recwarn.list


def test_of_an_animation_the_first_frame_is_read(tmp_path: Path) -> None:
    for end in ("gif", "png", "tif"):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
        path = saved(tmp_path / f"a.{end}", frames[0], save_all=True, append_images=frames[1:])
        assert load_rgb(path).getpixel((4, 4)) == (255, 0, 0)


# --- grey of more than 8 bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["png", "tif", "pgm"])
def test_16_bits_come_out_as_a_ramp(tmp_path: Path, end: str) -> None:
    values = RAMP * 257
    if end == "pgm":
        path = tmp_path / "a.pgm"
        path.write_bytes(b"P5 256 4 65535\n" + values.astype(">u2").tobytes())
    else:
        path = saved(tmp_path / f"a.{end}", Image.fromarray(values.astype(np.uint16)))
    assert shades(path).tolist() == list(range(256))


def test_16_bits_of_a_dark_picture_stay_dark(tmp_path: Path) -> None:
    for path in (tmp_path / "a.png", tmp_path / "a.pgm"):
        Image.fromarray(np.full((4, 256), 300, dtype=np.uint16)).save(path)
        assert set(shades(path).tolist()) == {1}


def test_16_bits_where_zero_is_white(tmp_path: Path) -> None:
    rows = (RAMP * 257).astype("<u2").tobytes()
    assert shades(tiff(tmp_path / "a.tif", rows, 16, white_is_zero=True)).tolist() == list(range(256))[::-1]


def test_12_bits_come_out_as_a_ramp(tmp_path: Path) -> None:
    values = RAMP.reshape(-1, 2) * 4095 // 255  # two numbers stand in three bytes
    packed = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], 1)
    path = tiff(tmp_path / "a.tif", packed.astype(np.uint8).tobytes(), 12)
    assert shades(path).tolist() == list(range(256))


@pytest.mark.parametrize("largest", [1.0, 255.0, 65535.0])
@pytest.mark.parametrize("end", ["tif", "pfm"])
def test_floats_come_out_as_a_ramp(tmp_path: Path, end: str, largest: float) -> None:
    values = (RAMP / 255 * largest).astype(np.float32)
    if end == "pfm":
        (tmp_path / "a.pfm").write_bytes(b"Pf\n256 4\n-1.0\n" + values.tobytes())
    else:
        Image.fromarray(values).save(tmp_path / "a.tif")
    assert shades(tmp_path / f"a.{end}").tolist() == list(range(256))


def test_floats_slightly_beyond_are_cut_off(tmp_path: Path) -> None:
    values = np.linspace(-0.05, 1.05, 256, dtype=np.float32)[None].repeat(4, 0)
    found = shades(saved(tmp_path / "a.tif", Image.fromarray(values)))
    assert (found[0], found[-1]) == (0, 255)
    assert abs(int(found[128]) - 128) <= 1
    assert (np.diff(found.astype(int)) >= 0).all()


@pytest.mark.parametrize("largest", [255, 65535])
def test_32_bits_come_out_as_a_ramp(tmp_path: Path, largest: int) -> None:
    path = saved(tmp_path / "a.tif", Image.fromarray((RAMP * (largest // 255)).astype(np.int32)))
    assert shades(path).tolist() == list(range(256))


def test_signed_16_bits_come_out_as_a_ramp(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", (RAMP * 128).astype("<i2").tobytes(), 16, 2)
    found = shades(path).astype(int)
    assert (np.diff(found) >= 0).all()
    assert found[-1] == 127  # half of 0 … 65535


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0.0, np.nan]], dtype=np.float32), "not finite"),
        (np.array([[0.0, np.inf]], dtype=np.float32), "not finite"),
        (np.array([[-1000.0, 3000.0]], dtype=np.float32), "values from -1000 to 3000"),
        (np.array([[0, 2**31 - 1]], dtype=np.int32), "values from 0 to 2.147"),
    ],
)
def test_values_without_a_range_are_refused(tmp_path: Path, values: np.ndarray, reason: str) -> None:
    path = saved(tmp_path / "a.tif", Image.fromarray(values))
    with pytest.raises(DecodeError, match=reason):
        load_rgb(path)


# --- orientation -----------------------------------------------------------------------------------------------------

TURNS = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_90,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_270,
)
"""What a camera did to the upright picture before it wrote orientation 2, 3 … 8."""


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("end", ["png", "tif", "webp", "jpg"])
def test_exif_orientation(tmp_path: Path, end: str, orientation: int) -> None:
    if end == "webp" and "WEBP" not in FORMATS:
        pytest.skip("Pillow without WebP")
    upright = RGB.resize((8, 8)).resize((64, 96), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 95} if end == "jpg" else {"lossless": True} if end == "webp" else {}
    path = saved(tmp_path / f"a.{end}", upright.transpose(TURNS[orientation - 2]), exif=exif, **options)
    loaded = load_rgb(path)
    assert loaded.size == upright.size
    difference = np.abs(np.asarray(loaded).astype(int) - np.asarray(upright))
    assert difference.mean() < (8 if end == "jpg" else 1e-9)


@pytest.mark.parametrize("orientation", [0, 1, 9, 65535])
def test_other_orientations_and_damaged_exif_change_nothing(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x9003] = "2024:01:01 00:00:00"
    whole = exif.tobytes()
    for data in (whole, whole[:12], b"Exif\0\0garbage", whole[:14] + b"\xff" * (len(whole) - 14)):
        path = saved(tmp_path / "a.jpg", RGB, exif=data)
        with Image.open(path) as image:
            assert load_rgb(path).tobytes() == image.convert("RGB").tobytes()


# --- what cannot be read ---------------------------------------------------------------------------------------------


def test_eps_under_another_name_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    for kind in ("eps", "eps_dos"):
        (tmp_path / "x.jpg").write_bytes(CONTENTS[kind])
        with pytest.raises(DecodeError, match="in none of the formats that are read .JPEG, PNG"):
            load_rgb(tmp_path / "x.jpg")
        assert "in none of the formats" in inspect_files([tmp_path / "x.jpg"]).problems[0]


def special(folder: Path) -> dict[str, str]:
    """Things with a picture's name that are no regular files → the reason."""
    os.mkfifo(folder / "fifo.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "broken.jpg").symlink_to("gone.jpg")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # a socket's path must be short
        try:
            server.bind("socket.jpg")
        finally:
            os.chdir(here)
    reasons = {"fifo.jpg": "a FIFO, not a file", "folder.jpg": "a folder, not a file", "zero.jpg": "a device"}
    reasons |= {"broken.jpg": "not found: a link to gone.jpg", "itself.jpg": "symbolic links", "none.jpg": "not found"}
    return reasons | {"socket.jpg": "", "x" * 300: "too long", "nul\0.jpg": "null"}


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    reasons = special(tmp_path)
    paths = [tmp_path / name for name in reasons]
    with within(10):
        for path, reason in zip(paths, reasons.values(), strict=True):
            with pytest.raises(DecodeError, match=reason):
                load_rgb(path)
        for headers in (True, False):
            found = inspect_files(paths, headers)
            assert found.sizes.tolist() == [-1] * len(paths)
            assert all(reason in found.problems[i] for i, reason in enumerate(reasons.values()))


def test_a_source_names_the_file_and_the_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    source = FileSource(tmp_path, ["x.jpg", "gone.png"], [0, 0], tmp_path / "list.txt", [3, 4])
    with within(10), pytest.raises(BadImage, match=r"cannot read image .*x.jpg \(line 3 of .*list.txt\): a FIFO"):
        source.load(0)
    with pytest.raises(BadImage, match=r"cannot read image .*gone.png \(line 4 of .*list.txt\): not found"):
        source.load(1)


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    path = saved(tmp_path / "a.png", RGB)
    monkeypatch.setattr(os, "open", refuse)  # file modes do not hold for root
    with pytest.raises(DecodeError, match="Permission denied"):
        load_rgb(path)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "AVIF"])
def test_files_that_are_cut_short_are_refused(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / "a", RGB.resize((200, 200)), format=name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(DecodeError):
        load_rgb(path)


def test_a_damaged_header_is_told_from_another_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    with pytest.raises(DecodeError, match="the header of this PNG file is damaged"):
        load_rgb(path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(DecodeError, match="in none of the formats that are read.* begins with b'<html>not"):
        load_rgb(path)
    path.write_bytes(b"")
    with pytest.raises(DecodeError, match="an empty file"):
        load_rgb(path)


@pytest.mark.parametrize("side", [9_600, 20_000, 2**31 - 1])
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path, side: int) -> None:
    buffer = io.BytesIO()
    RGB.save(buffer, "BMP")
    data = bytearray(buffer.getvalue())
    data[18:26] = struct.pack("<ii", side, side)
    (tmp_path / "a.bmp").write_bytes(data)
    with within(10), pytest.raises(DecodeError, match="more than 89,478,485 pixels"):
        load_rgb(tmp_path / "a.bmp")


def test_half_as_many_pixels_where_pillow_needs_twice_the_memory(tmp_path: Path) -> None:
    if "WEBP" not in FORMATS:
        pytest.skip("Pillow without WebP")
    path = saved(tmp_path / "a.webp", RGB, lossless=True)
    data = bytearray(path.read_bytes())
    data[21:25] = struct.pack("<I", (struct.unpack("<I", data[21:25])[0] & 0xF0000000) | (8_000 << 14) | 8_000)
    path.write_bytes(data)
    with within(10), pytest.raises(DecodeError, match="8001 × 8001, more than 44,739,242 pixels"):
        load_rgb(path)
    with path.open("r+b") as file:
        file.truncate(pictures.MAX_BYTES + 1)
    with within(10), pytest.raises(DecodeError, match="larger than 256 MiB"):
        load_rgb(path)


@pytest.mark.parametrize("kind", [name for name in HARD if name.startswith("sparse_")])
def test_ten_gigabytes_of_nothing_take_no_time(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_reads, "MAX_BYTES", 1 << 22)
    monkeypatch.setattr(bounded_reads, "PIXEL_READS", 40_000)
    HARD[kind](tmp_path / "x", Random(2))
    with within(10), suppress(DecodeError):  # a whole picture may come before the zeros
        load_rgb(tmp_path / "x")


def test_a_jpeg_of_very_many_scans_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.jpg", RGB, progressive=True)
    data = path.read_bytes()
    path.write_bytes(data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 300 + data[-2:])
    load_rgb(path)  # with few pixels each scan takes no time
    monkeypatch.setattr(bounded_reads, "SCAN_PIXELS", 300 * RGB.width * RGB.height)
    monkeypatch.setattr(bounded_reads, "BLOCK", 7)
    with pytest.raises(DecodeError, match="a JPEG with more scans than an image can need"):
        load_rgb(path)
    path.write_bytes(data)
    load_rgb(path)


def test_images_that_are_decoded_at_once_have_a_bounded_number_of_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    active: list[int] = []
    most = []

    def slow(image: Image.Image) -> Image.Image:
        active.append(image.width * image.height)
        most.append(sum(active))
        time.sleep(0.002)
        active.remove(image.width * image.height)
        return upright_rgb(image)

    monkeypatch.setattr("tailtune.datasets.images.ordered_map.available_processors", lambda: 8)
    monkeypatch.setattr(decoding_room, "MAX_PIXELS", 3000)
    monkeypatch.setattr(decoding_room, "LARGE_FILE", 2000)
    monkeypatch.setattr(decoding_room, "LARGE_IMAGE", 1000)
    monkeypatch.setattr(pictures, "upright_rgb", slow)
    paths = [saved(tmp_path / f"{side}.bmp", RGB.resize((side, side))) for side in (10, 25, 50, 20)]
    with within(20):
        done = list(decode_many.decode_many(paths * 20, lambda image: image.width))
    assert [each.result for each in done] == [10, 25, 50, 20] * 20
    assert 2500 <= max(most) <= 3000


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    names = []
    for name, data in damaged(seed=2, count=330):
        path = tmp_path / name
        path.write_bytes(data)
        began = time.process_time()
        try:
            assert load_rgb(path).mode == "RGB"
            names.append(name)
        except DecodeError as reason:
            assert str(reason) and "\n" not in str(reason)
        assert time.process_time() - began < 5
    assert 20 < len(names) < 200, "some of the files must be damaged, and some must not"


def test_damaged_files_come_from_the_seed() -> None:
    assert list(damaged(4, 40)) == list(damaged(4, 40)) != list(damaged(5, 40))


# --- one look at all -------------------------------------------------------------------------------------------------


def test_one_look_at_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "FILES_PER_TASK", 7)
    good = saved(tmp_path / "good.png", RGB)
    (tmp_path / "html.jpg").write_text("<html>not found</html>")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "p.jpg").write_bytes(b"P")
    paths = [good] * 50
    paths[8], paths[21], paths[22], paths[49] = (tmp_path / f"{name}.jpg" for name in ("html", "gone", "empty", "p"))
    found = inspect_files(paths)
    assert list(found.problems) == [8, 21, 22, 49]
    assert found.problems[8].endswith("it begins with b'<html>not found<'")
    assert (found.problems[21], found.problems[22]) == ("not found", "an empty file")
    expected = [path.stat().st_size if path.exists() else -1 for path in paths]
    assert (found.sizes.dtype, found.sizes.tolist()) == (np.int64, expected)
    sizes_only = inspect_files(paths, read_headers=False)
    assert sizes_only.sizes.tolist() == expected
    assert list(sizes_only.problems) == [21, 22]
    assert inspect_files([]).sizes.shape == (0,)


def test_the_look_does_not_wait_for_each_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system, where an answer takes milliseconds."""
    file_size = checks.file_size

    def slow(path: Path) -> int:
        time.sleep(0.002)
        return file_size(path)

    monkeypatch.setattr(checks, "file_size", slow)
    monkeypatch.setattr(checks, "FILES_PER_TASK", 10)
    good = saved(tmp_path / "good.png", RGB)
    began = time.perf_counter()
    inspect_files([good] * 1000, read_headers=False)
    assert time.perf_counter() - began < 1  # one after another would be 2 s and more


def test_upright_pictures_agree_with_pillows_own_transposition(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 5
    path = saved(tmp_path / "a.jpg", RGB, exif=exif)
    with Image.open(path) as image:
        assert load_rgb(path).tobytes() == ImageOps.exif_transpose(image).convert("RGB").tobytes()
