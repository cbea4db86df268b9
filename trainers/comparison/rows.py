"""Rows of a table of results: the finished runs that differ in nothing but their seed."""

import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tailtune.configs.errors import lookup, unknown
from tailtune.datasets.long_tail import shot_masks

METRICS = ("accuracy", "many_acc", "med_acc", "few_acc")
LOWER_IS_BETTER = ("error_rate", "ece", "nll", "bad_images")
DIGITS = {"nll": 3}
"""Metric → its decimals in a table. The others, which are in percent, have one."""
ALL_METRICS = (*METRICS, "macro_f1", "mean_acc", "worst_case_acc", "hmean_acc", "gmean_acc", *LOWER_IS_BETTER)
"""The metrics of metrics.json that are single numbers.

For a test distribution, a metric is `backward50.accuracy`. It uses the adapted weights of the run if there are any. A
metric of a named predictor is `backward50.plain.accuracy`.
"""

Result = dict[str, Any]
"""Content of a metrics.json, schema 2."""


@dataclass(frozen=True)
class Row:
    """A row of the table: the runs that differ in nothing but their seed."""

    data: str
    name: str
    wanted: int
    """Number of planned runs."""
    results: list[Result]
    """Results of the finished runs."""
    published: Mapping[str, str] = field(default_factory=dict)
    """Metric → number in the paper, as text."""
    folders: tuple[Path, ...] = ()
    """Folder of each result: a run folder, or a folder `tests/KEY` in it."""

    def values(self, metric: str) -> list[float]:
        """The values of a metric, of all runs that have measured it."""
        values = (number(result, metric) for result in self.results)
        return [value for value in values if value is not None]

    def ours(self, metric: str) -> str:
        """Mean ± standard deviation of a metric over the runs, and how many have measured it if not all, as text."""
        values, digits = self.values(metric), DIGITS.get(metric.rpartition(".")[2], 1)
        if not values:
            return "n/a" if self.results else "not run"
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        some = f" ({len(values)} of {len(self.results)})" if len(values) < len(self.results) else ""
        return f"{statistics.mean(values):.{digits}f}{spread}{some}"

    @property
    def tested(self) -> tuple[Hashable, ...]:
        """What the runs were tested on: data, fingerprint, whether training images, and their largest number."""
        about = self.results[0].get("evaluation", {}) if self.results else {}
        limit = about.get("max_test_images")
        return self.data, (about.get("images") or {}).get("test"), bool(about.get("test_train")), limit

    @property
    def groups(self) -> Hashable:
        """What makes many, medium and few of the classes of the first run; None if its result does not tell it."""
        if not self.results or (masks := masks_of(self.results[0])) is None:
            return None
        return tuple(mask.tobytes() for mask in masks.values())

    @property
    def runs(self) -> str:
        """Number of finished runs. If some are missing, also the number of planned runs."""
        done = len(self.results)
        return str(done) if done == self.wanted else f"{done} of {self.wanted}"

    @property
    def trained(self) -> str:
        """Number of trained parameters, of the tuners and the head, as text."""
        return f"{self.results[0]['params']['trainable']:,}" if self.results else ""


def number(result: Result, metric: str) -> float | None:
    """Read a single number of a result.

    Args:
        result: contents of a metrics.json.
        metric: such as `accuracy` on the test set; `backward50.accuracy` on a test distribution, with the adapted
            predictor if there is one; or `backward50.plain.accuracy` with a named predictor.

    Returns:
        The number; None if the number was not measured or is undefined.

    Raises:
        UserError: there is no such metric.
    """
    *place, name = metric.split(".")
    metrics = result["test"]
    if place:
        predictors = predictors_of(result, place[0])
        metrics = predictors.get(place[1] if len(place) == 2 else chosen_predictor(predictors))
    if metrics is None:
        return None
    numbers = {key: value for key, value in metrics.items() if not isinstance(value, (list, dict))}
    number_of_metric: float | None = lookup(numbers, name, "metric")
    return number_of_metric


def predictors_of(result: Result, distribution: str) -> dict[str, Any]:
    """Predictor → its metrics on a test distribution; empty if it was not evaluated on the distribution."""
    found: dict[str, Any] = result.get("distributions", {}).get(distribution, {}).get("predictors", {})
    return found


def chosen_predictor(predictors: Iterable[str]) -> str:
    """The predictor whose numbers a column such as `backward50.accuracy` has: the first adapted one, or `plain`."""
    return next((predictor for predictor in predictors if predictor != "plain"), "plain")


def masks_of(result: Result) -> dict[str, np.ndarray] | None:
    """`many`, `med`, `few` → whether each class is in the group, bool [C].

    Args:
        result: contents of a metrics.json.

    Returns:
        None if the result does not tell what defines the groups.
    """
    counts, options = result.get("class_counts"), result.get("evaluation", {})
    elsewhere = "subset_cap" in result or options.get("group_imb_factor") is not None
    if not counts or elsewhere or "many_above" not in options:
        return None
    return shot_masks(counts, options["many_above"], options["few_below"])


def check_metrics(metrics: Sequence[str]) -> None:
    """Check the names of metrics.

    Raises:
        UserError: a name is not in ALL_METRICS.
    """
    for metric in metrics:
        *place, name = metric.split(".")
        if name not in ALL_METRICS or len(place) > 2:
            raise unknown("metric", metric, ALL_METRICS)


def ranked(rows: Sequence[Row], metric: str) -> list[Row]:
    """Sort rows by the mean of a metric, the best first. Rows without the metric come last, in their order."""
    sign = 1 if metric.rpartition(".")[2] in LOWER_IS_BETTER else -1

    def key(row: Row) -> tuple[bool, float]:
        values = row.values(metric)
        return not values, sign * statistics.mean(values) if values else 0.0

    return sorted(rows, key=key)


def best(rows: Sequence[Row], metric: str) -> list[int]:
    """Positions of the rows with the best mean of a metric, of those that were tested on the same images.

    A row whose images no other row with the metric was tested on is not the best of anything.
    """
    best_of = min if metric.rpartition(".")[2] in LOWER_IS_BETTER else max
    tested: dict[Hashable, dict[int, float]] = {}
    for place, row in enumerate(rows):
        if values := row.values(metric):
            tested.setdefault(row.tested, {})[place] = statistics.mean(values)
    return sorted(
        place
        for means in tested.values()
        for place, mean in means.items()
        if len(means) > 1 and mean == best_of(means.values())
    )
