"""`load_foreign_checkpoint` loads a checkpoint file of another project into a method."""

from collections.abc import Sequence

from tailtune.trainers.foreign_checkpoints import lift, lift_plus, ride
from tailtune.trainers.foreign_checkpoints.checkpoint_file import ForeignCheckpoint
from tailtune.trainers.foreign_checkpoints.class_numbering import Numbering
from tailtune.trainers.methods import Method


def load_foreign_checkpoint(
    file: ForeignCheckpoint, method: Method, tuners: Sequence[str], numbering: Numbering | None = None
) -> str:
    """Load a checkpoint file of another project into a method. Every tensor must have the right name and shape.

    Args:
        file: the file.
        method: the method to fill.
        tuners: names of the tuners of TUNERS that are enabled.
        numbering: class numbering of the data; None if all projects number the classes in the same way.

    Returns:
        A report in words.

    Raises:
        UserError: the file cannot be read, or does not fit the method.
    """
    if ride.is_ride(file):
        return ride.load(file, method, numbering)
    if lift_plus.is_lift_plus(file):
        return lift_plus.load(file, method.model, tuners, numbering)
    return lift.load(file, method.model, tuners, numbering)
