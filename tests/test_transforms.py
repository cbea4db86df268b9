"""Transforms: torchvision's own pixels, shapes, five and ten crops, repeated draws."""

import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import seeded
from tailtune.datasets.images import fixed_crops, random_steps, transforms

SIZES = [(80, 60), (45, 71), (64, 64)]
BICUBIC = InterpolationMode.BICUBIC
Crop = Callable[..., torch.Tensor]


def photo(size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def same(ours: transforms.Transform, theirs: list[object], image: Image.Image, draw: int = 0) -> bool:
    """Whether our pixels are those of a v1 pipeline under the same draws."""
    reference = v1.Compose([*theirs, v1.PILToTensor()])
    with seeded("test", draw):
        expected = reference(image)
    with seeded("test", draw):
        return torch.equal(ours(image), expected)


@pytest.mark.parametrize("size", SIZES)
def test_deterministic_pixels_are_v1(size: tuple[int, int]) -> None:
    image = photo(size)
    assert same(transforms.unaugmented_transform(32, "bilinear"), [v1.Resize(32), v1.CenterCrop(32)], image)
    assert same(transforms.eval_transform(28, "bilinear", "lift"), [v1.Resize(32), v1.CenterCrop(28)], image)
    assert same(transforms.eval_transform(28, "bicubic", "lift"), [v1.Resize(32, BICUBIC), v1.CenterCrop(28)], image)
    assert same(transforms.resize_for_crops(28, 3, "bilinear"), [v1.Resize(31)], image)


@pytest.mark.parametrize("size", SIZES)
def test_augmented_pixels_are_v1(size: tuple[int, int]) -> None:
    image, flip = photo(size), v1.RandomHorizontalFlip()
    jitter = v1.ColorJitter(0.4, 0.4, 0.4, 0)
    shift = [v1.Resize(32), v1.RandomCrop(32, padding=4), flip, v1.RandomRotation(15)]
    assert same(transforms.train_transform("lift", 32, "bilinear"), [v1.RandomResizedCrop(32), flip], image)
    assert same(transforms.train_transform("imagenet", 32, "bilinear"), [v1.RandomResizedCrop(32), flip, jitter], image)
    assert same(transforms.train_transform("cifar", 32, "bilinear"), shift, image)
    assert same(
        transforms.train_transform("lift", 32, "bicubic"),
        [v1.RandomResizedCrop(32, interpolation=BICUBIC), flip],
        image,
    )


def test_grey_and_blur_of_lgla_on_places() -> None:
    """Its script draws the blur from Python's generator, ours from torch's."""

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2))))

    ours = transforms.train_transform("imagenet_blur", 32, "bilinear")
    steps = [v1.RandomResizedCrop(32), v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.4, 0)], p=1)]
    steps += [v1.RandomGrayscale(p=0.2), v1.RandomApply([blur], p=0.5), v1.RandomHorizontalFlip()]
    assert all(same(ours, steps, photo((45, 71)), draw) for draw in range(40))


@pytest.mark.parametrize("name", ["cifar_auto", "cifar_auto_cutout"])
def test_autoaugment_comes_after_shift_and_flip(name: str) -> None:
    """The policy that was found on CIFAR-10; what it uncovers is grey."""
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=[128] * 3)
    steps = [v1.Resize(32), v1.RandomCrop(32, padding=4), v1.RandomHorizontalFlip(), policy]
    black = [] if name == "cifar_auto" else [random_steps.Cutout(16)]
    for size in SIZES * 4:
        assert same(transforms.train_transform(name, 32, "bilinear"), [*steps, *black], photo(size))


def test_cutout_is_the_plain_formulation() -> None:
    """A square of 16 pixels around any pixel, of which a part may lie outside."""
    image, sizes = Image.new("RGB", (40, 32), "white"), set()
    for seed in range(60):
        with seeded(seed):
            found = np.array(random_steps.Cutout(16)(image))[..., 0]
        with seeded(seed):
            x, y = (int(torch.randint(side, ())) for side in (40, 32))
        expected = np.full((32, 40), 255, dtype=np.uint8)
        expected[max(0, y - 8) : y + 8, max(0, x - 8) : x + 8] = 0
        assert np.array_equal(found, expected)
        sizes.add(int((found == 0).sum()))
    assert max(sizes) == 256 and min(sizes) < 150 and image.getpixel((20, 16)) == (255, 255, 255)


