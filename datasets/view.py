"""`View`: images of a source, seen through a transform, in batches."""

from collections.abc import Sequence
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tailtune.configs.seeding import derive_seed, seeded
from tailtune.datasets.collected_images import CollectedImages
from tailtune.datasets.images.draws import uniform_draws
from tailtune.datasets.images.growing_crop import GrowingCrop
from tailtune.datasets.images.tensor_transforms import TensorTransform
from tailtune.datasets.images.transforms import Transform
from tailtune.datasets.long_tail import random_positions
from tailtune.datasets.sources.image_sources import ArraySource, Source
from tailtune.datasets.sources.named_source import BadImage, NamedSource

Batch = dict[str, Any]
"""A batch of images of a `View`: name → value."""
Key = int | tuple[int, ...]
PADDING = -1
"""Index of a black image of weight 0."""
OTHER_VIEW = 2**32
"""What is added to the repetition number of a key for the second augmentation of an image."""
STAGES = ("read", "decode", "transform")
"""What is timed in the loader; see `View.timed`."""


class Prepared(Protocol):
    """The images of a view after `TensorTransform.prepare`, kept from one epoch to the next."""

    def stack(self) -> Tensor | None:
        """All images [N, 3, H, W]; None if their sizes differ or one cannot be read."""

    def image(self, index: int) -> Tensor | None:
        """One image, uint8 [3, H, W]; None if it could not be read."""


