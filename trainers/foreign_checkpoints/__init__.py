"""Checkpoints that the code of other projects has written: LIFT, PEL, RIDE, SADE, BatchFormer."""

from collections.abc import Sequence
from typing import Any

from tailtune.trainers.foreign_checkpoints import lift, ride
from tailtune.trainers.foreign_checkpoints.checkpoint_file import ForeignCheckpoint
from tailtune.trainers.foreign_checkpoints.class_numbering import Numbering
from tailtune.trainers.methods import Method


def load_foreign_checkpoint(
    file: ForeignCheckpoint, method: Method, tuners: Sequence[str], partial: Any, numbering: Numbering | None = None
) -> str:
    """Fill a method from a checkpoint file of another project; every tensor must fit.

    Args:
        file: the file.
        method: the method to fill.
        tuners: names of the tuners of TUNERS that are on.
        partial: the option.
        numbering: how the data number their classes, if other projects may number them differently.

    Returns:
        A report in words.

    Raises:
        UserError: the file cannot be read, or does not fit.
    """
    if ride.is_ride(file):
        return ride.load(file, method, numbering)
    return lift.load(file, method.model, tuners, partial, numbering)