def test_randaugment_draws_from_torch_alone() -> None:
    """timm's code draws from Python and NumPy, whose generators go on as they were."""
    image, transform = photo((80, 60)), transforms.train_transform("imagenet_randaug", 32, "bilinear")
    random.seed(1), np.random.seed(1)
    expected = random.random(), np.random.random()
    found = []
    for seed in (0, 0, 1):
        random.seed(1), np.random.seed(1)
        with seeded(seed):
            found.append(transform(image))
        assert (random.random(), np.random.random()) == expected
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_cifar_image_passes_its_test_transform_unchanged() -> None:
    image = photo((32, 32))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(transforms.eval_transform(32, "bilinear", "cifar")(image), pixels)
    assert not torch.equal(transforms.eval_transform(32, "bilinear", "lift")(image), pixels)


@pytest.mark.parametrize("resolution", [224, 336, 384])
def test_test_resize_of_the_usual_resolutions(resolution: int) -> None:
    assert {224: 256, 336: 384, 384: 438}[resolution] == resolution * 8 // 7
    assert transforms.eval_transform(resolution, "bilinear", "lift")(photo((60, 50))).shape == (
        3,
        resolution,
        resolution,
    )


@pytest.mark.parametrize("name", sorted(transforms.AUGMENTS))
@pytest.mark.parametrize("size", [(8, 8), *SIZES])
def test_every_augmentation_gives_bytes_of_the_resolution(name: str, size: tuple[int, int]) -> None:
    with seeded("test"):
        pixels = transforms.train_transform(name, 24, "bilinear")(photo(size))
    assert pixels.shape == (3, 24, 24)
    assert pixels.dtype == torch.uint8


def test_digits_are_never_mirrored() -> None:
    left = np.zeros((32, 32, 3), dtype=np.uint8)
    left[:, :10] = 255
    digits = transforms.train_transform("digits", 32, "bilinear")
    for draw in range(30):
        with seeded("test", draw):
            pixels = digits(Image.fromarray(left)).float()
        assert pixels[:, :, :16].mean() > pixels[:, :, 16:].mean()


CROPS = [(fixed_crops.five_crop, v1.FiveCrop(28)), (fixed_crops.ten_crop, v1.TenCrop(28))]


@pytest.mark.parametrize(("ours", "theirs"), CROPS)
def test_crops_are_torchvisions(ours: Crop, theirs: Crop) -> None:
    batch = torch.randint(0, 256, (4, 3, 37, 44), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = torch.stack(theirs(batch))
    assert torch.equal(ours(batch, 28), expected)
    assert torch.equal(ours(list(batch), 28), expected)


@pytest.mark.parametrize(("ours", "theirs"), CROPS)
def test_crops_of_images_that_differ_in_size(ours: Crop, theirs: Crop) -> None:
    images = [transforms.resize_for_crops(28, 4, "bilinear")(photo(size)) for size in SIZES]
    crops = ours(images, 28)
    assert crops.shape[1:] == (3, 3, 28, 28)
    for position, image in enumerate(images):
        assert torch.equal(crops[:, position], torch.stack(theirs(image)))
    assert torch.equal(crops[0, 0], images[0][:, :28, :28])
    assert torch.equal(crops[3, 1], images[1][:, -28:, -28:])


def test_the_last_five_of_ten_crops_are_of_the_mirrored_image() -> None:
    image = torch.randint(0, 256, (1, 3, 37, 44), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ten, mirrored = fixed_crops.ten_crop(image, 28), fixed_crops.five_crop(image.flip(-1), 28)
    assert torch.equal(ten[:5], fixed_crops.five_crop(image, 28)) and torch.equal(ten[5:], mirrored)


def test_repeated_draws_are_independent_draws_of_the_transform() -> None:
    single, image = transforms.train_transform("lift", 24, "bilinear"), photo((60, 45))
    several = transforms.repeated(single, 3)
    with seeded("test"):
        expected = torch.stack([single(image) for _ in range(3)])
    with seeded("test"):
        found = pickle.loads(pickle.dumps(several))(image)  # as workers that are spawned get it
    assert torch.equal(found, expected) and not torch.equal(found[0], found[1])


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="unknown augment 'lfit'; did you mean 'lift'"):
        transforms.train_transform("lfit", 32, "bilinear")
    with pytest.raises(UserError, match="unknown interpolation"):
        transforms.unaugmented_transform(32, "nearest")
