"""Label shift: estimates class frequencies of unlabelled images, from a classifier trained for other frequencies.

The functions take scores s = z/T − log p [n, C], where p is the class prior for which softmax(z/T) is the correct
posterior. A score is the log likelihood of a class, up to a constant that depends only on the image. The posterior
under a class prior q is softmax(s + log q). Scores are read a few rows at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tailtune.trainers.evaluation.rows import Rows, slices
from tailtune.trainers.storage.large_tensors import Scratch

PSEUDO = 0.5
"""Pseudo-count added to the number of images of each class (Krichevsky and Trofimov 1981): no estimate becomes 0."""
MOST, TOLERANCE = 500, 1e-5
"""Largest number of iterations; iterations stop earlier when the change, summed over classes, is below TOLERANCE."""
INNER = 4
"""Number of iterations on each batch of a stream."""
HOTTEST = 20.0
"""Largest temperature; the smallest one is 1 / HOTTEST."""


def frequencies(counts: Tensor) -> Tensor:
    """Class frequencies [C] in fp64, all above 0, from counts of images of each class [C], which may be fractions."""
    counts = counts.double() + PSEUDO
    return counts / counts.sum()


def maximum_likelihood(scores: Rows, scratch: Scratch = Scratch()) -> Tensor:  # noqa: B008
    """Estimate q = argmax_q Π_i Σ_c q_c exp s_ic · Π_c q_c^½ by expectation maximisation.

    An iteration sets q to the mean of the posteriors under q (Saerens et al. 2002; with calibrated posteriors
    Alexandari et al. 2020). It needs only matrix–vector products. The problem is concave, so the start value does not
    matter. After every two iterations q is extrapolated (SQUAREM, Varadhan and Roland 2008, scheme 3), if the
    extrapolated q has a higher objective.

    Args:
        scores: s [n, C].
        scratch: gives room for exp s [n, C], which every iteration reads.

    Returns:
        Class frequencies [C] in fp64.
    """
    ratios = scratch.empty(scores.shape, scores.dtype)
    for part in slices(scores):
        ratios[part] = _ratios(scores[part])
    prior = torch.full((scores.shape[1],), 1 / scores.shape[1], dtype=scores.dtype)
    first, _ = _update(ratios, prior)
    for _ in range(MOST):
        before, prior = prior, _update(ratios, first)[0]
        change, bend = first - before, prior - 2 * first + before
        length = change.norm() / bend.norm().clamp_min(1e-30)
        leap = before + 2 * length * change + length**2 * bend
        first, reached = _update(ratios, prior)
        if leap.min() > 0:
            after_leap, reached_by_leap = _update(ratios, leap)
            if reached_by_leap > reached:
                prior, first = leap, after_leap
        if (prior - before).abs().sum() < TOLERANCE:
            break
    return prior.double() / prior.double().sum()


def _ratios(scores: Tensor) -> Tensor:
    return (scores - scores.amax(1, keepdim=True)).exp()


def _update(ratios: Rows, prior: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the posteriors under a prior [C], and the logarithm of the objective at this prior."""
    sums, reached = torch.zeros_like(prior), PSEUDO * prior.double().log().sum()
    for part in slices(ratios):
        rows = ratios[part]
        evidence = rows @ prior
        sums += rows.T @ (1 / evidence)
        reached = reached + evidence.double().log().sum()
    counts = prior * sums + PSEUDO
    return counts / counts.sum(), reached


def stream(scores: Rows, batches: Sequence[Tensor]) -> Tensor:
    """Estimate class frequencies while images arrive in batches, from running sums of the posteriors.

    The posteriors of a batch are computed under the estimate that includes this batch, by fixed-point iterations. The
    posteriors of earlier batches are not recomputed.

    Args:
        scores: s [n, C].
        batches: rows of `scores` in each batch.

    Returns:
        The estimate after each batch, [number of batches, C] in fp64.
    """
    counts = torch.full((scores.shape[1],), PSEUDO, dtype=scores.dtype)
    estimates = []
    for rows in batches:
        ratios, total = _ratios(scores[rows]), counts
        for _ in range(INNER):
            total = counts + total * (ratios.T @ (1 / (ratios @ total)))
        counts = total
        estimates.append(counts / counts.sum())
    return torch.stack(estimates).double()


def black_box(scores: Rows, val_scores: Rows, val_labels: Tensor) -> Tensor:
    """Black box shift estimation with a soft confusion matrix (Lipton et al. 2018).

    It solves M q = μ by least squares and clamps q to at least 0. M_cy is the mean of softmax(s)_c over the validation
    images of class y; μ_c is its mean over the test images.

    Args:
        scores: s of the test images [n, C].
        val_scores: s of the validation images [m, C].
        val_labels: labels of the validation images [m]; every class must occur.

    Returns:
        Class frequencies [C] in fp64.
    """
    classes = scores.shape[1]
    support = val_labels.bincount(minlength=classes)
    confusion = torch.zeros(classes, classes, dtype=scores.dtype)  # M transposed
    for part in slices(val_scores):
        labels = val_labels[part]
        confusion.index_add_(0, labels, val_scores[part].softmax(1) / support[labels].unsqueeze(1))
    mean = torch.zeros(classes, dtype=scores.dtype)
    for part in slices(scores):
        mean += scores[part].softmax(1).sum(0) / len(scores)
    confusion = confusion.T
    solution = torch.linalg.lstsq(confusion.double(), mean.double().unsqueeze(1), driver="gelsd").solution.squeeze(1)
    solution = solution.clamp_min(0)
    return frequencies(len(scores) * solution / solution.sum())


def temperature(logits: Rows, shift: Tensor, labels: Tensor) -> float:
    """Temperature scaling: the T > 0 that minimises the mean of −log softmax(z/T + b)_y (Guo et al. 2017).

    The objective is convex in 1/T. It is minimised by Newton's method, safeguarded by bisection of shrinking bounds.

    Args:
        logits: z [n, C].
        shift: b [C], log of (class frequencies of the labels / class frequencies that the logits assume).
        labels: y [n].
    """
    low, high, inverse = 1 / HOTTEST, HOTTEST, 1.0
    for _ in range(60):
        slope, curve = _derivatives(logits, shift, labels, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        new = inverse - slope / max(curve, 1e-12)
        new = new if low < new < high else (low * high) ** 0.5
        if abs(new - inverse) < 1e-6 * inverse:
            break
        inverse = new
    return 1 / inverse


def _derivatives(logits: Rows, shift: Tensor, labels: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the objective of `temperature` by 1/T, at 1/T = `inverse`."""
    slope = curve = 0.0
    for part in slices(logits):
        z = logits[part]
        z = (z - z.amax(1, keepdim=True)).double()
        posterior = (inverse * z + shift).softmax(1)
        mean = (posterior * z).sum(1)
        slope += float((mean - z.gather(1, labels[part].unsqueeze(1)).squeeze(1)).sum())
        curve += float(((posterior * z.square()).sum(1) - mean.square()).sum())
    return slope / len(logits), curve / len(logits)


def kl(true: Tensor, found: Tensor) -> float:
    """KL(true ‖ found) in nats, of true and estimated class frequencies [C]."""
    return float(torch.xlogy(true, true / found).sum())
