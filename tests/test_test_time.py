"""Test-time views: which there are, that their logits are averaged, at most five at once; training images as test."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision import transforms as v1
from yacs.config import CfgNode

from tailtune.configs.seeding import seeded
from tailtune.datasets.build_data import build_data
from tailtune.datasets.images.transforms import eval_transform, resize_for_crops, train_transform
from tailtune.models import build_model
from tailtune.trainers.evaluation.tta import AT_ONCE, TEST_TIME, averaged, plain
from tailtune.trainers.methods import Method, build_method
from tailtune.trainers.option_schema import declared
from tailtune.trainers.run import run

Config = Callable[..., CfgNode]
SIZES = [(40, 36), (36, 50), (36, 36)]


@pytest.fixture
def method(config: Config) -> Method:
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none")
    info = build_data(cfg).info
    return build_method(cfg, build_model(cfg, info.class_names), info).eval()


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def mean_of(method: Method, views: list[Tensor]) -> Tensor:
    """One view of one image at a time, [1, E, C]."""
    return torch.stack([method.expert_logits(view.unsqueeze(0)) for view in views]).mean(0)


def test_the_modes_of_the_option_are_the_tables() -> None:
    assert set(declared()["tte_mode"].choices) == TEST_TIME.keys()


@pytest.mark.parametrize(("mode", "crop"), [("fivecrop", v1.FiveCrop(32)), ("tencrop", v1.TenCrop(32))])
@pytest.mark.parametrize("sizes", [SIZES, SIZES[:1] * 3])
def test_logits_are_the_mean_over_crops(
    mode: str, crop: Callable[..., list[Tensor]], sizes: list[tuple[int, int]], method: Method
) -> None:
    """Of each image on its own, whether the images of the batch are of one size or not."""
    images = [noise(3, *size) for size in sizes]
    alike = len(set(sizes)) == 1
    with torch.no_grad():
        found = averaged(method, mode, 32)(torch.stack(images) if alike else images)
    assert found.shape == (3, 1, 10)
    assert torch.allclose(found, torch.cat([mean_of(method, crop(image)) for image in images]), atol=1e-5)


def test_logits_are_the_mean_over_draws(method: Method) -> None:
    images = noise(2, 7, 3, 32, 32)
    with torch.no_grad():
        found = averaged(method, "randaug", 32)(images)
        assert torch.allclose(averaged(method, "randaug", 32)(images[:, :1]), plain(method)(images[:, 0]), atol=1e-6)
    assert torch.allclose(found, torch.cat([mean_of(method, list(each)) for each in images]), atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "shape", "views"),
    [("fivecrop", (4, 3, 40, 40), 5), ("tencrop", (4, 3, 40, 40), 10), ("randaug", (4, 12, 3, 32, 32), 12)],
)
def test_at_most_five_views_of_an_image_at_once(
    mode: str, shape: tuple[int, ...], views: int, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def recorded(images: Tensor) -> Tensor:
        seen.append(len(images) // 4)
        return torch.zeros(len(images), 2, 10)

    monkeypatch.setattr(method, "expert_logits", recorded)
    assert averaged(method, mode, 32)(noise(*shape)).shape == (4, 2, 10)
    assert sum(seen) == views and max(seen) == AT_ONCE == 5


def test_draws_are_the_training_augmentation_of_each_image(config: Config) -> None:
    """`augment` of the run, drawn anew for every image and always the same for one."""
    words = ("tte", True, "tte_mode", "randaug", "randaug_times", 3)
    for augment in ("lift", "digits"):
        cfg = config("fake_lt", "tiny_clip", *words, "augment", augment)
        view = build_data(cfg).test
        with seeded(cfg.seed, "augment", 0, 3, 0):
            transform = train_transform(augment, 32, "bilinear")
            expected = torch.stack([transform(view.source.load(3)) for _ in range(3)])
        assert torch.equal(view[3]["image"], expected)
        assert not torch.equal(expected[0], expected[1])
    assert torch.equal(view[3]["image"], view[3]["image"]) and view[-1]["image"].shape == (3, 3, 32, 32)
    assert view.batch([3, 4])["image"].shape == (2, 3, 3, 32, 32)


@pytest.mark.parametrize("mode", [None, *TEST_TIME])
def test_training_images_are_tested_through_the_test_transform(
    mode: str | None, config: Config, tmp_path: Path
) -> None:
    """`test_train`, with all views of `tte` too, on images of different sizes."""
    words = ("pretrained", "none", "num_epochs", 0, "test_train", True, "test_batch_size", 7, "max_test_images", 20)
    views = ("tte", True, "tte_mode", mode, "randaug_times", 6) if mode else ()
    views = (*views, "image_backend", "pil")
    cfg = config("fake_lt", "tiny_clip", *words, *views, "output_dir", str(tmp_path / "run"))
    data = build_data(cfg)
    found = load_file(run(cfg) / "logits.safetensors")
    assert len(data.train_as_test) == 20 and torch.equal(found["labels"], data.train_as_test.labels)
    assert not torch.equal(found["labels"], data.test.labels[:20])
    transform = eval_transform(32, "bilinear", "lift") if mode is None else resize_for_crops(32, cfg.expand, "bilinear")
    view = data.train_as_test
    for index in range(5):
        image = view.source.load(int(view.indices[index]))
        if mode == "randaug":
            assert view[index]["image"].shape == (6, 3, 32, 32)
        else:
            assert torch.equal(view[index]["image"], transform(image))
