"""Sentences about a training that its result records, because they change what the numbers mean."""

from collections.abc import Iterator, Mapping, Sequence

from tailtune.datasets.sources.class_names import same_names
from tailtune.datasets.splits.split_records import Record
from tailtune.trainers.runs.metrics_file import TrainReport


def of_settings(
    asked: str, used: str, drw_epoch: int | None, lr_steps: Sequence[int] | None, epochs: int
) -> Iterator[str]:
    """Notes about settings that have no effect in this run.

    Args:
        asked, used: the option `prec`, and the precision that is used.
        drw_epoch, lr_steps: the options of these names.
        epochs: number of epochs of the run.
    """
    if used != asked:
        yield f"prec {asked} needs a CUDA GPU; training in {used}"
    if drw_epoch is not None and drw_epoch >= epochs:
        yield f"drw_epoch {drw_epoch} never comes: the last epoch is {epochs - 1}"
    if lr_steps and lr_steps[0] >= epochs:
        yield f"lr_steps {lr_steps} never come: the last epoch is {epochs - 1}"


def of_data(classnames: str | None, names: Sequence[str], records: Mapping[str, Record]) -> Iterator[str]:
    """Notes about class names that say nothing to a text encoder, and about validation images that are test images.

    Args:
        classnames: the option. In the known set `imagenet` two names stand for two classes each, which is no mistake.
        names: the names of the C classes; empty if no text encoder reads them.
        records: split → its images.
    """
    if names and names[0] == "class 0":
        yield "the classes have no names, so their text features say nothing; set classnames to a file of names"
    elif classnames != "imagenet" and (same := same_names(names)):
        yield same
    test, val = (set(records[name].paths) if name in records else set() for name in ("test", "val"))
    if test & val:
        yield (
            f"{len(test & val)} of {len(val)} validation images are test images, too: what is chosen by them (keep, "
            "patience, a temperature) is chosen by the test"
        )


def of_micro_batch(size: int, batch_size: int) -> str:
    """Note about a loss or batch norm that couples `size` of the `batch_size` images of a step."""
    return (
        f"the loss or a batch norm couples the images that a process holds at once, here {size} of batch_size "
        f"{batch_size}: another micro_batch_size or number of processes is another run"
    )


def of_report(report: TrainReport) -> Iterator[str]:
    """Notes about what a training has left out."""
    if report.bad_images:
        yield f"training left out unreadable images {report.bad_images} times"
    if report.skipped_steps:
        yield f"{report.skipped_steps} of {report.steps} steps were skipped: fp16 overflowed"
