"""Checkpoints that other people's code has written: LIFT, PEL, RIDE, SADE, BatchFormer."""

from collections.abc import Sequence
from typing import Any

from tailtune.trainers.foreign_checkpoints import lift, ride
from tailtune.trainers.foreign_checkpoints.checkpoint_file import ForeignCheckpoint
from tailtune.trainers.foreign_checkpoints.class_numbering import Numbering
from tailtune.trainers.methods import Method


def load_foreign_checkpoint(
    file: ForeignCheckpoint, method: Method, tuners: Sequence[str], partial: Any, numbering: Numbering | None = None
) -> str:
    """Fill a method from a checkpoint file of other people's code, strictly; returns a report in words.

    Args:
        tuners: names of ours that are on.
        partial: the option.
        numbering: of the classes in the data, where others may have another.

    Raises:
        UserError: it cannot be read, or does not fit.
    """
    if ride.is_ride(file):
        return ride.load(file, method, numbering)
    return lift.load(file, method.model, tuners, partial, numbering)
