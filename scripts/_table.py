"""A table of results: what a row knows, and the formats that it is written in. Used by reproduce.py and collect.py."""

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
"""Contents of a metrics.json, schema 2."""


@dataclass(frozen=True)
class Row:
    """A line of the table: the runs that differ in their seed only."""

    data: str
    name: str
    wanted: int
    """Runs that there should be."""
    results: list[Result]
    """Those that there are."""
    published: Mapping[str, str] = field(default_factory=dict)

    def values(self, metric: str) -> list[float]:
        """One for each run that has something to measure."""
        found = (number(each, metric) for each in self.results)
        return [value for value in found if value is not None]

    def ours(self, metric: str) -> str:
        values = self.values(metric)
        if not values:
            return "n/a" if self.results else "not run"
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    @property
    def runs(self) -> str:
        done = len(self.results)
        return str(done) if done == self.wanted else f"{done} of {self.wanted}"

    @property
    def trained(self) -> str:
        """Parameters that train, tuners and head."""
        return f"{self.results[0]['params']['trainable']:,}" if self.results else ""


def number(result: Result, metric: str) -> float | None:
    """A single number of a result, `accuracy`, `backward50.accuracy` or `backward50.plain.accuracy`.

    Without a slot: by adapted weights where there are some. None: not measured, or nothing to measure.

    Raises:
        UserError: no such metric.
    """
    *where, name = metric.split(".")
    found = result["test"]
    if where:
        predictors = result.get("distributions", {}).get(where[0], {}).get("predictors", {})
        adapted = next((predictor for predictor in predictors if predictor != "plain"), "plain")
        found = predictors.get(where[1] if len(where) == 2 else adapted)
    if found is None:
        return None
    value: float | None = lookup({k: v for k, v in found.items() if not isinstance(v, (list, dict))}, name, "metric")
    return value


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
    header = _header(metrics, paper)
    lines = [header, ["---"] * len(header), *(_cells(row, metrics, paper) for row in rows)]
    text = "\n".join(f"| {' | '.join(each.replace('|', chr(92) + '|') for each in cells)} |" for cells in lines)
    return "\n\n".join([text, *_footnotes(rows, paper)]) + "\n"


def as_latex(rows: Sequence[Row], metrics: Sequence[str], paper: str | None = None) -> str:
    """For the booktabs package."""
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
    return "\n".join([*lines, *(f"% {line}" for each in _footnotes(rows, paper) for line in each.split("\n"))]) + "\n"


def as_csv(rows: Sequence[Row], metrics: Sequence[str], paper: str | None = None) -> str:
    """For programs: mean and standard deviation apart, unrounded, empty where there is nothing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    of_metric = [f"{metric}_{kind}" for metric in metrics for kind in ("published", "mean", "std")]
    writer.writerow(["data", "row", "trained", "runs", "wanted", *of_metric, *FACTS])
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
    "commit": lambda found: re.sub(r"^([0-9a-f]{12})[0-9a-f]*", r"\1", str(found.get("commit"))),
    "hardware": lambda found: str(found.get("hardware")),
    "torch": lambda found: str(found.get("packages", {}).get("torch")),
}


def _facts(results: Sequence[Result], fact: str) -> list[str]:
    """All different values."""
    return list(dict.fromkeys(FACTS[fact](each) for each in results))


def _footnotes(rows: Sequence[Row], paper: str | None) -> list[str]:
    """With what it was computed, and what a reader has to know of single runs."""
    results = [each for row in rows for each in row.results]
    lines = []
    if results:
        seeds = ", ".join(map(str, sorted({each["seed"] for each in results})))
        facts = "; ".join(f"{fact} {', '.join(_facts(results, fact))}" for fact in FACTS)
        lines.append(f"Mean ± standard deviation over seeds {seeds}; {facts}.")
    if paper:
        unsure = any("(" in each for row in rows for each in row.published.values())
        lines.append(
            f"Published: {paper}; empty where the number is not known here." + (f" {MEMORY}" if unsure else "")
        )
    notes: dict[str, int] = {}
    for note in (note for each in results for note in [*each.get("notes", []), *_cut_short(each)]):
        notes[note] = notes.get(note, 0) + 1
    listed = [f"- {note} ({count} of {len(results)} runs)" for note, count in notes.items()]
    return lines + (["\n".join(listed)] if listed else [])


def _cut_short(found: Result) -> list[str]:
    return ["stopped before its last epoch (max_steps)"] if found.get("stopped_early") else []


def _tex(text: str) -> str:
    text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    return text.replace("±", r"$\pm$").replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ")
