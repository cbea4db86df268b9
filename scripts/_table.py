"""Formats tables of results for reproduce.py and collect.py."""

import csv
import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tailtune.configs.errors import lookup

TITLES = {"accuracy": "all", "many_acc": "many", "med_acc": "medium", "few_acc": "few", "worst_case_acc": "worst"}
MEMORY = "A number in brackets is from memory, not verified against the paper."
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


def _header(metrics: Sequence[str], paper: str | None) -> list[str]:
    titles = [TITLES.get(metric, metric.removesuffix(".accuracy")) for metric in metrics]
    both = [f"{title}, {whose}" for title in titles for whose in ("published", "ours")]
    return ["data", "row", "trained", "runs", *(both if paper else titles)]


def _cells(row: Row, metrics: Sequence[str], paper: str | None) -> list[str]:
    cells = [row.data, row.name, row.trained, row.runs]
    for metric in metrics:
        cells += ([row.published.get(metric, "")] if paper else []) + [row.ours(metric)]
    return cells


def as_markdown(rows: Sequence[Row], metrics: Sequence[str], paper: str | None = None) -> str:
    """A Markdown table with footnotes; without a paper there are no columns for published numbers."""
    header = _header(metrics, paper)
    lines = [header, ["---"] * len(header), *(_cells(row, metrics, paper) for row in rows)]
    text = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines)
    return "\n\n".join([text, *_footnotes(rows, paper)]) + "\n"


def as_latex(rows: Sequence[Row], metrics: Sequence[str], paper: str | None = None) -> str:
    """A LaTeX table for the booktabs package, with the footnotes as comments."""
    columns = "ll" + "r" * (len(_header(metrics, paper)) - 2)
    head, *body = [
        " & ".join(map(_tex, cells)) + r" \\"
        for cells in (_header(metrics, paper), *(_cells(row, metrics, paper) for row in rows))
    ]
    lines = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join([*lines, *(f"% {line}" for note in _footnotes(rows, paper) for line in note.split("\n"))]) + "\n"


def as_csv(rows: Sequence[Row], metrics: Sequence[str], paper: str | None = None) -> str:
    """A CSV table for programs. Mean and standard deviation have separate columns and are not rounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    titles = [f"{metric}_{kind}" for metric in metrics for kind in ("published", "mean", "std")]
    writer.writerow(["data", "row", "trained", "runs", "wanted", *titles, *FACTS])
    for row in rows:
        numbers: list[Any] = []
        for values, metric in ((row.values(metric), metric) for metric in metrics):
            mean = statistics.mean(values) if values else ""
            std = statistics.stdev(values) if len(values) > 1 else ""
            numbers += [row.published.get(metric, ""), mean, std]
        cells = [row.data, row.name, row.trained.replace(",", ""), len(row.results), row.wanted]
        writer.writerow([*cells, *numbers, *("; ".join(_facts(row.results, fact)) for fact in FACTS)])
    return out.getvalue()


FORMATS: dict[str, Callable[..., str]] = {"md": as_markdown, "csv": as_csv, "latex": as_latex}
FACTS: dict[str, Callable[[Result], str]] = {
    "commit": lambda result: re.sub(r"^([0-9a-f]{12})[0-9a-f]*", r"\1", str(result.get("commit"))),
    "hardware": lambda result: str(result.get("hardware")),
    "torch": lambda result: str(result.get("packages", {}).get("torch")),
}
"""Fact about the runs in the footnotes of a table → function that reads the fact from one result."""


def _facts(results: Sequence[Result], fact: str) -> list[str]:
    """The different values of a fact in several results."""
    return list(dict.fromkeys(FACTS[fact](result) for result in results))


def _footnotes(rows: Sequence[Row], paper: str | None) -> list[str]:
    """Footnotes: how the numbers were computed, the source of the published numbers, and notes of single runs."""
    results = [result for row in rows for result in row.results]
    lines = []
    if results:
        seeds = ", ".join(map(str, sorted({result["seed"] for result in results})))
        facts = "; ".join(f"{fact} {', '.join(_facts(results, fact))}" for fact in FACTS)
        lines.append(f"Mean ± standard deviation over seeds {seeds}; {facts}.")
    if paper:
        unsure = any("(" in text for row in rows for text in row.published.values())
        lines.append(
            f"Published: {paper}; empty where the number is not known here." + (f" {MEMORY}" if unsure else "")
        )
    notes: dict[str, int] = {}
    for note in (note for result in results for note in [*result.get("notes", []), *_cut_short(result)]):
        notes[note] = notes.get(note, 0) + 1
    listed = [f"- {note} ({count} of {len(results)} runs)" for note, count in notes.items()]
    return lines + (["\n".join(listed)] if listed else [])


def _cut_short(result: Result) -> list[str]:
    return ["stopped before its last epoch (max_steps)"] if result.get("stopped_early") else []


def _tex(text: str) -> str:
    text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    return text.replace("±", r"$\pm$").replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ")
