"""TEST_TIME: test-time augmentation, which averages the logits of several views of each test image.

The module also makes the predict functions of a method. `datasets.build_data` chooses the image transform that fits the
mode.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tailtune.configs.errors import lookup
from tailtune.configs.option import option
from tailtune.configs.value_parsers import as_int
from tailtune.datasets.images.fixed_crops import five_crop, ten_crop
from tailtune.datasets.images.transforms import UNMIRRORED
from tailtune.trainers.evaluation.inference import Predict
from tailtune.trainers.methods.base import Method
from tailtune.trainers.precision import PRECISIONS, cast_trainable

Cut = Callable[[Tensor | list[Tensor], int], Tensor]
"""(images of a batch, side R of the crops in pixels) → views [V, B, 3, R, R], uint8 on the device."""

AT_ONCE = 5
"""Number of views of an image in one forward pass. It bounds the memory, however many views there are."""


NARROW = 0.8
"""If the side of a crop is less than this share of the image's side, a warning is given. In LIFT the share is 0.9 at
224 pixels and never below 0.82."""


def warnings_of(mode: str, resolution: int, expand: int, augment: str) -> Iterator[str]:
    """Warnings about views of `tte` that look different from the training images.

    The default of `expand`, 1.5 patches, is a small margin for images of 224 pixels and a large one for 32 pixels. In
    small images the object often fills the frame, so that a corner crop cuts it off. On digits_lt, the embedded CLIP
    loses 16 percentage points of accuracy with expand 12, 1.4 with 6, and 0.4 with 3.

    Args:
        mode: entry of TEST_TIME.
        resolution: side of the crops, in pixels.
        expand: number of pixels by which the image is larger than its crops.
        augment: name of the training transform.
    """
    share = resolution / (resolution + expand)
    if mode != "randaug" and share < NARROW:
        yield (
            f"tte cuts crops of {resolution} pixels from {resolution + expand} (expand {expand}), so each shows only "
            f"{share * share:.0%} of the image; where the object fills the frame that costs accuracy: compare with "
            f"tte False, or set expand {max(1, round(resolution * 24 / 224))}, LIFT's share"
        )
    if mode == "tencrop" and augment in UNMIRRORED:
        yield f"tte_mode tencrop mirrors images, which augment {augment} never does; tte_mode fivecrop does not"


def drawn(images: Tensor | list[Tensor], size: int) -> Tensor:
    """Random training crops, which the loader has already made: [B, V, 3, R, R] → [V, B, 3, R, R]."""
    assert isinstance(images, Tensor)
    return images.transpose(0, 1)


TEST_TIME: dict[str, Cut] = {
    "fivecrop": five_crop,
    "tencrop": ten_crop,
    "randaug": drawn,  # LIFT's name. The crops are made by the run's `augment`, not by RandAugment (Cubuk et al. 2020)
}


@dataclass(frozen=True)
class TestTimeOptions:
    """Views of a test image, and the arithmetic of their logits."""

    tte: bool = option(
        False, "The logits of several views of a test image are averaged.", aliases=("test_ensemble",), cls="test"
    )
    tte_mode: str = option(
        "fivecrop",
        "Views that tte averages: corners and centre (fivecrop), the same also mirrored (tencrop), or random training "
        "crops (randaug).",
        cls="test",
        choices=tuple(TEST_TIME),
        read_with=("tte",),
    )
    expand: int | None = option(
        None,
        "Number of pixels by which the image is larger than its crops, for tte. None means one and a half patches.",
        as_int,
        cls="test",
        least=0,
        most=1024,
        read_with=("tte",),
    )
    randaug_times: int = option(
        1,
        "Number of random training crops that tte_mode randaug averages.",
        cls="test",
        least=1,
        most=1000,
        read_with=("tte",),
    )
    test_prec: str = option("fp32", "Arithmetic of evaluation.", cls="test", choices=("fp32", "bf16", "fp64"))


def prepare(method: Method, test_prec: str) -> None:
    """Put a method into eval mode and into the arithmetic of `test_prec`, an entry of PRECISIONS."""
    precision = PRECISIONS[test_prec]
    method.eval()
    method.model.set_precision(precision.compute)
    cast_trainable(method, precision.trainable)
    method.model.head.to(precision.trainable)


def plain(method: Method) -> Predict:
    """Predict one centre crop of each image, which the loader has made: [B, 3, R, R] → [B, E, C]."""

    def predict(images: Tensor | list[Tensor]) -> Tensor:
        return method.expert_logits(cast(Tensor, images))  # a list if the method has several `parts`

    return predict


def logits_of_views(method: Method, views: Tensor) -> Tensor:
    """Expert logits of views [A, B, 3, R, R], computed as one batch: [A, B, E, C]."""
    return method.expert_logits(views.flatten(0, 1)).unflatten(0, views.shape[:2])


def separate(method: Method) -> Predict:
    """Predict every view of an image separately: [B, V, 3, R, R] → [B, V, E, C]."""

    def predict(images: Tensor | list[Tensor]) -> Tensor:
        assert isinstance(images, Tensor)
        return logits_of_views(method, images)

    return predict


def averaged(method: Method, mode: str, size: int) -> Predict:
    """Predict the mean of the expert logits over the views of an image: images of a batch → [B, E, C].

    Args:
        method: the trained method, in eval mode.
        mode: entry of TEST_TIME.
        size: side R of the crops, in pixels.
    """
    cut = lookup(TEST_TIME, mode, "tte_mode")

    def predict(images: Tensor | list[Tensor]) -> Tensor:
        views = cut(images, size)  # [V, B, 3, R, R]
        logits = [logits_of_views(method, part) for part in views.split(AT_ONCE)]
        return torch.cat(logits).nanmean(0)  # of [V, B, E, C]; NaN where an expert did not predict a view

    return predict
