"""Images that torchvision decodes and torch changes in batches: the pixels of Pillow, whatever a batch holds."""

import io
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz.pictures import damaged, pictures
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_data, build_info
from tailtune.datasets.images import random_changes as changes
from tailtune.datasets.images import tensor_transforms as tensors
from tailtune.datasets.images import transforms
from tailtune.datasets.images.draws import uniform_draws
from tailtune.datasets.images.image_files import DecodeError, decode_rgb, load_rgb
from tailtune.datasets.images.tensor_decode import decode_pixels, plain_jpeg_pixels
from tailtune.datasets.images.tensor_transforms import TENSOR_AUGMENTS, TensorTransform
from tailtune.datasets.run_transforms import RunTransforms
from tailtune.datasets.sources.image_sources import ArraySource, FileSource
from tailtune.datasets.view import PADDING, View

pytestmark = pytest.mark.filterwarnings("ignore:.*::PIL")
Config = Callable[..., CfgNode]
MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """Looks like a photograph to a resize: large and small structures, and steep edges."""
    values = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST)


def difference(one: Tensor, other: Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "content"), pictures(), ids=[name for name, _ in pictures()])
def test_every_format_decodes_to_the_pixels_of_pillow(name: str, content: bytes) -> None:
    expected = tv.pil_to_tensor(decode_rgb(io.BytesIO(content)))
    assert torch.equal(decode_pixels(io.BytesIO(content)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotation_by_exif(orientation: int) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    smooth(24, 40).save(file, "JPEG", exif=exif)
    assert torch.equal(decode_pixels(file), tv.pil_to_tensor(decode_rgb(file)))
    assert bool(plain_jpeg_pixels(file.getvalue())) == (orientation == 1)


def exif_data(**tags: int) -> bytes:
    exif = Image.Exif()
    exif[0x9003] = "2024:01:01 00:00:00"
    exif.update({int(name.removeprefix("t"), 16): value for name, value in tags.items()})
    return exif.tobytes()


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


@pytest.mark.parametrize(
    ("exif", "xmp", "plain"),
    [
        (exif_data(), None, True),
        (exif_data(t0112=0), b"<x:xmpmeta/>", True),
        (exif_data(), XMP % 1, True),
        (b"Exif\0\0damaged", None, False),
        (exif_data(), XMP % 6, False),
        (None, XMP % 6, False),
    ],
)
def test_data_of_a_camera(exif: bytes | None, xmp: bytes | None, plain: bool) -> None:
    file = io.BytesIO()
    smooth(24, 40).save(file, "JPEG", **{"exif": exif} if exif else {}, **{"xmp": xmp} if xmp else {})
    assert bool(plain_jpeg_pixels(file.getvalue())) == plain
    assert torch.equal(decode_pixels(file), tv.pil_to_tensor(decode_rgb(file)))


def test_exif_data_in_two_segments_are_left_to_pillow() -> None:
    file = io.BytesIO()
    smooth(24, 40).save(file, "JPEG", exif=exif_data())
    content = file.getvalue()
    start = content.index(b"\xff\xe1")
    segment = content[start : start + 2 + int.from_bytes(content[start + 2 : start + 4])]
    assert plain_jpeg_pixels(content)
    assert not plain_jpeg_pixels(content[:start] + segment + content[start:])


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"optimize": True, "quality": 30}, {"subsampling": 0}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_jpeg_is_decoded_by_torchvision(
    settings: dict[str, object], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    smooth(50, 70).convert(mode).save(file, "JPEG", **settings)
    assert plain_jpeg_pixels(file.getvalue()) == 50 * 70
    expected = tv.pil_to_tensor(decode_rgb(file))
    monkeypatch.setattr("tailtune.datasets.images.tensor_decode.open_image", None)
    assert torch.equal(decode_pixels(file), expected)


def test_what_goes_to_pillow() -> None:
    cmyk, exif = io.BytesIO(), io.BytesIO()
    smooth(8, 8).convert("CMYK").save(cmyk, "JPEG")
    smooth(8, 8).save(exif, "JPEG", exif=Image.Exif())
    bomb = bytearray(exif.getvalue())
    frame = bomb.index(b"\xff\xc0")
    bomb[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    for content in (cmyk.getvalue(), b"", b"\xff\xd8", b"\xff\xd8\xff", b"PNG", bytes(bomb)):
        assert not plain_jpeg_pixels(content)
    with pytest.raises(DecodeError, match="pixels: make it smaller"):
        decode_pixels(io.BytesIO(bytes(bomb)))


def test_a_comment_cannot_pass_for_the_frame() -> None:
    """A parser that does not know fill bytes jumps into the comment, and finds a frame of 8 × 8 pixels there."""
    file = io.BytesIO()
    Image.new("L", (12000, 12000)).save(file, "JPEG")
    jumps_over = 0xE205  # length that such a parser reads after the fill byte
    start = bytearray(b"\xff\xd8\xff\xff\xe2\x05\x00" + bytes(0x500 - 2) + b"\xff\xfe\xf0\x00" + bytes(0xF000 - 2))
    start[4 + jumps_over : 4 + jumps_over + 10] = b"\xff\xc0\x00\x11\x08\x00\x08\x00\x08\x03"
    content = bytes(start) + file.getvalue()[2:]
    assert plain_jpeg_pixels(content) == 0
    with pytest.raises(DecodeError, match="12000 × 12000, more than .* pixels: make it smaller"):
        decode_pixels(io.BytesIO(content))


def test_what_follows_the_frame_is_looked_at_too() -> None:
    file, exif, rotated = io.BytesIO(), Image.Exif(), io.BytesIO()
    smooth(24, 40).save(file, "JPEG")
    exif[0x0112] = 6
    smooth(24, 40).save(rotated, "JPEG", exif=exif)
    content, place = file.getvalue(), file.getvalue().index(b"\xff\xc4")
    begin = rotated.getvalue().index(b"\xff\xe1")
    end = begin + 2 + int.from_bytes(rotated.getvalue()[begin + 2 : begin + 4])
    late = content[:place] + rotated.getvalue()[begin:end] + content[place:]
    assert decode_pixels(io.BytesIO(late)).shape == (3, 40, 24)
    with pytest.raises(DecodeError, match="the header of this JPEG file is damaged"):
        decode_pixels(io.BytesIO(content[:place] + b"\xff\x01" + content[place:]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_that_is_much_too_long_is_refused(kind: str) -> None:
    """Resized to 224 pixels, a line of 60,000 pixels would take 12 GB."""
    for size in ((1, 60_000), (60_000, 1), (10, 5001)):
        file = io.BytesIO()
        Image.new("RGB", size).save(file, kind)
        for decode in (decode_pixels, decode_rgb):
            with pytest.raises(DecodeError, match="more than 500 times as long as wide: crop it"):
                decode(file)
    Image.new("RGB", (10, 5000)).save(file := io.BytesIO(), kind)
    assert decode_pixels(file).shape == (3, 5000, 10)


def test_damaged_files_fail_as_with_pillow(tmp_path: Path) -> None:
    """What Pillow refuses is refused with the same reason; what it reads may differ where a JPEG is broken."""
    refused = 0
    for name, content in damaged(5, 300):
        path = tmp_path / name
        path.write_bytes(content)
        try:
            expected = tv.pil_to_tensor(load_rgb(path))
        except DecodeError as error:
            refused += 1
            with pytest.raises(DecodeError) as found, path.open("rb") as file:
                decode_pixels(file)
            assert str(found.value) == str(error), name
            continue
        with path.open("rb") as file:
            assert torch.equal(decode_pixels(file), expected), name
    assert 50 < refused < 290


# --- transforms ------------------------------------------------------------------------------------------------------


def resized(image: Image.Image, height: int, width: int, mode: str) -> Tensor:
    """By Pillow, the width first, as its versions before 13 do."""
    image = image.resize((width, image.height), MODES[mode])
    return tv.pil_to_tensor(image.resize((width, height), MODES[mode]))


@pytest.mark.parametrize("mode", MODES)
def test_crops_are_those_of_pillow(mode: str) -> None:
    draws = torch.from_numpy(uniform_draws(3, np.arange(24)[:, None], 22))
    for number, (height, width) in enumerate([(375, 500), (500, 333), (61, 47), (300, 224), (224, 224), (20, 900)] * 4):
        image = smooth(height, width, number)
        numbers = draws[number : number + 1]
        found = changes.resized_crops(tv.pil_to_tensor(image)[None], numbers, 224, mode, 0.08)[0]
        top, left, h, w = changes.crop_box(height, width, numbers[0].tolist(), 0.08)
        expected = resized(image.crop((left, top, left + w, top + h)), 224, 224, mode)
        assert difference(found, expected) <= (1 if mode == "bilinear" else 2), (height, width)
        assert float(((found.int() - expected.int()).abs() > 1).float().mean()) < 1e-4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(375, 500), (500, 375), (40, 41), (32, 32), (8, 8), (224, 224)])
def test_transforms_without_draws_are_those_of_pillow(mode: str, size: tuple[int, int]) -> None:
    image = smooth(*size)
    batch = tv.pil_to_tensor(image)[None]
    pairs = [
        (tensors.eval_transform(64, mode, "lift"), transforms.eval_transform(64, mode, "lift")),
        (tensors.eval_transform(32, mode, "cifar"), transforms.eval_transform(32, mode, "cifar")),
        (tensors.unaugmented_transform(64, mode), transforms.unaugmented_transform(64, mode)),
        (tensors.resize_for_crops(64, 12, mode), transforms.resize_for_crops(64, 12, mode)),
    ]
    for ours, pillow in pairs:
        found, expected = ours.prepare(batch)[0], pillow(image)
        assert found.shape == expected.shape
        # The order of the two passes of a resize depends on Pillow's version; it matters where bicubic overshoots.
        assert difference(found, expected) <= (1 if mode == "bilinear" else 30)
        assert float((found.int() - expected.int()).abs().float().mean()) < 0.15


def test_small_images_change_exactly_as_with_pillow() -> None:
    images, draws = noise(40, 3, 32, 32), torch.from_numpy(uniform_draws(7, np.arange(40)[:, None], 4))
    cut = changes.shifted(images, draws[:, :2], 32)
    flipped = changes.mirrored(cut.clone(), draws[:, 2:3].float())
    turned = changes.rotated(flipped, draws[:, 3:].float(), 15)
    for number, image in enumerate(images):
        top, left = (int(draw * 9) for draw in draws[number, :2])
        expected = tv.pad(tv.to_pil_image(image), [4, 4, 4, 4]).crop((left, top, left + 32, top + 32))
        expected = tv.horizontal_flip(expected) if draws[number, 2] < 0.5 else expected
        expected = tv.rotate(expected, float(2 * draws[number, 3].float() - 1) * 15)
        differs = (turned[number] != tv.pil_to_tensor(expected)).any(0).float().mean()
        assert float(differs) <= 2 / 32**2, "a pixel may come from exactly between two others"


def test_affine_changes_are_those_of_torchvision() -> None:
    images, draws = noise(20, 3, 28, 28), torch.from_numpy(uniform_draws(9, np.arange(20)[:, None], 4)).float()
    found = changes.moved(images, draws, 10, 0.1, 0.1)
    for image, numbers, ours in zip(images, (2 * draws - 1).tolist(), found, strict=True):
        shift = [round(numbers[1] * 2.8), round(numbers[2] * 2.8)]
        angle, scale = numbers[0] * 10, 1 + numbers[3] * 0.1
        expected = tv.affine(image, angle, shift, scale, [0.0, 0.0], InterpolationMode.BILINEAR)
        assert difference(ours, expected) <= 1


def test_colours_are_those_of_pillow() -> None:
    images, draws = noise(40, 3, 16, 24), torch.from_numpy(uniform_draws(8, np.arange(40)[:, None], 4)).float()
    found = changes.jittered(images, draws, 0.4)
    kinds = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for image, numbers, ours in zip(images, draws, found, strict=True):
        expected = tv.to_pil_image(image)
        for kind in [*permutations(range(3))][int(numbers[3] * 6)]:
            expected = kinds[kind](expected, float(1 + (2 * numbers[kind] - 1) * 0.4))
        assert difference(ours, tv.pil_to_tensor(expected)) <= 1
    assert changes.jittered(images, torch.ones(40, 4), 0.4).shape == images.shape, "in fp32 a draw may be 1"


def test_grey_and_blur_are_those_of_pillow() -> None:
    """Of standard deviations between one that changes nothing and boxes of five pixels. Only ties differ."""
    images, shares = noise(20, 3, 19, 24), torch.linspace(0, 0.99, 20)
    photos = [tv.to_pil_image(image) for image in images]
    grey = torch.stack([tv.pil_to_tensor(tv.rgb_to_grayscale(picture, 3)) for picture in photos])
    blurs = [ImageFilter.GaussianBlur(2 * share) for share in shares.tolist()]
    soft = torch.stack([tv.pil_to_tensor(one.filter(blur)) for one, blur in zip(photos, blurs, strict=True)])
    chosen, spared = (torch.stack([torch.full((20,), draw), shares], 1) for draw in (0.4, 0.6))
    found = changes.blurred(images, chosen, 0.5, (0, 2))
    assert difference(found, soft) <= 1 and float((found != soft).float().mean()) < 0.01
    assert difference(changes.greyed(images, chosen[:, :1], 0.5), grey) <= 1
    assert torch.equal(changes.greyed(images, spared[:, :1], 0.5), images)
    assert torch.equal(changes.blurred(images, spared, 0.5, (0.1, 2)), images)


@pytest.mark.parametrize("augment", TENSOR_AUGMENTS)
def test_changes_on_a_device_read_no_value(augment: str) -> None:
    """The meta device has no values to read, so a change that would make a GPU wait fails there."""
    transform = TENSOR_AUGMENTS[augment](32, "bilinear")
    images = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="meta")
    draws = torch.empty(4, transform.draws - transform.cut_draws, device="meta")
    assert transform.on_device(images, draws).shape == images.shape


def test_mirrored_on_a_device_and_in_place() -> None:
    images, draws = noise(9, 3, 6, 5), torch.rand(9, 1, generator=torch.Generator().manual_seed(2))
    expected = torch.where(draws[:, :, None, None] < 0.5, images.flip(-1), images)
    assert torch.equal(changes.mirrored(images, draws), expected)


def test_crops_have_the_distribution_of_torchvision() -> None:
    from torchvision.transforms.v2 import RandomResizedCrop

    torch.manual_seed(0)
    crop, image = RandomResizedCrop(32), torch.zeros(3, 90, 140, dtype=torch.uint8)
    theirs = [crop.make_params([image]) for _ in range(4000)]
    expected = np.array([[box["top"], box["left"], box["height"], box["width"]] for box in theirs])
    draws = uniform_draws(1, np.arange(4000)[:, None], 22)
    found = np.array([changes.crop_box(90, 140, row, 0.08) for row in draws.tolist()])
    assert (abs(found.mean(0) - expected.mean(0)) < 4 * expected.std(0) / 4000**0.5 * 1.5).all()
    assert abs(found.std(0) / expected.std(0) - 1).max() < 0.06
    assert (found[:, 0] + found[:, 2] <= 90).all() and (found[:, 1] + found[:, 3] <= 140).all()


def test_draws_are_uniform_and_independent() -> None:
    keys = np.stack(np.meshgrid(np.arange(2), np.arange(4000), np.arange(-1, 1), indexing="ij"), -1).reshape(-1, 3)
    draws = uniform_draws(3, keys, 6)
    assert draws.min() >= 0 and draws.max() < 1 and len(np.unique(draws)) == draws.size
    assert abs(draws.mean(0) - 0.5).max() < 0.01 and abs(draws.var(0) * 12 - 1).max() < 0.03
    assert abs(np.corrcoef(draws.T) - np.eye(6)).max() < 0.03
    assert abs(np.corrcoef(draws[:-1].T, draws[1:].T)[:6, 6:]).max() < 0.03
    assert np.array_equal(uniform_draws(3, keys[5:7], 6), draws[5:7]) and not (uniform_draws(4, keys, 6) == draws).any()


def test_every_augmentation_has_a_tensor_version_but_those_of_other_libraries() -> None:
    """Pillow makes the views of SADE, AutoAugment and RandAugment."""
    by_pillow = {"sade_cifar", "sade_imagenet", "sade_inat"}
    by_pillow |= {"cifar_auto", "cifar_auto_cutout", "imagenet_randaug", "inat_randaug"}
    assert transforms.AUGMENTS.keys() - TENSOR_AUGMENTS.keys() == by_pillow
    assert TENSOR_AUGMENTS.keys() <= transforms.AUGMENTS.keys()


# --- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", TENSOR_AUGMENTS)
def test_an_image_does_not_depend_on_the_others_of_its_batch(augment: str) -> None:
    images = noise(12, 40, 40, 3).numpy()
    transform = TENSOR_AUGMENTS[augment](32, "bilinear")
    source = ArraySource(images, np.arange(12) % 3, "images")
    stacked, alone = (View(each, np.arange(12)[::-1].copy(), transform, seed=2) for each in (source, Listed(images)))
    keys = [(3, 0, 0), (5, 1, 0), (3, 0, 1), (PADDING, 0, 0), (3, 1, 0), (11, 2, -1)]
    together = stacked.finish(stacked.batch(keys))
    assert together["image"].shape == (6, 3, 32, 32) and together["image"].dtype == torch.uint8
    assert together["weight"].tolist() == [1, 1, 1, 0, 1, 1] and not together["image"][3].any()
    assert together["index"].tolist() == [3, 5, 3, PADDING, 3, 11] and together["label"].tolist() == [2, 0, 2, 0, 2, 0]
    for number, key in enumerate(keys):
        assert torch.equal(stacked[key]["image"], together["image"][number])
        assert torch.equal(alone[key]["image"], together["image"][number])
    if augment not in ("none", "whole"):
        assert len({image.numpy().tobytes() for image in together["image"]}) == 6


class Listed(ArraySource):
    """Images in memory whose sizes may differ, so that each is handled by itself."""

    def __init__(self, images: np.ndarray) -> None:
        super().__init__(list(images), np.arange(len(images)) % 3, "images")


def test_pairs_have_draws_of_their_own() -> None:
    source = ArraySource(noise(6, 32, 32, 3).numpy(), np.arange(6), "images")
    view = View(source, np.arange(6), TENSOR_AUGMENTS["cifar"](32, "bilinear"))
    batch = view.finish(view.batch([(1, 2, 0, 1, -1), (4, 2, 0, 5, -1)]))
    assert batch["label"].tolist() == [1, 4] and batch["partner_label"].tolist() == [1, 5]
    assert batch.keys() == {"image", "partner", "partner_label", "label", "index", "weight"}
    assert not torch.equal(batch["image"][0], batch["partner"][0])
    assert torch.equal(batch["partner"][1], view[5, 2, -1]["image"])


def test_files_of_different_sizes_and_unreadable_ones(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(5)]
    for number, name in enumerate(names):
        smooth(40 + number, 60 - number, number).save(tmp_path / name)
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:300])
    source = FileSource(tmp_path, names, np.arange(5))
    view = View(source, np.arange(5), TENSOR_AUGMENTS["imagenet"](32, "bicubic"), skip_bad=True)
    view.timed = True
    batch = view.finish(view.batch(range(5)))
    assert batch["weight"].tolist() == [1, 1, 1, 0, 1] and not batch["image"][3].any()
    assert (batch["seconds"] > 0).all() and batch["seconds"].shape == (3,)
    view.skip_bad = False
    with pytest.raises(UserError, match=r"cannot read image .*3\.jpg"):
        view.batch([2, 3])


def test_the_option_chooses_the_library(config: Config) -> None:
    words = ("pretrained", "none", "num_workers", 0)
    words = ("digits_lt", "tiny_clip_peft", *words, "image_backend")
    ours, pillow = (config(*words, each) for each in ("torchvision", "pil"))
    assert isinstance(RunTransforms.of(ours).train, TensorTransform)
    assert not isinstance(RunTransforms.of(pillow).train, TensorTransform)
    assert not isinstance(RunTransforms.of(ours).adapt, TensorTransform)
    one, other = (build_data(cfg).test[3]["image"] for cfg in (ours, pillow))
    assert difference(one, other) <= 1
    with pytest.raises(UserError, match="cache ram keeps tensors, but image_backend pil works on Pillow images"):
        build_info(config(*words, "pil", "cache", "ram"))
    with pytest.raises(UserError, match="cache disk keeps tensors, but augment sade_cifar works on Pillow images"):
        build_info(config(*words, "torchvision", "cache", "disk", "augment", "sade_cifar"))
