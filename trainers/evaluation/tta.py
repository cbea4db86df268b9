"""TEST_TIME: from the images of a batch to the views whose logits are averaged; and predict functions of a method.

The transform that feeds each of them is chosen by `datasets.build_data`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tailtune.configs.errors import lookup
from tailtune.configs.option import option
from tailtune.configs.value_parsers import as_int
from tailtune.datasets.images.transforms import UNMIRRORED, five_crop, ten_crop
from tailtune.trainers.evaluation.inference import Predict
from tailtune.trainers.methods.base import Method
from tailtune.trainers.precision import PRECISIONS, cast_trainable

Cut = Callable[[Tensor | list[Tensor], int], Tensor]
"""Images of a batch, side of the crops → views [V, B, 3, R, R], uint8 on the device."""

AT_ONCE = 5
"""Views of an image in one forward, so that memory does not grow with their number."""


NARROW = 0.8
"""Side of a crop over side of the image, below which it is worth saying. LIFT has 0.9 at 224 pixels, 0.82 at least."""


def warnings_of(mode: str, resolution: int, expand: int, augment: str) -> Iterator[str]:
    """What a reader of a result of `tte` has to know: views that do not look like the images that it was trained on.

    1.5 patches, the default of `expand`, are little of 224 pixels and much of 32. Small images are mostly drawn or cut
    so that the object fills the frame, and a corner of one shows another digit, or none: the embedded CLIP on digits_lt
    loses 16 points with expand 12, 1.4 with 6, and 0.4 with 3.
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
    """Training crops, which the loader drew, [B, V, 3, R, R]."""
    assert isinstance(images, Tensor)
    return images.transpose(0, 1)


TEST_TIME: dict[str, Cut] = {
    "fivecrop": five_crop,
    "tencrop": ten_crop,
    "randaug": drawn,  # LIFT's name; draws of the run's own `augment`, not RandAugment (Cubuk et al. 2020)
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
    )
    expand: int | None = option(
        None,
        "Number of pixels by which the image is larger than its crops, for tte. None means one and a half patches.",
        as_int,
        cls="test",
        least=0,
        most=1024,
    )
    randaug_times: int = option(
        1, "Number of random training crops that tte_mode randaug averages.", cls="test", least=1, most=1000
    )
    test_prec: str = option("fp32", "Arithmetic of evaluation.", cls="test", choices=("fp32", "bf16", "fp64"))


def prepare(method: Method, test_prec: str) -> None:
    """Eval mode, in the arithmetic of `test_prec`."""
    precision = PRECISIONS[test_prec]
    method.eval()
    method.model.set_precision(precision.compute)
    cast_trainable(method, precision.trainable)
    method.model.head.to(precision.trainable)


def plain(method: Method) -> Predict:
    """One centre crop, as the loader cut it."""

    def predict(images: Tensor | list[Tensor]) -> Tensor:
        assert isinstance(images, Tensor)
        return method.expert_logits(images)

    return predict


def logits_of_views(method: Method, views: Tensor) -> Tensor:
    """[A, B, 3, R, R] → [A, B, E, C]."""
    return method.expert_logits(views.flatten(0, 1)).unflatten(0, views.shape[:2])


def separate(method: Method) -> Predict:
    """Every view of an image on its own: [B, V, 3, R, R] → [B, V, E, C]."""

    def predict(images: Tensor | list[Tensor]) -> Tensor:
        assert isinstance(images, Tensor)
        return logits_of_views(method, images)

    return predict


def averaged(method: Method, mode: str, size: int) -> Predict:
    """Mean of the logits over the views of `mode`, an entry of TEST_TIME."""
    cut = lookup(TEST_TIME, mode, "tte_mode")

    def predict(images: Tensor | list[Tensor]) -> Tensor:
        views = cut(images, size)  # [V, B, 3, R, R]
        logits = [logits_of_views(method, some) for some in views.split(AT_ONCE)]
        return torch.cat(logits).nanmean(0)  # of [V, B, E, C]; a view has asked some experts, or all

    return predict
