"""The order of training images: a pure function of labels, seed and epoch, cut into steps, ranks, micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from tailtune.configs.seeding import generator, mix

Key = tuple[int, ...]
"""(index in the split, epoch, how often it came before in this epoch), and of a pair also those of its second image
but the epoch: what a `View` needs to augment reproducibly."""
Order = Callable[[Tensor, int, int], Tensor]
"""Labels of the split [N], seed, epoch → the images of the epoch, as indices in the split [N]."""


def shuffle(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """Every image once."""
    return torch.randperm(len(labels), generator=generator(seed, "order", epoch))


def balanced(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """N times a class, each equally likely, then the next of its images, which start over in another order.

    The sampler of decoupled training (Kang et al. 2020, §4.1) and of RIDE's expert assignment.
    """
    draws = generator(seed, "balanced", epoch)
    return _of_classes(labels, torch.randint(len(labels.unique()), labels.shape, generator=draws), draws)


def reverse(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """As `balanced`, but a class is as much more likely as it is rarer, p_c ∝ 1 / n_c (BBN, Zhou et al. 2020, §4.2)."""
    draws = generator(seed, "reverse", epoch)
    rarity = 1 / labels.unique(return_counts=True)[1].double()
    return _of_classes(labels, torch.multinomial(rarity, len(labels), replacement=True, generator=draws), draws)


def _of_classes(labels: Tensor, drawn: Tensor, draws: torch.Generator) -> Tensor:
    """An image for each drawn class, by the class's place among those that there are [N]: its images in turn."""
    classes, sizes = labels.unique(return_counts=True)
    members = labels.argsort(stable=True).split(sizes.tolist())
    places = drawn.argsort(stable=True).split(drawn.bincount(minlength=len(classes)).tolist())
    order = torch.empty_like(drawn)
    for own, where in zip(members, places, strict=True):
        rounds = -(-len(where) // len(own))
        order[where] = own[torch.rand(rounds, len(own), generator=draws).argsort(1).flatten()[: len(where)]]
    return order


@dataclass(frozen=True)
class ImageOrder:
    """An entry of SAMPLERS."""

    order: Order
    """Which images an epoch has."""
    frequencies: Callable[[Tensor], Tensor]
    """Images per class [C], of a floating type → how likely an image of each class is drawn, [C]."""


SAMPLERS: dict[str, ImageOrder] = {
    "shuffle": ImageOrder(shuffle, lambda counts: counts / counts.sum()),
    "balanced": ImageOrder(balanced, lambda counts: torch.full_like(counts, 1 / len(counts))),
    "reverse": ImageOrder(reverse, lambda counts: 1 / counts / (1 / counts).sum()),
}


class StepSampler(Sampler[list[Key]]):
    """Batch sampler of one rank.

    The global batch of an optimizer step is a slice of the epoch's order, the same for any number of processes;
    each rank has a contiguous part of it, in chunks of at most `micro_batch_size`. The last batch of an
    epoch is kept though it be partial. Iterating gives the micro-batches from the current position to the epoch's
    end, as lists of `Key`.

    A rank without samples in a step (its part of a small last batch is empty) still has to take part in the
    reduction of gradients: it gets one image that others have too. `is_padding` says so, and its weight is zero.

    Args:
        labels: of the split, int64 [N].
        batch_size: images in an optimizer step, over all ranks.
        micro_batch_size: images that a rank holds at once.
        seed: of the order.
        rank, world: this process, and how many there are.
        order: which images an epoch has, as entries of `SAMPLERS` say.
        pair: which images stand beside those, another one.
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
    ) -> None:
        if min(len(labels), batch_size, micro_batch_size) < 1 or not 0 <= rank < world:
            raise ValueError(f"{len(labels)=}, {batch_size=}, {micro_batch_size=}, {rank=}, {world=}")
        self.labels, self.batch_size, self.micro_batch_size = labels, batch_size, micro_batch_size
        self.seed, self.rank, self.world, self.order, self.pair = seed, rank, world, order, pair
        self.steps = -(-len(labels) // batch_size)
        self.set_position(0, 0)

    def set_position(self, epoch: int, step: int) -> None:
        """Go to a step of an epoch; `step` = `steps` is the epoch's end."""
        if not 0 <= step <= self.steps:
            raise ValueError(f"step {step} of an epoch of {self.steps}")
        self.epoch, self.step = epoch, step
        order = self.order(self.labels, self.seed, epoch)
        self._order = order.tolist()
        own: Sequence[tuple[int, ...]] = [(index, epoch, number) for index, number in _numbered(order)]
        if self.pair is not None:
            other = self.pair(self.labels, mix(self.seed, "pair"), epoch)
            # Numbers below 0, so that an image beside another is augmented otherwise than in the first place.
            own = [(*key, index, -1 - number) for key, (index, number) in zip(own, _numbered(other), strict=True)]
        self._keys = own

    def micro_batches(self, step: int) -> list[list[int]]:
        """This rank's indices in a step of the current epoch, at least one micro-batch."""
        return [self._order[chunk.start : chunk.stop] for chunk in self._chunks(step)]

    def is_padding(self, step: int) -> bool:
        """Whether this rank has no samples of its own in the step."""
        return not self._part(step)

    def counts(self, step: int) -> int:
        """Number of this rank's micro-batches in the step."""
        return max(1, -(-len(self._part(step)) // self.micro_batch_size))

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.step, self.steps):
            for chunk in self._chunks(step):
                yield [self._keys[place] for place in chunk]

    def __len__(self) -> int:
        return sum(self.counts(step) for step in range(self.step, self.steps))

    def _chunks(self, step: int) -> list[range]:
        """Places in the epoch's order of this rank's micro-batches."""
        part = self._part(step) or self._batch(step)[:1]
        return [part[i : i + self.micro_batch_size] for i in range(0, len(part), self.micro_batch_size)]

    def _batch(self, step: int) -> range:
        return range(len(self._order))[step * self.batch_size : (step + 1) * self.batch_size]

    def _part(self, step: int) -> range:
        batch = self._batch(step)
        return batch[len(batch) * self.rank // self.world : len(batch) * (self.rank + 1) // self.world]


def _numbered(order: Tensor) -> Iterator[tuple[int, int]]:
    """Each entry and how often it has come before: an image that comes again is augmented anew."""
    ascending, places = order.sort(stable=True)
    before = torch.empty_like(order)
    before[places] = torch.arange(len(order)) - torch.searchsorted(ascending, ascending)
    return zip(order.tolist(), before.tolist(), strict=True)
