"""Class frequencies of unlabelled images, found from a classifier that was made for other ones.

Everything here takes scores s = z/T − log p [n, C], p being the class prior of which softmax(z/T) is the posterior: the
log likelihood of each class up to a constant of the image. The posterior under a prior q is softmax(s + log q).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PSEUDO = 0.5
"""Images of each class that a count begins with (Krichevsky and Trofimov 1981): few images say little about a class."""
MOST, TOLERANCE = 500, 1e-5
"""Iterations at most, and the change (sum over classes) that ends them."""
INNER = 4
"""Iterations on a batch of a stream."""
HOTTEST = 20.0
"""Bound of temperatures, and its inverse."""


def frequencies(counts: Tensor) -> Tensor:
    """Counts [C], which need not be whole → class frequencies [C] in fp64, none of them 0."""
    counts = counts.double() + PSEUDO
    return counts / counts.sum()


def maximum_likelihood(scores: Tensor) -> Tensor:
    """argmax_q Π_i Σ_c q_c exp s_ic · Π_c q_c^½ by expectation maximisation, [C].

    q ← mean of the posteriors under q (Saerens et al. 2002; with calibrated posteriors Alexandari et al. 2020), in
    matrix–vector products alone. The problem is concave, so the start does not matter. Every two iterations are
    extrapolated (SQUAREM, Varadhan and Roland 2008, scheme 3) where that is the better q.
    """
    ratios = _ratios(scores)
    prior = torch.full_like(ratios[0], 1 / ratios.shape[1])
    for _ in range(MOST):
        before, first = prior, _update(ratios, prior)
        prior = _update(ratios, first)
        change, bend = first - before, prior - 2 * first + before
        length = change.norm() / bend.norm().clamp_min(1e-30)
        leap = before + 2 * length * change + length**2 * bend
        if leap.min() > 0 and _log_posterior(ratios, leap) > _log_posterior(ratios, prior):
            prior = leap
        if (prior - before).abs().sum() < TOLERANCE:
            break
    return prior.double() / prior.double().sum()


def _ratios(scores: Tensor) -> Tensor:
    return (scores - scores.amax(1, keepdim=True)).exp()


def _update(ratios: Tensor, prior: Tensor) -> Tensor:
    counts = prior * (ratios.T @ (1 / (ratios @ prior))) + PSEUDO
    return counts / counts.sum()


def _log_posterior(ratios: Tensor, prior: Tensor) -> Tensor:
    return (ratios @ prior).double().log().sum() + PSEUDO * prior.double().log().sum()


def stream(scores: Tensor, batches: Sequence[Tensor]) -> Tensor:
    """The estimate after each batch of rows [steps, C]: running sums of posteriors.

    A batch is added with the posteriors under the estimate that it leads to itself; those of earlier batches stay.
    """
    counts = scores.new_full((scores.shape[1],), PSEUDO)
    found = []
    for rows in batches:
        ratios, total = _ratios(scores[rows]), counts
        for _ in range(INNER):
            total = counts + total * (ratios.T @ (1 / (ratios @ total)))
        counts = total
        found.append(counts / counts.sum())
    return torch.stack(found).double()


def black_box(scores: Tensor, val_scores: Tensor, val_labels: Tensor) -> Tensor:
    """q of M q = μ, where M_cy is the mean softmax(s)_c of validation images of class y, μ_c that of test images, [C].

    Black box shift estimation with a soft confusion matrix (Lipton et al. 2018): least squares, cut at 0. The
    validation split has images of every class.
    """
    classes = scores.shape[1]
    of_class = F.one_hot(val_labels, classes).to(scores.dtype)  # [m, C]
    confusion = val_scores.softmax(1).T @ (of_class / of_class.sum(0))  # M [C, C]
    mean = scores.softmax(1).mean(0)
    found = torch.linalg.lstsq(confusion.double(), mean.double().unsqueeze(1), driver="gelsd").solution.squeeze(1)
    found = found.clamp_min(0)
    return frequencies(len(scores) * found / found.sum())


def temperature(logits: Tensor, shift: Tensor, labels: Tensor) -> float:
    """T > 0 with the least mean of −log softmax(z/T + b)_y (Guo et al. 2017), which is convex in 1/T.

    Newton's method between bounds that close in.

    Args:
        logits: z [n, C]; labels: y [n].
        shift: b [C], log of the labels' class frequencies over those that the logits assume.
    """
    logits = (logits - logits.amax(1, keepdim=True)).double()
    own = logits.gather(1, labels.unsqueeze(1)).mean()
    low, high, inverse = 1 / HOTTEST, HOTTEST, 1.0
    for _ in range(60):
        posterior = (inverse * logits + shift).softmax(1)
        mean = (posterior * logits).sum(1)
        slope = float(mean.mean() - own)
        curve = float(((posterior * logits.square()).sum(1) - mean.square()).mean())
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        new = inverse - slope / max(curve, 1e-12)
        new = new if low < new < high else (low * high) ** 0.5
        if abs(new - inverse) < 1e-6 * inverse:
            break
        inverse = new
    return 1 / inverse


def kl(true: Tensor, found: Tensor) -> float:
    """KL(true ‖ found) of two class frequencies [C]."""
    return float(torch.xlogy(true, true / found).sum())
