"""Views whose batches have features that were computed before, in the place of the images or beside them."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tailtune.datasets.view import PADDING, Batch, View


class Rows(Protocol):
    """A tensor [N, …], in memory or in a file."""

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """The rows at some positions int64 [n]."""


class FeatureView(View):
    """The features, or tokens, of the images of a view. A batch has them under the names of the images.

    Args:
        view: the images. Its transform draws no random numbers, so a key gives the same features in every epoch.
        features: of each image [N, …].
        readable: which images could be read, bool [N]. The others get weight 0.
    """

    decodes = False

    def __init__(self, view: View, features: Rows, readable: Tensor) -> None:
        super().__init__(view.source, view.indices, view.transform, view.seed, view.skip_bad)
        self.features, self.readable = features, readable.numpy()

    def _images(self, keys: np.ndarray, seconds: np.ndarray) -> tuple[Batch, np.ndarray]:
        index = keys[:, 0]
        return {"image": self.features[torch.from_numpy(index).clamp_min(0)]}, self.readable[index] & (index != PADDING)

    def _prefetch(self, index: np.ndarray, seconds: np.ndarray) -> None:
        """Do nothing: no image is read."""


class JoinedView(View):
    """Several views of the same images. In the place of the images, a batch has a list of what each view has.

    Args:
        views: the views. Each has the same images in the same order, and no view draws random numbers.
    """

    def __init__(self, views: Sequence[View]) -> None:
        first = views[0]
        super().__init__(first.source, first.indices, first.transform, first.seed, first.skip_bad)
        self.views = views
        self.decodes = any(view.decodes for view in views)

    def _images(self, keys: np.ndarray, seconds: np.ndarray) -> tuple[Batch, np.ndarray]:
        found, readable = zip(*(view._images(keys, seconds) for view in self.views), strict=True)
        return {"image": [each["image"] for each in found]}, np.logical_and.reduce(readable)

    def _prefetch(self, index: np.ndarray, seconds: np.ndarray) -> None:
        for view in self.views:
            view._prefetch(index, seconds)
