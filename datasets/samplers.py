"""The order of training images: a pure function of seed, epoch and sizes, cut into steps, ranks, micro-batches."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from configs.seeding import generator

Key = tuple[int, int]
"""(index in the split, epoch): what a `View` needs to augment reproducibly."""


class StepSampler(Sampler[list[Key]]):
    """Batch sampler of one rank.

    The global batch of an optimizer step is a slice of the epoch's permutation, the same for any number of
    processes; each rank has a contiguous part of it, in chunks of at most `micro_batch_size`. The last batch of an
    epoch is kept though it be partial. Iterating gives the micro-batches from the current position to the epoch's
    end, as lists of `Key`.

    A rank without samples in a step (its part of a small last batch is empty) still has to take part in the
    reduction of gradients: it gets one image that others have too. `is_padding` says so, and its weight is zero.

    Args:
        length: images in the split.
        batch_size: images in an optimizer step, over all ranks.
        micro_batch_size: images that a rank holds at once.
        seed: of the order.
        rank, world: this process, and how many there are.
    """

    def __init__(self, length: int, batch_size: int, micro_batch_size: int, seed: int, rank: int = 0, world: int = 1):
        if min(length, batch_size, micro_batch_size) < 1 or not 0 <= rank < world:
            raise ValueError(f"{length=}, {batch_size=}, {micro_batch_size=}, {rank=}, {world=}")
        self.length, self.batch_size, self.micro_batch_size = length, batch_size, micro_batch_size
        self.seed, self.rank, self.world = seed, rank, world
        self.steps = -(-length // batch_size)
        self.set_position(0, 0)

    def set_position(self, epoch: int, step: int) -> None:
        """Go to a step of an epoch; `step` = `steps` is the epoch's end."""
        if not 0 <= step <= self.steps:
            raise ValueError(f"step {step} of an epoch of {self.steps}")
        self.epoch, self.step = epoch, step
        self._order = torch.randperm(self.length, generator=generator(self.seed, "order", epoch)).tolist()

    def micro_batches(self, step: int) -> list[list[int]]:
        """This rank's indices in a step of the current epoch, at least one micro-batch."""
        part = self._part(step) or self._batch(step)[:1]
        return [part[i : i + self.micro_batch_size] for i in range(0, len(part), self.micro_batch_size)]

    def is_padding(self, step: int) -> bool:
        """Whether this rank has no samples of its own in the step."""
        return not self._part(step)

    def counts(self, step: int) -> int:
        """Number of this rank's micro-batches in the step."""
        return max(1, -(-len(self._part(step)) // self.micro_batch_size))

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.epoch
        for step in range(self.step, self.steps):
            for indices in self.micro_batches(step):
                yield [(index, epoch) for index in indices]

    def __len__(self) -> int:
        return sum(self.counts(step) for step in range(self.step, self.steps))

    def _batch(self, step: int) -> list[int]:
        return self._order[step * self.batch_size : (step + 1) * self.batch_size]

    def _part(self, step: int) -> list[int]:
        batch = self._batch(step)
        return batch[len(batch) * self.rank // self.world : len(batch) * (self.rank + 1) // self.world]
