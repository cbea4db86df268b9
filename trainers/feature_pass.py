"""`encoded_once`: one pass over images gives their features, which the first process collects."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.datasets.view import View
from tailtune.trainers.distributed import gather_to_main


@torch.no_grad()
def encoded_once(
    view: View,
    encode: Callable[[Tensor], Tensor],
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int | None,
) -> tuple[Tensor, Tensor] | None:
    """Encode every image of a view.

    Each batch belongs to one process as a whole, so the batches are the same for any number of processes.

    Args:
        view: the images.
        encode: images of a batch → features [B, …].
        accelerator: device and processes. All must call this together.
        batch_size: number of images that a process encodes at once.
        num_workers: as for `eval_loader`.

    Returns:
        Features [N, …] and which images could be read, bool [N], on the CPU of the first process; None on the others.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = torch.arange(len(view)).split(batch_size)
    rows = len(batches[0])

    def positions(process: int, number: int) -> Tensor:
        """The images of a process's batch. If the batches run out in the last round, it repeats one of the first."""
        return batches[(number * world + process) % len(batches)]

    own = torch.cat([positions(rank, number) for number in range(-(-len(batches) // world))])
    share, title = view if world == 1 else view.take(own.numpy()), "features" * (rank == 0)
    features, readable = torch.empty(0), torch.zeros(len(view), dtype=torch.bool)
    for number, batch in enumerate(eval_loader(share, batch_size, num_workers, device=accelerator.device, title=title)):
        found = encode(batch["image"])
        gathered = gather_to_main(accelerator, [_filled(each, rows) for each in (found, batch["weight"] > 0)])
        if gathered is None:
            continue
        if number == 0:
            features = gathered[0].new_empty(len(view), *found.shape[1:])
        for process in range(world):
            place = positions(process, number)
            features[place], readable[place] = (each[process * rows :][: len(place)] for each in gathered)
    return (features, readable) if accelerator.is_main_process else None


def _filled(tensor: Tensor, rows: int) -> Tensor:
    """The tensor with zeros below, so that it has as many rows as those of the other processes."""
    missing = rows - len(tensor)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor
