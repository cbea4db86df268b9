"""Loads batches of a view, in this process or in worker processes; failures of workers become one-line errors."""

import signal
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm

from tailtune.configs.errors import UserError
from tailtune.configs.machine import available_processors, local_processes
from tailtune.configs.seeding import generator
from tailtune.datasets.loading.input_times import InputTimes
from tailtune.datasets.loading.samplers import StepSampler
from tailtune.datasets.loading.workers import (
    LINUX,
    PREFETCHED_BATCHES,
    SHARED_MEMORY_FULL,
    Worker,
    WorkerContext,
    WorkerMonitor,
    set_worker_signals,
    usable_workers,
)
from tailtune.datasets.view import PADDING, Batch, View

CPU = torch.device("cpu")
MOST_WORKERS = 16
"""More workers are started only if the option `num_workers` says so. They rarely help, and each takes memory."""
FEWEST_IMAGES = 256
"""So few images are decoded before workers would have started."""


class Loader:
    """Iterates over finished batches of a view on a device.

    If a worker process fails, all workers are ended and a `UserError` is raised.

    Args:
        view: the images.
        batches: the batch sampler: iterable of lists of keys of the view, with a length.
        num_workers: worker processes that decode images; 0 decodes in this process, None chooses the number.
        max_images: images of the largest batch.
        persistent: keep the workers from one iteration to the next.
        device: where the batches are finished.
        title: text of the progress bar; empty: there is none.
    """

    def __init__(
        self,
        view: View,
        batches: Any,
        num_workers: int | None,
        max_images: int,
        persistent: bool,
        device: torch.device,
        title: str = "",
    ) -> None:
        self.view, self.device, self.title = view, device, title
        # The memory is estimated from the size that the transform gives to a square image.
        wanted = chosen_workers(view) if num_workers is None else num_workers if len(view) and view.decodes else 0
        self.num_workers = usable_workers(
            wanted, lambda: local_processes() * max_images * view[PADDING]["image"].numel()
        )
        self.times = InputTimes(self.num_workers, min(MOST_WORKERS, available_processors() // local_processes()))
        self.processes: list[Worker] = []
        has_workers = self.num_workers > 0
        self.loader: DataLoader[Batch] = DataLoader(
            view,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=_in_shared_memory,  # type: ignore[arg-type]  # `View.__getitems__` gives whole batches
            persistent_workers=persistent and has_workers,
            worker_init_fn=set_worker_signals,
            pin_memory=device.type == "cuda",
            prefetch_factor=PREFETCHED_BATCHES if has_workers else None,
            multiprocessing_context=WorkerContext(self.processes) if has_workers and LINUX else None,
            # DataLoader draws a seed at every start. From the global generator this would change later draws.
            generator=generator("loader"),
        )

    def __iter__(self) -> Iterator[Batch]:
        """The batches, as `View.finish` returns them.

        Raises:
            UserError: an image cannot be read, or a worker was killed or hangs.
        """
        monitor = WorkerMonitor(self.processes, self.num_workers > 0)
        started = perf_counter()
        bar = tqdm(
            total=len(self), desc=self.title, unit="batch", delay=2, leave=False, disable=None if self.title else True
        )
        try:
            batches = self._start(monitor)
            while True:
                batch = monitor.waiting(lambda: next(batches, None))
                self.times.waited += perf_counter() - started
                if batch is None:
                    return
                yield self._finished(batch)
                started = perf_counter()
                bar.update()
        except (UserError, RuntimeError, OSError, EOFError) as error:
            disconnected = isinstance(error, (OSError, EOFError))  # a connection ends shortly before its process does
            failure = monitor.failure(wait_seconds=1.0 if disconnected else 0.0)
            monitor.end_workers()  # torch would wait several seconds for each of them
            raise failure or clean_worker_error(error) or error from None
        finally:
            bar.close()
            monitor.close()

    def __len__(self) -> int:
        return len(self.loader)

    def _finished(self, batch: Batch) -> Batch:
        if (seconds := batch.pop("seconds", None)) is not None:
            self.times.stages += seconds.numpy()
        started = perf_counter()
        batch = self.view.finish({name: _moved(value, self.device) for name, value in batch.items()})
        self.times.finished += perf_counter() - started
        self.times.images += len(batch["label"]) * (2 if "partner" in batch else 1)
        return batch

    def _start(self, monitor: WorkerMonitor) -> Iterator[Batch]:
        earlier_handler = signal.getsignal(signal.SIGCHLD)
        try:
            return monitor.waiting(lambda: iter(self.loader))
        except OSError as error:
            reason = f"cannot start {self.num_workers} processes that decode images ({error.strerror})"
            raise UserError(f"{reason}: lower num_workers") from error
        finally:
            # torch installs a handler that raises when a worker ends, wherever the main process is at that moment,
            # for example in the middle of saving.
            if signal.getsignal(signal.SIGCHLD) != earlier_handler:
                signal.signal(signal.SIGCHLD, earlier_handler or signal.SIG_DFL)


def chosen_workers(view: View) -> int:
    """How many worker processes a view is worth.

    A batch that is cut out of memory at once is ready before a worker could send it. Other images get all processors,
    which the processes of a run on this machine share.

    Args:
        view: the images.
    """
    if not view.decodes or view.is_batched or len(view) < FEWEST_IMAGES:
        return 0
    return min(MOST_WORKERS, available_processors() // local_processes())


def eval_loader(
    view: View,
    batch_size: int,
    num_workers: int | None,
    rank: int = 0,
    world: int = 1,
    epoch: int = 0,
    device: torch.device = CPU,
    title: str = "",
) -> Loader:
    """Batches for evaluation: all ranks together see each image once, in the same number of batches of equal sizes.

    If the images do not divide evenly, some ranks get padding with `index` −1 and `weight` 0.

    Args:
        view: the images.
        batch_size: images of a batch on one rank.
        num_workers: worker processes that decode images; None chooses the number.
        rank: index of this process.
        world: number of processes.
        epoch: pass over the images. A random transform makes new draws in each.
        device: where the batches are finished.
        title: text of the progress bar, which rank 0 shows on a terminal if the pass takes more than two seconds;
            empty: there is no bar.
    """
    batches = _RankBatches(len(view), batch_size, rank, world, epoch)
    title = title if rank == 0 else ""
    return Loader(view, batches, num_workers, min(batch_size, len(batches.keys)), False, device, title)


def train_loader(view: View, sampler: StepSampler, num_workers: int | None, device: torch.device = CPU) -> Loader:
    """Micro-batches for training, in the order of a sampler. Each iteration starts at the sampler's position.

    Args:
        view: the training images.
        sampler: the order of the images.
        num_workers: worker processes that decode images; None chooses the number.
        device: where the batches are finished.
    """
    max_images = sampler.micro_batch_size * (1 if sampler.pair is None else 2)
    return Loader(view, sampler, num_workers, max_images, True, device)


def clean_worker_error(error: BaseException) -> UserError | None:
    """The one-line `UserError` that caused an exception of a loader.

    A DataLoader raises the exception of a worker again as the same type, with the worker's traceback as its message.

    Args:
        error: what the loader raised.

    Returns:
        The error without traceback, or None if the cause is no wrong input.
    """
    if "unable to allocate shared memory" in str(error):
        return UserError(SHARED_MEMORY_FULL)
    if not isinstance(error, UserError):
        return None
    kind = f"{type(error).__module__}.{type(error).__qualname__}: "
    lines = [line for line in str(error).splitlines() if line.startswith(kind)]
    return type(error)(lines[-1].removeprefix(kind)) if lines else error


class _RankBatches:
    """Batches of (index, epoch) keys for one rank. Every rank has the same number of keys, filled up with `PADDING`."""

    def __init__(self, length: int, batch_size: int, rank: int, world: int, epoch: int):
        share = -(-length // world)
        indices = list(range(rank, length, world))
        self.keys = [(index, epoch) for index in indices + [PADDING] * (share - len(indices))]
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self.keys[i : i + self.batch_size] for i in range(0, len(self.keys), self.batch_size))

    def __len__(self) -> int:
        return -(-len(self.keys) // self.batch_size)


def _in_shared_memory(batch: Batch) -> Batch:
    """In a worker, move the batch to shared memory.

    If the shared memory is full, an error raised here reaches the main process. If the queue moved the batch instead,
    the error would end a thread of the queue, and the main process would wait for ever.
    """
    if get_worker_info() is not None:
        for value in batch.values():
            for tensor in value if isinstance(value, list) else [value]:
                tensor.share_memory_()
    return batch


def _moved(value: Any, device: torch.device) -> Any:
    return [_moved(item, device) for item in value] if isinstance(value, list) else value.to(device, non_blocking=True)
