"""Batches of a view, from images that this process or others decode, and one line where one of those fails."""

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import generator
from tailtune.datasets.data_bundle import PADDING, Batch, View
from tailtune.datasets.loading.samplers import StepSampler
from tailtune.datasets.loading.workers import AHEAD, FULL, LINUX, Watch, Worker, Workers, own_signals, possible_workers


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
            multiprocessing_context=Workers(self.processes) if several and LINUX else None,
            # DataLoader draws a seed at every start; from the global generator that would disturb other draws.
            generator=generator("loader"),
        )

    def __iter__(self) -> Iterator[Batch]:
        """Raises a `UserError`: an image cannot be read, or a process that decodes was killed or is stuck."""
        watch = Watch(self.processes, self.num_workers > 0)
        try:
            batches = self._start(watch)
            while (batch := watch.during(lambda: next(batches, None))) is not None:
                yield batch
        except (UserError, RuntimeError, OSError, EOFError) as error:
            broken = isinstance(error, (OSError, EOFError))  # connections end a little before the process does
            clean = watch.found(seconds=1.0 if broken else 0.0) or clean_worker_error(error) or error
            watch.end()  # torch would wait seconds for each, and they perhaps for a dead one
            raise clean from None
        finally:
            watch.close()

    def __len__(self) -> int:
        return len(self.loader)

    def _start(self, watch: Watch) -> Iterator[Batch]:
        before = signal.getsignal(signal.SIGCHLD)
        try:
            return watch.during(lambda: iter(self.loader))
        except OSError as error:
            reason = f"cannot start the {self.num_workers} processes that decode images ({error.strerror})"
            raise UserError(f"{reason}: lower num_workers") from error
        finally:
            # torch has the end of a worker raise an error wherever the main process is, be it in the middle of saving.
            if signal.getsignal(signal.SIGCHLD) != before:
                signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


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

    A DataLoader re-raises a worker's exception as the same type, its message being the worker's whole traceback.
    """
    if "unable to allocate shared memory" in str(error):
        return UserError(FULL)
    if not isinstance(error, UserError):
        return None
    kind = f"{type(error).__module__}.{type(error).__qualname__}: "
    lines = [line for line in str(error).splitlines() if line.startswith(kind)]
    return type(error)(lines[-1].removeprefix(kind)) if lines else error


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
