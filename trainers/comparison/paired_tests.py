"""Tests of the difference between two classifiers that answered the same test images."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
"""Number of bootstrap samples."""
CONFIDENCE = 95
"""Confidence level of the intervals, in %."""
AT_ONCE = 2**22
"""Number of counts that are drawn at once; it bounds the memory."""


@dataclass(frozen=True)
class Interval:
    """A difference with its bootstrap confidence interval, in percentage points."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class McNemar:
    """The exact test of McNemar: are images that only one of two runs gets right equally often those of either run?"""

    wins: int
    """Number of images that only this run gets right."""
    losses: int
    """Number of images that only the other run gets right."""
    p: float
    """Two-sided p-value."""


@dataclass(frozen=True)
class Paired:
    """A row compared with the first row, over the same test images."""

    row: str
    differences: Mapping[str, Interval] | None
    """Metric → difference to the first row: of the accuracy over all images, and over the classes of each group."""
    reason: str = ""
    """Why there is no comparison; empty if there is one."""
    mcnemar: McNemar | None = None
    """None for rows of several runs, because the test compares two runs."""
    by_class: np.ndarray | None = None
    """Difference of the accuracy of each class in percentage points, fp64 [C]; NaN for a class without images."""

    @property
    def classes(self) -> tuple[int, int, int]:
        """Number of classes on which this row is better than the first row, worse, and equal."""
        assert self.by_class is not None
        won, lost, tied = self.by_class > 0, self.by_class < 0, self.by_class == 0
        return int(won.sum()), int(lost.sum()), int(tied.sum())


def bootstrap(differences: np.ndarray, seed: int = 0) -> Interval:
    """The mean difference over images, with the percentile interval of the paired bootstrap.

    A sample of N images with replacement is drawn by the number of times that each value of the difference occurs. This
    is the same distribution as that of drawn images, and takes far less time, because there are few values.

    Args:
        differences: score of this run minus score of the other one, for each image, [N]; a score is 0 to 1.
        seed: seed of the samples.

    Returns:
        Difference and interval in percentage points.
    """
    values, counts = np.unique(differences, return_counts=True)
    draws, total = np.random.default_rng(seed), len(differences)
    step = max(1, AT_ONCE // len(values))
    sizes = [min(step, RESAMPLES - first) for first in range(0, RESAMPLES, step)]
    means = [draws.multinomial(total, counts / total, size=size) @ values / total for size in sizes]
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Interval(100 * float(np.mean(differences)), 100 * float(low), 100 * float(high))


def mcnemar(correct: np.ndarray, other: np.ndarray) -> McNemar:
    """Compare two runs by the images that only one of them gets right.

    Args:
        correct: whether this run gets each image right, bool [N].
        other: the same of the other run, bool [N].
    """
    from scipy.stats import binomtest  # takes a second

    wins, losses = int((correct & ~other).sum()), int((~correct & other).sum())
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return McNemar(wins, losses, p)


def class_means(scores: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Mean score of the images of each class, fp64 [C], rounded to 12 digits; NaN for a class without images.

    The scores of several runs are rounded fractions. Without rounding, equal classes could differ by 1e-17, and would
    count as won or lost.

    Args:
        scores: score of each image [N].
        labels: label of each image, int64 [N].
        classes: number C of classes.
    """
    sums, counts = (np.bincount(labels, weights, minlength=classes) for weights in (scores, None))
    return np.divide(sums, counts, out=np.full(classes, np.nan), where=counts > 0).round(12)


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Weights of images whose weighted mean is the mean over classes of the class means, fp64 [N].

    All are 1 if the classes have equally many images. The bootstrap takes the weights as fixed, and draws from all
    images. So its intervals contain the differences between classes, too, and are wider than those of images drawn
    class by class. Those would be too narrow for classes of few images: 89 % instead of 95 % with three.

    Args:
        labels: label of each image, int64 [N].
    """
    _, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weights: np.ndarray = len(labels) / (len(counts) * counts[which])
    return weights
