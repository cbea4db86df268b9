"""What the rest of the toolkit sees of a data set: facts, views, loaders."""

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from configs.errors import UserError
from configs.seeding import generator, seeded
from datasets.identity import Chosen, Record
from datasets.imbalance import some_positions
from datasets.samplers import StepSampler
from datasets.sources import BadImage, Source
from datasets.transforms import Transform

Triple = tuple[float, float, float]
Batch = dict[str, Any]
PADDING = -1


@dataclass(frozen=True)
class DataInfo:
    """Facts that need no image."""

    name: str
    class_names: tuple[str, ...]
    class_counts: torch.Tensor
    """Training images per class, int64 [C]."""
    groups: dict[str, torch.Tensor]
    """`many`, `med`, `few` → class indices, int64."""
    mean: Triple
    std: Triple
    """Of the data set's own pixels (0–1), for a backbone that has none."""
    descriptors: tuple[tuple[str, ...], ...] | None = None
    """Strings that describe each class [C], where `prompt descriptor` asks for them."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True)
class Shift:
    """A test set of other class frequencies."""

    name: str
    counts: torch.Tensor
    """Images per class, int64 [C]."""
    positions: torch.Tensor
    """Its images in the test split, int64 [n]."""
    origin: str
    """Where the choice of images comes from, for people."""
    learn: torch.Tensor | None = None
    """Images that weights for it are learnt from, as `positions`; None: its own."""


class View(Dataset[Batch]):
    """Some images of a source, seen through a transform.

    Keys: an index in the view, or (index, epoch), or (index, epoch, view). What the transform draws is a function
    of the seed and the key alone, whatever worker or process runs it; an index alone is (index, 0, 0). The index -1
    is padding, not the last image: a black image of weight 0. (index, epoch, view, index, view) is a pair.

    A sample is `image` (uint8 [3, H, W]), `label`, `index` (the position in the view) and `weight`: 1.0, or 0.0 for
    padding and for a bad image when those are skipped. Of a pair all is of the first image, and `partner` is the
    second; the weight is 0 if either is bad.

    Args:
        source: the images.
        indices: positions in the source, int64 [N].
        transform: PIL image → uint8 [3, H, W].
        seed: of the augmentation.
        skip_bad: give unreadable images weight 0 instead of raising `BadImage`.
    """

    def __init__(
        self, source: Source, indices: np.ndarray, transform: Transform, seed: int = 0, skip_bad: bool = False
    ):
        self.source, self.indices, self.transform = source, indices, transform
        self.seed, self.skip_bad = seed, skip_bad

    @property
    def labels(self) -> torch.Tensor:
        """Classes in the order of the view, int64 [N]."""
        return torch.from_numpy(self.source.labels[self.indices])

    def with_transform(self, transform: Transform) -> "View":
        """The same images through another transform."""
        return View(self.source, self.indices, transform, self.seed, self.skip_bad)

    def limited(self, count: int | None) -> "View":
        """At most `count` of the images, spread at random over the split, whose order may be by class."""
        if count is None:
            return self
        return self.take(some_positions(len(self.indices), count))

    def take(self, positions: np.ndarray) -> "View":
        """The images at these positions of the view."""
        return View(self.source, self.indices[positions], self.transform, self.seed, self.skip_bad)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, ...]) -> Batch:
        if isinstance(key, tuple) and len(key) == 5:
            first, second = self[key[:3]], self[key[3], key[1], key[4]]
            return {**first, "partner": second["image"], "weight": min(first["weight"], second["weight"])}
        index, epoch, view = (*key, 0, 0)[:3] if isinstance(key, tuple) else (key, 0, 0)
        if index == PADDING:
            return _sample(self._black(), 0, PADDING, 0.0)
        position = int(self.indices[index])
        label = int(self.source.labels[position])
        try:
            image = self.source.load(position)
        except BadImage:
            if not self.skip_bad:
                raise
            return _sample(self._black(), label, index, 0.0)
        with seeded(self.seed, "augment", epoch, index, view):
            return _sample(self.transform(image), label, index, 1.0)

    def _black(self) -> torch.Tensor:
        """Zeros of the shape that the transform gives to a square image, which is what stacks with others."""
        with seeded(0):
            return torch.zeros_like(self.transform(Image.new("RGB", (32, 32))))


@dataclass
class DataBundle:
    """The views of a run."""

    info: DataInfo
    train: View
    """Augmented."""
    plain: View
    """Training images through the plain transform, for head initialisation."""
    train_as_test: View
    """Training images through the test transform, for `test_train`."""
    test: View
    test_views: View
    """Test images, two draws of the views that test-time learning compares: `image` is uint8 [2, 3, H, W]."""
    val: View | None
    records: Mapping[str, Record]
    """What each split is made of: `train`, `test`, and `val` where there is one."""
    chosen: Chosen
    """The splits, and the images that are in none."""
    shifts: tuple[Shift, ...] = ()
    """Label distributions of the test images."""


def collate(samples: Sequence[Batch]) -> Batch:
    """Samples of a view → a batch.

    Returns:
        image: uint8 [B, 3, H, W], of T draws [B, T, 3, H, W], or a list of B tensors where sizes differ (images to be
            five-cropped on the device); partner: of pairs, as image;
        label, index: int64 [B]; weight: float32 [B].
    """
    images = [sample["image"] for sample in samples]
    alike = all(image.shape == images[0].shape for image in images)
    batch: Batch = {name: torch.tensor([sample[name] for sample in samples]) for name in ("label", "index", "weight")}
    if "partner" in samples[0]:
        batch["partner"] = torch.stack([sample["partner"] for sample in samples])
    return {"image": torch.stack(images) if alike else images, **batch}


class _Shard:
    """(index, epoch) batches of one rank; every rank has equally many, of equal size. Missing ones are `PADDING`."""

    def __init__(self, length: int, batch_size: int, rank: int, world: int, epoch: int):
        share = -(-length // world)
        own = list(range(rank, length, world))
        self.keys = [(index, epoch) for index in own + [PADDING] * (share - len(own))]
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self.keys[i : i + self.batch_size] for i in range(0, len(self.keys), self.batch_size))

    def __len__(self) -> int:
        return -(-len(self.keys) // self.batch_size)


def eval_loader(
    view: View, batch_size: int, num_workers: int, rank: int = 0, world: int = 1, epoch: int = 0
) -> DataLoader[Batch]:
    """Each image of the view once over all ranks, in batches whose sizes agree between the ranks.

    Where the images do not divide evenly a rank gets padding: `index` -1, `weight` 0. A transform that draws draws
    anew in each epoch.
    """
    return _loader(view, _Shard(len(view), batch_size, rank, world, epoch), num_workers)


def train_loader(view: View, sampler: StepSampler, num_workers: int) -> DataLoader[Batch]:
    """Micro-batches in the sampler's order; each `iter` starts at the sampler's position."""
    return _loader(view, sampler, num_workers, persistent=num_workers > 0)


def clean_worker_error(error: BaseException) -> UserError | None:
    """The one-line `UserError` behind an exception that a loader raised; None if it is of another kind.

    A DataLoader re-raises a worker's exception as the same type, its message being the worker's whole traceback.
    """
    if not isinstance(error, UserError):
        return None
    kind = f"{type(error).__module__}.{type(error).__qualname__}: "
    lines = [line for line in str(error).splitlines() if line.startswith(kind)]
    if not lines:
        return error
    # The frames hold the loader's iterator in a cycle; collected from there, it waits 5 s for its workers.
    error.__traceback__ = None
    return type(error)(lines[-1].removeprefix(kind))


def _sample(image: torch.Tensor, label: int, index: int, weight: float) -> Batch:
    return {"image": image, "label": label, "index": index, "weight": weight}


def _loader(view: View, batches: Any, num_workers: int, persistent: bool = False) -> DataLoader[Batch]:
    num_workers = min(num_workers, _processors())  # the batches are the same, and more would only wait
    return DataLoader(
        view,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        persistent_workers=persistent,
        worker_init_fn=_own_signals,
        pin_memory=torch.cuda.is_available(),
        # DataLoader draws a seed at every start; from the global generator that would disturb other draws.
        generator=generator("loader"),
    )


def _processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _own_signals(_: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a job: the main one answers, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
