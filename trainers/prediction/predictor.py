"""`Predictor`: from logits of a run to class probabilities, with its temperature and a target prior."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.evaluation.rows import Rows, slices
from tailtune.trainers.evaluation.scores import scores_of, shifted
from tailtune.trainers.evaluation.target_prior import Case, Target
from tailtune.trainers.prediction.tables import TOP, Top
from tailtune.trainers.storage.large_tensors import Scratch


@dataclass(frozen=True)
class Predictor:
    """How the logits of a run become class probabilities."""

    class_names: Sequence[str]
    """C names in the order of the logits."""
    train: Tensor
    """Class frequencies of the training images, [C]."""
    prior: Tensor
    """log p, fp32 [C]: the class prior for which softmax of the logits is the posterior."""
    temperature: float
    val: Logits | None
    """Logits of the validation images; None if the run has stored none."""
    target: Target | None
    """Finds the target prior; None: the predictions are for the prior p."""
    estimates: bool
    """Whether `target` reads the logits of all images."""
    batch_size: int
    """Number of images in a batch of an online estimate."""
    seed: int
    """Random seed of the order of the images in an online estimate."""

    def frequencies(self, found: Logits | None = None, scratch: Scratch = Scratch()) -> Rows | None:  # noqa: B008
        """The class frequencies that images are predicted for: [N, C], or [1, C] if they are equal for all images.

        Args:
            found: logits of all N images, if the target `estimates`.
            scratch: gives room for what is computed from them.

        Returns:
            The frequencies; None without a target.
        """
        if self.target is None:
            return None
        scores = torch.empty(0, len(self.prior)) if found is None else self._scores(found)
        val = None if self.val is None else (self._scores(self.val), self.val.labels)
        labels = torch.zeros(len(scores), dtype=torch.int64)  # the images have none; only the target `known` reads them
        return self.target(Case("predict", scores, labels, self.train, val, self.batch_size, self.seed, scratch)).used

    def log_odds(self, found: Logits, used: Rows | None) -> Rows:
        """Logits [n, C] whose softmax is the class probabilities.

        Args:
            found: logits of n images.
            used: what `frequencies` has returned.
        """
        return scores_of(found, self.temperature) if used is None else shifted(self._scores(found), used)

    def most_probable(self, log_odds: Rows) -> Iterator[tuple[slice, list[Top]]]:
        """The most probable classes of n images, a few images at a time.

        Args:
            log_odds: what `log_odds` has returned, [n, C].

        Yields:
            Which images; for each of them at most `TOP` classes.
        """
        for part in slices(log_odds):
            probabilities, labels = log_odds[part].softmax(1).topk(min(TOP, len(self.class_names)))
            pairs = zip(labels.tolist(), probabilities.tolist(), strict=True)
            yield part, [[(self.class_names[label], p) for label, p in zip(*row, strict=True)] for row in pairs]

    def _scores(self, found: Logits) -> Rows:
        return scores_of(found, self.temperature, self.prior)
