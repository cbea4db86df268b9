"""Inference: one pass over the images gives the logits of every expert. All results are computed from these logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from accelerate import Accelerator
from torch import Tensor

from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.datasets.view import View
from tailtune.trainers.distributed import gather_to_main, on_main
from tailtune.trainers.evaluation.row_summary import RowSummary
from tailtune.trainers.evaluation.rows import HalfRows, Rows
from tailtune.trainers.storage.large_tensors import Scratch


@dataclass(frozen=True)
class Logits:
    """Logits of the images that could be read, in the order of the split."""

    logits: Rows
    """Logits of each expert [N, E, C], or of each of several views [N, V, E, C]; fp32. They may lie in a file."""
    labels: Tensor
    """Label of each image [N]."""
    index: Tensor
    """Position of each image in the split [N], ascending."""
    bad_images: int = 0
    """Number of images of the split that could not be read in this pass."""
    left_out: int = 0
    """Number of images that were known to be unreadable before, so that the split does not contain them."""
    measured: RowSummary | None = None
    """The summary, if it was made when the logits were computed."""

    @cached_property
    def summary(self) -> RowSummary:
        """What the metrics and checks need to know of each image's logits [N, E, C]."""
        return self.measured or RowSummary.of(self.logits, self.labels)

    def notes(self, max_images: int | None) -> dict[str, bool]:
        """What these images lack: a note for metrics.json → whether it is a warning.

        Args:
            max_images: number of images that the evaluation asks for; None: all.
        """
        asked, notes = len(self.labels) + self.bad_images, {}
        if self.bad_images:
            notes[f"{self.bad_images} of {asked} images could not be read and are left out"] = True
        if asked == max_images:
            notes[f"max_test_images {asked}: not all images"] = False
        return notes


Predict = Callable[[Tensor | list[Tensor]], Tensor]
"""Images of a batch → expert logits [B, E, C], or [B, V, E, C] for several views."""


@torch.no_grad()
def infer(
    predict: Predict,
    view: View,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int | None,
    epoch: int = 0,
    scratch: Scratch = Scratch(),  # noqa: B008
    summarised: bool = False,
    title: str = "",
) -> Logits | None:
    """Run `predict` on every image of a view once. The images are divided among the processes.

    Args:
        predict: computes the logits of a batch.
        view: the images and their transform.
        accelerator: device and processes.
        batch_size: number of images that a process computes at once.
        num_workers: number of processes that decode images, for each process of the run; None chooses it.
        epoch: number that selects the random draws, if the transform is random.
        scratch: gives room for the logits. Large ones are kept in half precision, as in files.
        summarised: also make the summary of the logits, which are then [N, E, C], before they lose precision.
        title: text of the progress bar, as for `eval_loader`.

    Returns:
        The logits, on the CPU of the first process; None on the other processes.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    collected = CollectedLogits(len(view), scratch, summarised)
    loader = eval_loader(view, batch_size, num_workers, rank, world, epoch, accelerator.device, title)
    for number, batch in enumerate(loader):
        out = predict(batch["image"]).float()
        if number == 0:  # without space on the disk, no process goes on
            on_main(accelerator, partial(collected.reserve, out.shape[1:]))
        gathered = gather_to_main(accelerator, (out, batch["label"], batch["index"], batch["weight"]))
        if gathered is None:
            continue
        out, label, index, weight = gathered
        real = (index >= 0) & (weight > 0)
        collected.add(*((out, label, index) if real.all() else (out[real], label[real], index[real])))
    return collected.all()


class CollectedLogits:
    """The logits of the batches so far.

    Args:
        count: number of images of the view.
        scratch, summarised: as for `infer`.
    """

    def __init__(self, count: int, scratch: Scratch, summarised: bool) -> None:
        self.count, self.scratch, self.summarised = count, scratch, summarised
        self.rows: Tensor | HalfRows | None = None
        """Logits of all images of the view; None before `reserve`, which only the first process calls."""
        self.labels = self.readable = torch.empty(0)
        self.summary: RowSummary | None = None

    def reserve(self, row: Sequence[int]) -> None:
        """Make room for logits, of which those of an image have the shape `row`."""
        shape = (self.count, *row)
        self.labels = torch.zeros(self.count, dtype=torch.int64)
        self.readable = torch.zeros(self.count, dtype=torch.bool)
        self.rows = HalfRows.empty(shape, self.scratch) if self.scratch.is_large(shape) else torch.zeros(*shape)
        self.summary = RowSummary.empty(shape) if self.summarised else None

    def add(self, logits: Tensor, labels: Tensor, index: Tensor) -> None:
        """Add logits and labels of images at some positions in the view."""
        assert self.rows is not None, "reserve comes first"
        self.rows[index], self.labels[index], self.readable[index] = logits, labels, True
        if self.summary is not None:
            self.summary.fill(index, logits, labels)

    def all(self) -> Logits | None:
        """The logits of the readable images; None if there is no room for any."""
        if self.rows is None:
            return None
        rows, index = self.rows, self.readable.nonzero().squeeze(1)
        bad_images = len(self.labels) - len(index)
        summary = self.summary and self.summary.at(index)
        if bad_images:  # this is rare, and without it nothing is copied
            rows = rows.at(index) if isinstance(rows, HalfRows) else rows[index]
        return Logits(rows, self.labels[index], index, bad_images, measured=summary)


def rows_of(found: Logits, positions: Tensor) -> Tensor:
    """The rows of `found` that hold the images at some positions in the split.

    Args:
        found: logits of the images that could be read.
        positions: positions in the split [n].

    Returns:
        Row numbers, in the order of `positions`, at most n. Images that could not be read are left out.
    """
    rows = torch.searchsorted(found.index, positions).clamp_max(len(found.index) - 1)
    return rows[found.index[rows] == positions]
