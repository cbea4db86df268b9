"""Rows of a table of results: the finished runs that differ in nothing but their seed."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailtune.configs.errors import lookup, unknown

METRICS = ("accuracy", "many_acc", "med_acc", "few_acc")
LOWER_IS_BETTER = ("error_rate", "ece", "nll", "bad_images")
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
        """Mean ± standard deviation of a metric over the runs, as text."""
        values = self.values(metric)
        if not values:
            return "n/a" if self.results else "not run"
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

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
        predictors = result.get("distributions", {}).get(place[0], {}).get("predictors", {})
        adapted = next((predictor for predictor in predictors if predictor != "plain"), "plain")
        metrics = predictors.get(place[1] if len(place) == 2 else adapted)
    if metrics is None:
        return None
    numbers = {key: value for key, value in metrics.items() if not isinstance(value, (list, dict))}
    number_of_metric: float | None = lookup(numbers, name, "metric")
    return number_of_metric


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
    """Positions of the rows with the best mean of a metric; empty if fewer than two rows have it."""
    means = {number: statistics.mean(row.values(metric)) for number, row in enumerate(rows) if row.values(metric)}
    if len(means) < 2:
        return []
    limit = min(means.values()) if metric.rpartition(".")[2] in LOWER_IS_BETTER else max(means.values())
    return [number for number, mean in means.items() if mean == limit]
