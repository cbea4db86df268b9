"""Test-time views: from a method to a predict function."""

from torch import Tensor

from datasets.transforms import five_crop
from trainers.evaluator import Predict
from trainers.methods.base import Method


def plain(method: Method) -> Predict:
    """One centre crop, as the loader cut it."""

    def predict(images: Tensor | list[Tensor]) -> Tensor:
        assert isinstance(images, Tensor)
        return method.expert_logits(images)

    return predict


def five_crops(method: Method, size: int) -> Predict:
    """Mean of the logits of four corners and the centre, cut on the device from one resized image each."""

    def predict(images: Tensor | list[Tensor]) -> Tensor:
        crops = five_crop(images, size)  # [5, B, 3, R, R]
        return method.expert_logits(crops.flatten(0, 1)).unflatten(0, crops.shape[:2]).mean(0)

    return predict
