"""The temperature of a finished run's logits, fitted on the stored logits of its validation images."""

import logging
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from tailtune.trainers.evaluation.logit_files import VAL_LOGITS, open_logits, stored_logits
from tailtune.trainers.evaluation.target_prior import fitted_temperature

log = logging.getLogger("tailtune")


def stored_temperature(home: Path, crop_margin: int | None, assumed: Callable[[], Tensor]) -> float | None:
    """The temperature T as `target_prior` fits it: softmax(z/T) is calibrated under the prior that the logits assume.

    z are the logits of one view of an image, which is what an export computes; means over views have another T.
    Logits of the same crop as the export's are preferred.

    Args:
        home: folder of the run.
        crop_margin: the option of the export.
        assumed: gives the logarithm of that prior [E, C].

    Returns:
        None if the run has evaluated no validation images, or only means over views (`tte`).

    Raises:
        Damaged: the file of the logits has changed since the run wrote it.
    """
    path = home / VAL_LOGITS
    if not path.exists():
        return None
    key, val = open_logits(path)
    if stored := stored_logits(home, {**key, "tte": False, "crop_margin": crop_margin}, VAL_LOGITS):
        _, val = stored
    elif key.get("tte"):
        log.warning(
            "warning: the export has no temperature, because the run was evaluated with tte and an export sees one "
            "view; evaluate it with `test_only True tte False` first"
        )
        return None
    return fitted_temperature(val, assumed().cpu().mean(0).log_softmax(0))
