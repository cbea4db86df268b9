"""A test set of any class frequencies, from the logits of the one pass over the balanced test set."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from torch import Tensor

from tailtune.datasets.data_bundle import TestDistribution
from tailtune.datasets.long_tail import SHOT_GROUPS
from tailtune.datasets.test_distributions.dirichlet import component_of
from tailtune.trainers.evaluation.inference import Logits, rows_of
from tailtune.trainers.evaluation.metrics import evaluate
from tailtune.trainers.methods.base import combine

Results = dict[str, dict[str, Any]]
SUMMARISED = ("accuracy", "mean_acc", *SHOT_GROUPS)


def plain_results(found: Logits, distributions: Sequence[TestDistribution], groups: Mapping[str, Tensor]) -> Results:
    """Every distribution by the mean of the experts, as `distributions` of metrics.json holds it."""
    if not distributions:
        return {}
    logits = combine(found.logits)
    classes = evaluate(logits, found.labels, groups)["per_class_acc"]
    results: Results = {}
    for distribution in distributions:
        rows = rows_of(found, distribution.positions)
        if not len(rows):  # few images, cut by max_test_images
            continue
        results[distribution.name] = {
            "n": len(rows),
            "origin": distribution.origin,
            "expected_accuracy": expected_accuracy(classes, distribution.counts.tolist()),
            "predictors": {"plain": evaluate(logits[rows], found.labels[rows], groups)},
        }
    return results


def dirichlet_summary(results: Results) -> dict[str, Any]:
    """Mean and deviation over the drawn test sets of each component and over all, as `dirichlet` of metrics.json.

    The original leaves these to its reader; the deviation here is the sample's (n − 1).

    Args:
        results: of all distributions.

    Returns:
        Component or `all` → `draws`, and `predictors`: predictor (`plain`, entry of ADAPTS, `target_prior`) →
        metric → {mean, std}; null where a draw has no value, std also with one draw; nothing without drawn test sets.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, result in results.items():
        if part := component_of(name):
            groups.setdefault(part, []).append(result["predictors"])
    if groups:
        groups["all"] = [predictors for group in groups.values() for predictors in group]
    return {name: {"draws": len(group), "predictors": _spread(group)} for name, group in groups.items()}


def _spread(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and deviation of each predictor that all draws have; `group` has the predictors of each draw."""
    spread = {}
    for name in group[0]:
        if all(name in predictors for predictors in group):
            draws = {metric: [predictors[name][metric] for predictors in group] for metric in SUMMARISED}
            spread[name] = {metric: _mean_and_std(values) for metric, values in draws.items()}
    return spread


def _mean_and_std(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [each for each in values if each is not None]
    if len(known) < len(values):
        return {"mean": None, "std": None}
    return {"mean": fmean(known), "std": stdev(known) if len(known) > 1 else None}


def expected_accuracy(classes: Sequence[float | None], counts: Sequence[int]) -> float | None:
    """Σ_k n_k · accuracy_k / Σ_k n_k: what a draw of n_k images of each class from the whole test set gives on average.

    Args:
        classes: accuracy of each class on the whole test set; None where it has no image.
        counts: n_k.
    """
    pairs = [(each, count) for each, count in zip(classes, counts, strict=True) if count]
    known = [(each, count) for each, count in pairs if each is not None]
    if not known or len(known) < len(pairs):
        return None
    return sum(each * count for each, count in known) / sum(count for _, count in known)
