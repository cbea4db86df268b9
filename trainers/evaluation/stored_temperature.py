"""The temperature of a finished run's logits, fitted on the stored logits of its validation images."""

from pathlib import Path

import torch

from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.evaluation.label_shift import frequencies, temperature
from tailtune.trainers.evaluation.logit_files import VAL_LOGITS
from tailtune.trainers.evaluation.rows import HalfRows
from tailtune.trainers.evaluation.scores import scores_of
from tailtune.trainers.methods import Method
from tailtune.trainers.storage.manifest import check_file
from tailtune.trainers.storage.tensor_files import open_tensors


def stored_temperature(home: Path, method: Method) -> float | None:
    """The temperature T as `target_prior` fits it: softmax(z/T) is calibrated under the prior that the logits assume.

    Args:
        home: folder of the run.
        method: its method, which knows that prior.

    Returns:
        None if the run has evaluated no validation images.

    Raises:
        Damaged: the file of the logits has changed since the run wrote it.
    """
    path = home / VAL_LOGITS
    if not path.exists():
        return None
    check_file(path)
    tensors, _ = open_tensors(path)
    row_max, labels, index = (tensors[entry][:] for entry in ("row_max", "labels", "index"))
    val = Logits(HalfRows(tensors["logits"], row_max), labels, index)
    assumed = method.assumed_prior().cpu().mean(0).log_softmax(0)
    counted = frequencies(torch.bincount(labels, minlength=len(assumed)))
    return temperature(scores_of(val), counted.log() - assumed, labels)
