"""The temperature of a finished run's logits, fitted on the stored logits of its validation images."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from tailtune.trainers.evaluation.logit_files import VAL_LOGITS, open_logits
from tailtune.trainers.evaluation.target_prior import fitted_temperature


def stored_temperature(home: Path, assumed: Callable[[], Tensor]) -> float | None:
    """The temperature T as `target_prior` fits it: softmax(z/T) is calibrated under the prior that the logits assume.

    Args:
        home: folder of the run.
        assumed: gives the logarithm of that prior [E, C].

    Returns:
        None if the run has evaluated no validation images.

    Raises:
        Damaged: the file of the logits has changed since the run wrote it.
    """
    path = home / VAL_LOGITS
    if not path.exists():
        return None
    _, val = open_logits(path)
    return fitted_temperature(val, assumed().cpu().mean(0).log_softmax(0))
