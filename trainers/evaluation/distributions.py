"""Results on test sets with other class frequencies, computed from the logits of one pass over all test images."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from torch import Tensor

from tailtune.datasets.data_bundle import TestDistribution
from tailtune.datasets.long_tail import SHOT_GROUPS
from tailtune.datasets.test_distributions.dirichlet import component_of
from tailtune.trainers.evaluation.inference import Logits, rows_of
from tailtune.trainers.evaluation.metrics import evaluate_predictions

Results = dict[str, dict[str, Any]]
SUMMARISED = ("accuracy", "mean_acc", *SHOT_GROUPS)


def plain_results(found: Logits, distributions: Sequence[TestDistribution], groups: Mapping[str, Tensor]) -> Results:
    """Evaluate the mean of the experts' logits on every test distribution.

    Args:
        found: logits of all test images.
        distributions: the test distributions, as positions of images in the test split.
        groups: `many`, `med`, `few` → class indices.

    Returns:
        The entry `distributions` of metrics.json; a distribution without readable images is left out.
    """
    if not distributions:
        return {}
    predictions = found.summary.predictions
    class_accuracies = evaluate_predictions(predictions, groups)["per_class_acc"]
    results: Results = {}
    for distribution in distributions:
        rows = rows_of(found, distribution.positions)
        if not len(rows):  # max_test_images can leave none of its images
            continue
        results[distribution.name] = {
            "n": len(rows),
            "origin": distribution.origin,
            "expected_accuracy": expected_accuracy(class_accuracies, distribution.counts.tolist()),
            "predictors": {"plain": evaluate_predictions(predictions.at(rows), groups)},
        }
    return results


def dirichlet_summary(results: Results) -> dict[str, Any]:
    """The entry `dirichlet` of metrics.json: statistics over the test sets drawn from each Dirichlet component.

    The statistics are the mean and the sample standard deviation (n − 1). The original code does not compute them.

    Args:
        results: results of all test distributions.

    Returns:
        Component or `all` → `draws` (number of test sets) and `predictors`. `predictors` maps a predictor (`plain`, an
        entry of ADAPTS, `target_prior`) to metric → {mean, std}. Both are None if a draw has no value; std is also None
        with one draw. The result is empty without drawn test sets.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, result in results.items():
        if part := component_of(name):
            groups.setdefault(part, []).append(result["predictors"])
    if groups:
        groups["all"] = [predictors for group in groups.values() for predictors in group]
    return {name: {"draws": len(group), "predictors": _spread(group)} for name, group in groups.items()}


def _spread(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and deviation of each predictor that occurs in all draws; `group` has the predictors of each draw."""
    spread = {}
    for name in group[0]:
        if all(name in predictors for predictors in group):
            draws = {metric: [predictors[name][metric] for predictors in group] for metric in SUMMARISED}
            spread[name] = {metric: _mean_and_std(values) for metric, values in draws.items()}
    return spread


def _mean_and_std(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "std": None}
    return {"mean": fmean(known), "std": stdev(known) if len(known) > 1 else None}


def expected_accuracy(classes: Sequence[float | None], counts: Sequence[int]) -> float | None:
    """Expected accuracy of a test set with n_k random images of each class: Σ_k n_k · accuracy_k / Σ_k n_k.

    Args:
        classes: accuracy of each class on the whole test set, in %; None for a class without images.
        counts: number n_k of images of each class.

    Returns:
        Accuracy in %; None if the accuracy of a class with n_k > 0 is not known, or if all n_k are 0.
    """
    pairs = [(accuracy, count) for accuracy, count in zip(classes, counts, strict=True) if count]
    known = [(accuracy, count) for accuracy, count in pairs if accuracy is not None]
    if not known or len(known) < len(pairs):
        return None
    return sum(accuracy * count for accuracy, count in known) / sum(count for _, count in known)
