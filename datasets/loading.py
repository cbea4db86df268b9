"""Batches of a view, from images that this process or others decode, and one line where one of those fails."""

import math
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from configs.errors import UserError
from configs.seeding import generator
from datasets.bundle import PADDING, Batch, View
from datasets.samplers import StepSampler
from datasets.workers import AHEAD, LINUX, SHARED, Worker, Workers, own_signals, possible_workers

SLICE, STUCK = 30.0, 300.0
"""Seconds: of one wait for a batch, and of waits without any after which the processes count as stuck.

Many short waits make the long one, because a clock goes on while a whole job is stopped (SIGSTOP, SIGCONT): that
spoils one of the short waits, not all.
"""

CONTINUES = "the same command continues"
LESS = "lower num_workers, or micro_batch_size and test_batch_size"
STOPPED = {
    "Killed": f"was killed (out of memory?): {LESS}",
    "Bus error": f"was killed (is {SHARED} full?): {LESS}, or give {SHARED} more space",
}
"""Name of the signal that ended a process → what happened, and the remedy."""


class Loader:
    """Batches of a view; what goes wrong in the processes that decode ends in one line, and ends them.

    Args:
        batches: batches of keys of the view.
        num_workers: processes that decode; 0: this one does.
        images: the most that a batch has.
        world: processes of the run, which share the shared memory of their machine.
        persistent: keep the processes from one iteration to the next.
    """

    def __init__(self, view: View, batches: Any, num_workers: int, images: int, world: int, persistent: bool) -> None:
        # As big as the transform makes a square image.
        self.num_workers = possible_workers(num_workers, lambda: world * images * view[PADDING]["image"].numel())
        self.processes: list[Worker] = []
        several = self.num_workers > 0
        self.loader: DataLoader[Batch] = DataLoader(
            view,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=_collate_shared,
            persistent_workers=persistent and several,
            worker_init_fn=own_signals,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=AHEAD if several else None,
            timeout=SLICE if several else 0,
            multiprocessing_context=Workers(self.processes) if several and LINUX else None,
            # DataLoader draws a seed at every start; from the global generator that would disturb other draws.
            generator=generator("loader"),
        )

    def __iter__(self) -> Iterator[Batch]:
        """Raises a `UserError`: an image cannot be read, or a process that decodes was killed or is stuck."""
        try:
            batches = self._start()
            while (batch := self._next(batches)) is not None:
                yield batch
        except (UserError, RuntimeError) as error:
            self._end()
            raise clean_worker_error(error) or error from None

    def __len__(self) -> int:
        return len(self.loader)

    def _start(self) -> Iterator[Batch]:
        try:
            return iter(self.loader)
        except OSError as error:
            reason = f"cannot start the {self.num_workers} processes that decode images ({error.strerror})"
            raise UserError(f"{reason}: lower num_workers") from error

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch, None after the last."""
        for _ in range(math.ceil(STUCK / SLICE)):
            try:
                return next(batches, None)
            except RuntimeError as error:
                if "DataLoader timed out" not in str(error):
                    raise
        raise UserError(
            f"the processes that decode images have given none for {STUCK:.0f} s: see whether the disk answers, or "
            f"set num_workers 0; {CONTINUES}"
        )

    def _end(self) -> None:
        """End the processes at once. torch would wait seconds for each of them, and they may wait for a dead one."""
        alone = threading.current_thread() is threading.main_thread()
        # torch makes an error of the end of any process that it has not ended itself.
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if alone else None
        for process in self.processes:
            process.kill()
            process.join()
        if alone:
            signal.signal(signal.SIGCHLD, handler)


def eval_loader(view: View, batch_size: int, num_workers: int, rank: int = 0, world: int = 1, epoch: int = 0) -> Loader:
    """Each image of the view once over all ranks, in batches whose sizes agree between the ranks.

    Where the images do not divide evenly a rank gets padding: `index` -1, `weight` 0. A transform that draws draws
    anew in each epoch.
    """
    shard = _Shard(len(view), batch_size, rank, world, epoch)
    return Loader(view, shard, num_workers, min(batch_size, len(shard.keys)), world, persistent=False)


def train_loader(view: View, sampler: StepSampler, num_workers: int) -> Loader:
    """Micro-batches in the sampler's order; each `iter` starts at the sampler's position."""
    images = sampler.micro_batch_size * (1 if sampler.pair is None else 2)
    return Loader(view, sampler, num_workers, images, sampler.world, persistent=True)


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


def clean_worker_error(error: BaseException) -> UserError | None:
    """The one-line `UserError` behind an exception that a loader raised; None if it is of another kind.

    A DataLoader re-raises a worker's exception as the same type, its message being the worker's whole traceback. The
    end of a worker becomes a RuntimeError, which may come anywhere in the main process, because a signal tells of it.
    """
    if isinstance(error, RuntimeError):
        return _ended(f"{error} {error.__cause__}")  # the cause names the signal
    if not isinstance(error, UserError):
        return None
    kind = f"{type(error).__module__}.{type(error).__qualname__}: "
    lines = [line for line in str(error).splitlines() if line.startswith(kind)]
    if not lines:
        return error
    # The frames hold the loader's iterator in a cycle; collected from there, it waits 5 s for its workers.
    error.__traceback__ = None
    return type(error)(lines[-1].removeprefix(kind))


def _ended(text: str) -> UserError | None:
    """What torch says of a process that failed for want of memory or was ended; None for anything else."""
    if "unable to allocate shared memory" in text or "unable to mmap" in text:
        return UserError(f"{SHARED} is full: {LESS}, or give {SHARED} more space; {CONTINUES}")
    if "DataLoader timed out" in text:
        return UserError(f"the processes that decode images do not answer: set num_workers 0; {CONTINUES}")
    if not re.match(r"DataLoader worker \(pid", text):
        return None
    found = re.search(r"is killed by signal: ([^.]*)\.", text)
    name = found.group(1).strip() if found else "it ended by itself"
    what = STOPPED.get(name, f"is gone ({name}): set num_workers 0, which shows why")
    return UserError(f"a process that decodes images {what}; {CONTINUES}")


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


def _collate_shared(samples: Sequence[Batch]) -> Batch:
    """`collate`, in a worker into shared memory: if that is full, an error here reaches the main process.

    Left to the queue, it would end in the queue's own thread, and the main process would wait for ever.
    """
    batch = collate(samples)
    if get_worker_info() is not None:
        for value in batch.values():
            for tensor in value if isinstance(value, list) else [value]:
                tensor.share_memory_()
    return batch