class View(Dataset[Batch]):
    """Images of a source, seen through a transform.

    A key is an index in the view, (index, epoch) or (index, epoch, number of the repetition). An index alone means
    (index, 0, 0). The random draws of the transform depend on the seed and the key only, not on the process that runs
    it, nor on the other images of a batch. The index `PADDING` gives a black image of weight 0. A key of five numbers,
    (index, epoch, repetition, index, repetition), is a pair of images.

    A loader gets batches by `batch`, in any process, and then calls `finish` on the device. `view[key]` does both.

    Args:
        source: the images.
        indices: positions in the source, int64 [N].
        transform: a transform of tensors, or a function from a Pillow image to a uint8 tensor [3, H, W].
        seed: seed of the transform's random draws.
        skip_bad: give unreadable images weight 0 instead of raising `BadImage`.
    """

    decodes = True
    """Whether worker processes may have something to do."""

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        transform: Transform | TensorTransform,
        seed: int = 0,
        skip_bad: bool = False,
    ):
        self.source, self.indices, self.transform = source, indices, transform
        self.seed, self.skip_bad = seed, skip_bad
        self.prepared: Prepared | None = None
        self.timed = False
        """Whether batches have `seconds`: the time that each of `STAGES` took, float64 [3]."""
        self.two_views = False
        """Whether batches have a second augmentation of each image."""

    @property
    def labels(self) -> Tensor:
        """Labels of the images in the order of the view, int64 [N]."""
        return torch.from_numpy(self.source.labels[self.indices])

    @property
    def is_batched(self) -> bool:
        """Whether a batch is made at once, without Python code for a single image."""
        transform = self.transform
        known = isinstance(transform, TensorTransform) and (transform.cut is None or transform.cut.batched)
        return known and self._stack() is not None

    def limited(self, count: int | None) -> "View":
        """At most `count` images of the view, chosen at random because the view may be sorted by class.

        Args:
            count: number of images; None for all.
        """
        if count is None:
            return self
        return self.take(random_positions(len(self.indices), count))

    def take(self, positions: np.ndarray) -> "View":
        """The images at the given positions of the view.

        Args:
            positions: int64 [n].
        """
        return View(self.source, self.indices[positions], self.transform, self.seed, self.skip_bad)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> Batch:
        """The finished sample of a key: the values of a batch of one image, without the first dimension.

        Raises:
            BadImage: the image cannot be read, and unreadable images are not skipped.
        """
        batch = self.finish(self.batch([key]))
        numbers = ("label", "index", "weight")
        return {name: value[0].item() if name in numbers else value[0] for name, value in batch.items()}

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """As `batch`. The DataLoader of torch calls this method with the keys of a batch."""
        return self.batch(keys)

    def batch(self, keys: Sequence[Key]) -> Batch:
        """The images of B keys of equal length.

        Returns:
            image: uint8 [B, 3, H, W], or [B, T, 3, H, W] for T draws of each image, or a list of B tensors where sizes
                differ (such images are cropped on the device);
            partner, partner_label: the second images of pairs and their labels; only if the keys are pairs;
            other_image, other_partner: the same images with other draws; only with `two_views`;
            label, index: int64 [B], of the first images; `index` is the position in the view;
            weight: float32 [B], 1, or 0 for padding and for an unreadable image that is skipped, also in a pair;
            image_draws and such: what `finish` needs; only if it has something to do.

        Raises:
            BadImage: an image cannot be read, and unreadable images are not skipped.
        """
        table = np.array([key if isinstance(key, tuple) else (key,) for key in keys])
        table = np.pad(table, ((0, 0), (0, max(0, 3 - table.shape[1]))))
        seconds = np.zeros(len(STAGES))
        index = table[:, 0]
        self._prefetch(table[:, ::3], seconds)  # of a pair, the two images
        wanted = {"image": table[:, :3]} | ({"partner": table[:, [3, 1, 4]]} if table.shape[1] == 5 else {})
        if self.two_views:
            wanted |= {f"other_{name}": each + (0, 0, OTHER_VIEW) for name, each in wanted.items()}
        batch, readable = Batch(), np.ones(len(keys), dtype=bool)
        for name, each in wanted.items():
            found, also_readable = self._images(each, seconds)
            batch |= {name + key.removeprefix("image"): value for key, value in found.items()}
            readable &= also_readable
            if name == "partner":
                batch["partner_label"] = self._labels_of(each[:, 0])
        batch |= {"label": self._labels_of(index), "index": torch.from_numpy(index.copy())}
        batch["weight"] = torch.from_numpy(readable).float()
        return batch | ({"seconds": torch.from_numpy(seconds)} if self.timed else {})

    def _labels_of(self, index: np.ndarray) -> Tensor:
        return torch.from_numpy(np.where(index == PADDING, 0, self.source.labels[self.indices[index]]))

    def _prefetch(self, index: np.ndarray, seconds: np.ndarray) -> None:
        """Let a server send the images of a batch at the same time."""
        if self.prepared is None and isinstance(self.source, NamedSource):
            started = perf_counter()
            self.source.prefetch(self.indices[index[index != PADDING]].tolist())
            seconds[STAGES.index("read")] += perf_counter() - started

    def finish(self, batch: Batch) -> Batch:
        """Make the random changes that are left to the device, in place.

        Args:
            batch: what `batch` returned, on any device.

        Returns:
            The batch without the draws.
        """
        for key in [key for key in batch if key.endswith("_draws")]:
            assert isinstance(self.transform, TensorTransform)
            name = key.removesuffix("_draws")
            batch[name] = self.transform.on_device(batch[name], batch.pop(key))
        return batch

    def _images(self, keys: np.ndarray, seconds: np.ndarray) -> tuple[Batch, np.ndarray]:
        """Images of keys [B, 3] before `finish`; and which of them could be read, bool [B]."""
        if not isinstance(self.transform, TensorTransform):
            return self._pillow_images(self.transform, keys, seconds)
        draws = uniform_draws(derive_seed(self.seed, "augment"), keys[:, [1, 0, 2]], self.transform.draws)
        cut, finish = np.split(draws, [self.transform.cut_draws], 1)
        if self.transform.of_epoch is not None:
            cut = np.column_stack([cut, [self.transform.of_epoch(epoch) for epoch in keys[:, 1].tolist()]])
        images, readable = self._cut_images(self.transform, keys[:, 0], torch.from_numpy(cut), seconds)
        return {"image": images} | ({"image_draws": torch.from_numpy(finish).float()} if finish.size else {}), readable

    def _cut_images(
        self, transform: TensorTransform, index: np.ndarray, draws: Tensor, seconds: np.ndarray
    ) -> tuple[Tensor | list[Tensor], np.ndarray]:
        started = perf_counter()
        if (stack := self._stack()) is not None:  # images in memory: no Python code for a single image
            rows = np.maximum(index, 0) if self.prepared is not None else self.indices[index]
            images = stack.index_select(0, torch.from_numpy(rows))
            images = images if self.prepared is not None else transform.prepare(images)
            images = transform.cut.apply(images, draws) if transform.cut else images
            readable = index != PADDING
            if not readable.all():
                images[torch.from_numpy(~readable)] = 0
            seconds[STAGES.index("transform")] += perf_counter() - started
            return images, readable
        batch = CollectedImages(len(index))
        readable = np.ones(len(index), dtype=bool)
        for number, position in enumerate(index):
            image = self._image(transform, int(position), seconds)
            started = perf_counter()
            readable[number] = image is not None
            image = self._black(transform) if image is None else image[None]
            batch.add((transform.cut.apply(image, draws[number : number + 1]) if transform.cut else image)[0])
            seconds[STAGES.index("transform")] += perf_counter() - started
        return batch.joined(), readable

    def _stack(self) -> Tensor | None:
        if self.prepared is not None:
            return self.prepared.stack()
        return self.source.stack() if isinstance(self.source, ArraySource) else None

    def _image(self, transform: TensorTransform, index: int, seconds: np.ndarray) -> Tensor | None:
        """A prepared image [3, H, W]; None for padding and for an unreadable image that is skipped."""
        if index == PADDING:
            return None
        try:
            if self.prepared is not None and (kept := self.prepared.image(index)) is not None:
                return kept
            pixels = self._pixels(int(self.indices[index]), seconds)
        except BadImage:
            if not self.skip_bad:
                raise
            return None
        started = perf_counter()
        prepared = transform.prepare(pixels[None])[0]
        seconds[STAGES.index("transform")] += perf_counter() - started
        return prepared

    def _pixels(self, position: int, seconds: np.ndarray) -> Tensor:
        """A decoded image of the source, uint8 [3, H, W]."""
        started = perf_counter()
        file = self.source.open(position)
        read = perf_counter()
        pixels = self.source.pixels(position, file)
        seconds[:2] += read - started, perf_counter() - read
        return pixels

    def _pillow_images(self, transform: Transform, keys: np.ndarray, seconds: np.ndarray) -> tuple[Batch, np.ndarray]:
        batch = CollectedImages(len(keys))
        readable = np.ones(len(keys), dtype=bool)
        for number, (index, epoch, repetition) in enumerate(keys.tolist()):
            started = perf_counter()
            try:
                image = None if index == PADDING else self.source.load(int(self.indices[index]))
            except BadImage:
                if not self.skip_bad:
                    raise
                image = None
            decoded = perf_counter()
            readable[number] = image is not None
            with seeded(self.seed, "augment", epoch, index, repetition):
                batch.add(self._black(transform) if image is None else _of_epoch(transform, image, epoch))
            seconds[1:] += decoded - started, perf_counter() - decoded
        return {"image": batch.joined()}, readable

    def _black(self, transform: Transform | TensorTransform) -> Tensor:
        """A black image of the shape that the transform gives to a square image, so that batches can be stacked.

        For a transform of tensors, it is the batch of one image after `prepare`.
        """
        if isinstance(transform, TensorTransform):
            return torch.zeros_like(transform.prepare(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)))
        with seeded(0):
            return torch.zeros_like(transform(Image.new("RGB", (32, 32))))


def _of_epoch(transform: Transform, image: Image.Image, epoch: int) -> Tensor:
    """A Pillow image as it is in an epoch, uint8 [..., 3, H, W]."""
    return transform(image, epoch) if isinstance(transform, GrowingCrop) else transform(image)
