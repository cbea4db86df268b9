"""The temperature of a finished run's logits, fitted on the stored logits of its validation images."""

from collections.abc import Callable
from pathlib import Path

from tailtune.trainers.evaluation.logit_files import VAL_LOGITS, open_logits
from tailtune.trainers.evaluation.target_prior import fitted_temperature
from tailtune.trainers.methods import Method


def stored_temperature(home: Path, outline: Callable[[], Method]) -> float | None:
    """The temperature T as `target_prior` fits it: softmax(z/T) is calibrated under the prior that the logits assume.

    Args:
        home: folder of the run.
        outline: gives the method that computed its logits, without weights; it knows that prior.

    Returns:
        None if the run has evaluated no validation images.

    Raises:
        Damaged: the file of the logits has changed since the run wrote it.
    """
    path = home / VAL_LOGITS
    if not path.exists():
        return None
    _, val = open_logits(path)
    return fitted_temperature(val, outline().assumed_prior().cpu().mean(0).log_softmax(0))
