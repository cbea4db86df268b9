"""Reads the training curves from the event files of a run."""

import logging
from collections.abc import Mapping
from pathlib import Path

Curve = tuple[list[int], list[float]]
"""Steps and values."""
MOST_POINTS = 1000
"""Points of a curve that are kept. TensorBoard drops others at random."""


def read_curves(folder: Path) -> Mapping[str, Curve]:
    """Read the curves of training and of validation during the training.

    Args:
        folder: folder of the event files.

    Returns:
        Tag, such as `train/loss_avg`, → its curve. Dots in tags become underscores. Empty without event files.
    """
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing import event_accumulator  # takes half a second

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = event_accumulator.EventAccumulator(str(folder), {event_accumulator.SCALARS: MOST_POINTS}).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith(("train/", "val/")):
            points = events.Scalars(tag)
            found[tag.replace(".", "_")] = [point.step for point in points], [point.value for point in points]
    return found
