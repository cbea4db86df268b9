"""What test-time learning sees of a test image: SADE's views, two draws an image and new ones each epoch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms as v1
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import seeded
from tailtune.datasets.build_data import build_data, build_info
from tailtune.datasets.images import transforms
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.trainers.option_schema import declared

Config = Callable[..., CfgNode]
DEFAULTS = declared().defaults
DEFAULTS |= {"data": "mine", "dataset": "Fake", "num_classes": 4, "resolution": 28, "interpolation": "bilinear"}
DEFAULTS |= {"adapt_views": "sade_cifar"}


def fake(**values: Any) -> CfgNode:
    assert set(values) <= set(DEFAULTS)
    cfg = CfgNode(DEFAULTS | values)
    cfg.freeze()
    return cfg


def photo(size: tuple[int, int] = (60, 45)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def blur(image: Image.Image) -> Image.Image:
    """SADE's, which draws from Python's generator, by torch's."""
    return image.filter(ImageFilter.GaussianBlur(radius=float(torch.empty(()).uniform_(0.1, 2))))


def original(crop: list[object], share: float) -> v1.Compose:
    """The views of SADE's scripts, up to the tensor."""
    jitter = v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    rest = [jitter, v1.RandomGrayscale(p=0.2), v1.RandomApply([blur], p=share), v1.RandomHorizontalFlip()]
    return v1.Compose([*crop, *rest, v1.PILToTensor()])


ORIGINALS = {
    "sade_cifar": original([v1.RandomCrop(32, padding=4)], 0.2),
    "sade_imagenet": original([v1.RandomResizedCrop(32, scale=(0.2, 1.0))], 0.5),
    "sade_inat": original([v1.RandomResizedCrop(32)], 0.5),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_views_are_those_of_sade(name: str) -> None:
    image = photo((32, 32) if name == "sade_cifar" else (60, 45))
    ours = transforms.train_transform(name, 32, "bilinear")
    for draw in range(60):
        with seeded("views", draw):
            expected = ORIGINALS[name](image)
        with seeded("views", draw):
            assert torch.equal(ours(image), expected)


@pytest.mark.parametrize(("name", "share"), [("sade_cifar", 0.2), ("sade_imagenet", 0.5), ("sade_inat", 0.5)])
def test_shares_of_what_is_drawn(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sigmas: list[float] = []
    filtered = ImageFilter.GaussianBlur
    monkeypatch.setattr(ImageFilter, "GaussianBlur", lambda sigma: sigmas.append(sigma) or filtered(sigma))
    view, image = transforms.train_transform(name, 8, "bilinear"), photo((8, 8))
    with seeded("shares"):
        grey = [bool((pixels == pixels[:1]).all()) for pixels in (view(image) for _ in range(1000))]
    assert abs(len(sigmas) / 1000 - share) < 0.05 and abs(np.mean(grey) - 0.2) < 0.05
    assert 0.1 <= min(sigmas) < 0.2 and 1.9 < max(sigmas) <= 2.0


def views(cfg: CfgNode, epoch: int, workers: int = 0, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    batches = list(eval_loader(build_data(cfg).test_views, 8, workers, rank, world, epoch=epoch))
    return {key: torch.cat([batch[key] for batch in batches]) for key in ("image", "label", "index", "weight")}


def test_two_views_of_every_test_image_that_are_new_each_epoch() -> None:
    data, first, again, later = build_data(fake()), views(fake(), 0), views(fake(), 0), views(fake(), 1)
    images = first["image"]
    assert images.shape == (40, 2, 3, 28, 28) and images.dtype == torch.uint8
    assert torch.equal(first["label"], data.test.labels) and first["index"].tolist() == list(range(40))
    assert torch.equal(images, again["image"])
    for a, b in ((images[:, 0], images[:, 1]), (images, later["image"])):
        assert all(not torch.equal(one, other) for one, other in zip(a, b, strict=True))
    others = views(fake(adapt_seed=1), 0)["image"], views(fake(adapt_views="sade_imagenet"), 0)["image"]
    assert not any(torch.equal(images, each) for each in others)
    assert torch.equal(images, views(fake(seed=1), 0)["image"])  # of the test, not of the training
    direct = data.test_views[3, 1]["image"]
    assert torch.equal(direct, later["image"][3])


@pytest.mark.parametrize(("workers", "world"), [(2, 1), (0, 3)])
def test_views_depend_on_neither_workers_nor_processes(workers: int, world: int) -> None:
    expected, found = views(fake(), 2)["image"], torch.zeros(40, 2, 3, 28, 28, dtype=torch.uint8)
    for rank in range(world):
        part = views(fake(), 2, workers, rank, world)
        real = part["index"] >= 0
        assert len(real) == -(-40 // world) and torch.equal(part["weight"], real.float())
        found[part["index"][real]] = part["image"][real]
    assert torch.equal(found, expected)


def test_views_are_of_the_images_that_are_evaluated() -> None:
    data = build_data(fake(max_test_images=7))
    assert torch.equal(data.test_views.labels, data.test.labels) and len(data.test_views) == 7
    assert data.test_views.indices.tolist() == data.test.indices.tolist()


def test_the_test_itself_has_no_epochs() -> None:
    data = build_data(fake())
    first, later = (next(iter(eval_loader(data.test, 40, 0, epoch=epoch)))["image"] for epoch in (0, 3))
    assert torch.equal(first, later)


def test_unknown_views_are_refused_without_images() -> None:
    with pytest.raises(UserError, match="unknown adapt_views 'sade_cifer'; did you mean 'sade_cifar'"):
        build_info(fake(adapt_views="sade_cifer"))


RECIPES = {
    "cifar100_ir100": ("sade_cifar", 0.1, 5e-4, 0.0),
    "cifar10_ir10": ("sade_cifar", 0.1, 5e-4, 0.0),
    "imagenet_lt": ("sade_imagenet", 0.025, 5e-4, 0.0),
    "places_lt": ("sade_imagenet", 0.01, 4e-4, 0.0),
    "inat2018": ("sade_inat", 0.2, 2e-4, 0.01),
    "inat2018_g": ("sade_inat", 0.2, 2e-4, 0.01),
    "digits_lt": ("digits", 0.1, 5e-4, 0.0),
    "fake_lt": ("sade_cifar", 0.1, 5e-4, 0.0),
}
"""Views, learning rate, weight decay and factor of the entropy; a digit in a mirror is none."""


@pytest.mark.parametrize("data", RECIPES)
def test_shipped_recipes(data: str, config: Config) -> None:
    cfg = config(data, "tiny_clip")
    assert (cfg.adapt_views, cfg.adapt_lr, cfg.adapt_weight_decay, cfg.adapt_entropy) == RECIPES[data]
    assert cfg.adapt_epochs == 5 and cfg.adapt_batch_size == 128
