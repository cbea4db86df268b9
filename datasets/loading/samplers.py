"""Samplers choose and order the training images of an epoch, and divide them into steps, ranks and micro-batches.

The order is a pure function of the labels, the seed and the epoch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from tailtune.configs.seeding import derive_seed, generator

Key = tuple[int, ...]
"""Identifies one augmentation of an image, so that a `View` can repeat it.

A key is (index in the split, epoch, repetition number). The repetition number is the number of times that the image
occurred before in this epoch. In a pair, the key continues with the second image's index and its repetition number.
"""
Order = Callable[[Tensor, int, int], Tensor]
"""Takes the labels of the split (int64 [N]), the seed and the epoch.

Returns the images of the epoch in their order, as indices in the split, int64 [N].
"""
TEMPER = 0.8
"""Power of the class counts in `tempered`: GLMC draws an image with the weight n^−0.2."""


def shuffle(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """Use every image once, in random order.

    Args:
        labels: labels of the split, int64 [N].
        seed: the seed of the run.
        epoch: index of the epoch, from 0.

    Returns:
        Indices in the split, int64 [N].
    """
    return torch.randperm(len(labels), generator=generator(seed, "order", epoch))


def balanced(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """Class-balanced sampling: draw a class uniformly, then take the next image of this class.

    The images of a class are taken in random order. When all have been taken, they start again in a new random order.
    This is the sampler of decoupled training (Kang et al. 2020, §4.1) and of RIDE's expert assignment.

    Args:
        labels: labels of the split, int64 [N].
        seed: the seed of the run.
        epoch: index of the epoch, from 0.

    Returns:
        Indices in the split, int64 [N].
    """
    random = generator(seed, "balanced", epoch)
    return _images_of(torch.randint(len(labels.unique()), labels.shape, generator=random), labels, random)


def reverse(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """Reversed sampling: as `balanced`, but a class has probability p_c ∝ 1 / n_c (BBN, Zhou et al. 2020, §4.2).

    Args:
        labels: labels of the split, int64 [N].
        seed: the seed of the run.
        epoch: index of the epoch, from 0.

    Returns:
        Indices in the split, int64 [N].
    """
    return _weighted(labels, lambda counts: 1 / counts, generator(seed, "reverse", epoch))


def tempered(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """Slightly balanced sampling: as `balanced`, but a class has probability p_c ∝ n_c^0.8 (GLMC, Du et al. 2023).

    Args:
        labels: labels of the split, int64 [N].
        seed: the seed of the run.
        epoch: index of the epoch, from 0.

    Returns:
        Indices in the split, int64 [N].
    """
    return _weighted(labels, lambda counts: counts**TEMPER, generator(seed, "tempered", epoch))


def _weighted(labels: Tensor, weights: Callable[[Tensor], Tensor], random: torch.Generator) -> Tensor:
    """Draw a class for each image of an epoch with a weight that depends on its number of images, then its images."""
    of_classes = weights(labels.unique(return_counts=True)[1].double())
    return _images_of(torch.multinomial(of_classes, len(labels), replacement=True, generator=random), labels, random)


def _images_of(drawn: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
    """Choose one image for each drawn class; the images of a class are taken one after another.

    Args:
        drawn: classes as positions among the sorted labels that occur, int64 [N].
        labels: labels of the split, int64 [N].
        random: generator that shuffles the images of each class.

    Returns:
        Indices in the split, int64 [N].
    """
    classes, sizes = labels.unique(return_counts=True)
    images_by_class = labels.argsort(stable=True).split(sizes.tolist())
    draws_by_class = drawn.argsort(stable=True).split(drawn.bincount(minlength=len(classes)).tolist())
    order = torch.empty_like(drawn)
    for images, draws in zip(images_by_class, draws_by_class, strict=True):
        rounds = -(-len(draws) // len(images))
        order[draws] = images[torch.rand(rounds, len(images), generator=random).argsort(1).flatten()[: len(draws)]]
    return order


@dataclass(frozen=True)
class ImageOrder:
    """An entry of SAMPLERS."""

    order: Order
    """Which images, and in which order."""
    frequencies: Callable[[Tensor], Tensor]
    """Takes the number of images of each class, floating point [C].

    Returns the probability of each class for a drawn image, [C].
    """


SAMPLERS: dict[str, ImageOrder] = {
    "shuffle": ImageOrder(shuffle, lambda counts: counts / counts.sum()),
    "balanced": ImageOrder(balanced, lambda counts: torch.full_like(counts, 1 / len(counts))),
    "tempered": ImageOrder(tempered, lambda counts: counts**TEMPER / (counts**TEMPER).sum()),
    "reverse": ImageOrder(reverse, lambda counts: 1 / counts / (1 / counts).sum()),
}


class StepSampler(Sampler[list[Key]]):
    """Batch sampler of one rank.

    The global batch of an optimizer step is a slice of the epoch's order. It does not depend on the number of ranks.
    Each rank takes a contiguous part of the global batch, in micro-batches of at most `micro_batch_size` images. The
    last batch of an epoch may be smaller. Iteration yields the micro-batches from the current position to the end of
    the epoch, as lists of `Key`.

    The last batch may be so small that a rank has no image. The rank still has to take part in the gradient reduction.
    It therefore gets an image of another rank with weight 0, and `is_padding` returns True.

    Args:
        labels: labels of the split, int64 [N].
        batch_size: number of images in an optimizer step, over all ranks.
        micro_batch_size: largest number of images that a rank processes at once.
        seed: seed of the order.
        rank: index of this process, from 0.
        world: number of processes.
        order: chooses the images of an epoch; `ImageOrder.order` of an entry of `SAMPLERS`.
        pair: chooses the second images of pairs in the same way; None for no pairs.
        in_step: cut the parts of all ranks into equally many micro-batches, because the ranks exchange parameters in
            each of them. It needs `micro_batch_size` of 2 or more.

    Raises:
        ValueError: a size is less than 1, or `rank` is not below `world`.
    """

    def __init__(
        self,
        labels: Tensor,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        order: Order = shuffle,
        pair: Order | None = None,
        in_step: bool = False,
    ) -> None:
        if min(len(labels), batch_size, micro_batch_size) < 1 or not 0 <= rank < world:
            raise ValueError(f"{len(labels)=}, {batch_size=}, {micro_batch_size=}, {rank=}, {world=}")
        self.labels, self.batch_size, self.micro_batch_size = labels, batch_size, micro_batch_size
        self.seed, self.rank, self.world, self.order, self.pair = seed, rank, world, order, pair
        self.in_step = in_step
        self.steps = -(-len(labels) // batch_size)
        self.set_position(0, 0)

    def set_position(self, epoch: int, step: int) -> None:
        """Move to a step of an epoch, so that iteration starts there.

        Args:
            epoch: index of the epoch, from 0.
            step: index of the step, from 0 to `steps`; `steps` is the end of the epoch.

        Raises:
            ValueError: `step` is outside this range.
        """
        if not 0 <= step <= self.steps:
            raise ValueError(f"step {step} of an epoch of {self.steps}")
        self.epoch, self.step = epoch, step
        order = self.order(self.labels, self.seed, epoch)
        self._order = order.tolist()
        keys: Sequence[Key] = [(index, epoch, number) for index, number in _numbered(order)]
        if self.pair is not None:
            partners = _numbered(self.pair(self.labels, derive_seed(self.seed, "pair"), epoch))
            # Second images have negative repetition numbers: an image gets different augmentations as first and second.
            keys = [(*key, index, -1 - number) for key, (index, number) in zip(keys, partners, strict=True)]
        self._keys = keys

    def micro_batches(self, step: int) -> list[list[int]]:
        """The micro-batches of this rank in a step of the current epoch.

        Args:
            step: index of the step, from 0.

        Returns:
            One or more lists of indices in the split.
        """
        return [self._order[chunk.start : chunk.stop] for chunk in self._chunks(step)]

    def is_padding(self, step: int) -> bool:
        """Whether this rank has only an image of weight 0 in a step of the current epoch.

        Args:
            step: index of the step, from 0.
        """
        return not self._part(step)

    def counts(self, step: int) -> int:
        """Number of micro-batches of this rank in a step of the current epoch.

        Args:
            step: index of the step, from 0.
        """
        return len(self._chunks(step))

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.step, self.steps):
            for chunk in self._chunks(step):
                yield [self._keys[position] for position in chunk]

    def __len__(self) -> int:
        return sum(self.counts(step) for step in range(self.step, self.steps))

    def _chunks(self, step: int) -> list[range]:
        """The micro-batches of this rank, as positions in the order of the epoch."""
        part = self._part(step) or self._batch(step)[:1]
        if self.in_step:
            largest = -(-len(self._batch(step)) // self.world)  # part of any rank
            count = -(-largest // self.micro_batch_size)
            return [part[len(part) * i // count : len(part) * (i + 1) // count] for i in range(count)]
        return [part[i : i + self.micro_batch_size] for i in range(0, len(part), self.micro_batch_size)]

    def _batch(self, step: int) -> range:
        return range(len(self._order))[step * self.batch_size : (step + 1) * self.batch_size]

    def _part(self, step: int) -> range:
        batch = self._batch(step)
        return batch[len(batch) * self.rank // self.world : len(batch) * (self.rank + 1) // self.world]


def _numbered(order: Tensor) -> Iterator[tuple[int, int]]:
    """Pairs (image, repetition number). The repetition number selects a new augmentation for each repetition."""
    ascending, positions = order.sort(stable=True)
    times_before = torch.empty_like(order)
    times_before[positions] = torch.arange(len(order)) - torch.searchsorted(ascending, ascending)
    return zip(order.tolist(), times_before.tolist(), strict=True)
