"""Formats tables of results as Markdown and CSV."""

import csv
import io
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tailtune.trainers.comparison.paired_tests import CONFIDENCE, RESAMPLES, Interval, Paired
from tailtune.trainers.comparison.rows import Result, Row, chosen_predictor, predictors_of

TITLES = {"accuracy": "all", "many_acc": "many", "med_acc": "medium", "few_acc": "few", "worst_case_acc": "worst"}
SHOWN_CLASSES = 5
"""Number of gains, and of losses, that a Markdown text lists."""
SHOWN_ROWS = 3
"""Number of rows that a footnote names."""
MEMORY = "A number in brackets is from memory, not verified against the paper."


@dataclass(frozen=True)
class Table:
    """A table of results, with what is written below it."""

    rows: Sequence[Row]
    metrics: Sequence[str]
    """Metrics of the columns."""
    paper: str | None = None
    """Source of published numbers; None: there are no columns for them."""
    paired: Sequence[Paired] = ()
    """Every row but the first one, compared with the first one over the test images."""
    class_names: Sequence[str] | None = None
    """Names of the classes; None: they are numbered."""
    notes: Sequence[str] = ()
    """Sentences about all rows, such as words that were added to every command."""


def header(table: Table) -> list[str]:
    """Titles of the columns."""
    titles = [title_of(metric) for metric in table.metrics]
    both = [f"{title}, {whose}" for title in titles for whose in ("published", "ours")]
    return ["data", "row", "trained", "runs", *(both if table.paper else titles)]


def title_of(metric: str) -> str:
    """Title of the column of a metric."""
    return TITLES.get(metric, metric.removesuffix(".accuracy"))


def cells_of(row: Row, table: Table) -> list[str]:
    """The cells of a row, as text."""
    cells = [row.data, row.name, row.trained, row.runs]
    for metric in table.metrics:
        cells += ([row.published.get(metric, "")] if table.paper else []) + [row.ours(metric)]
    return cells


def paired_table(table: Table) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the table of paired tests; no rows if nothing could be tested."""
    tested = [paired for paired in table.paired if paired.differences is not None]
    metrics = list(dict.fromkeys(metric for paired in tested for metric in paired.differences or ()))
    titles = ["row", *(f"Δ {title_of(metric)}" for metric in metrics), "wins", "losses", "p", "classes + / − / ="]
    rows = []
    for paired in tested:
        found = paired.differences or {}
        test = paired.mcnemar
        numbers = ["n/a"] * 3 if test is None else [f"{test.wins:,}", f"{test.losses:,}", _p(test.p)]
        intervals = [_interval(found[metric]) if metric in found else "n/a" for metric in metrics]
        rows.append([paired.row, *intervals, *numbers, " / ".join(map(str, paired.classes))])
    return titles, rows


def paired_notes(table: Table) -> list[str]:
    """Sentences below the table of paired tests: what its columns are, and which rows are missing and why."""
    notes = []
    if any(paired.differences is not None for paired in table.paired):
        notes.append(
            f"Compared with {table.rows[0].name} over the same test images, in percentage points. In brackets: "
            f"{CONFIDENCE} % percentile interval of the paired bootstrap over images ({RESAMPLES:,} samples); it does "
            "not contain the variation between seeds. wins, losses: images that only this run, or only the first one, "
            "gets right; p: McNemar's exact test, for single runs. Neither is corrected for the number of rows. "
            "classes: on how many this row is better, worse and equal."
        )
    return notes + [f"{paired.row} is not tested: {paired.reason}." for paired in table.paired if paired.reason]


def changed_classes(paired: Paired, names: Sequence[str] | None, most: int | None = None) -> list[tuple[str, float]]:
    """The classes whose accuracy differs from the first row, from the largest gain to the largest loss.

    Args:
        paired: the compared row.
        names: names of the classes; None: numbers.
        most: largest number of gains, and of losses; None: all.

    Returns:
        Pairs (class, difference in percentage points).
    """
    assert paired.by_class is not None
    order = [int(label) for label in np.argsort(-paired.by_class, kind="stable") if np.isfinite(paired.by_class[label])]
    gains = [label for label in order if paired.by_class[label] > 0][:most]
    losses = [label for label in order if paired.by_class[label] < 0]
    losses = losses[-most:] if most else losses
    return [(names[label] if names else f"class {label}", float(paired.by_class[label])) for label in gains + losses]


def as_markdown(table: Table) -> str:
    """A Markdown table with footnotes; without a paper there are no columns for published numbers."""
    parts = [_markdown_rows(header(table), [cells_of(row, table) for row in table.rows])]
    parts += footnotes(table)
    titles, rows = paired_table(table)
    if rows:
        parts.append(_markdown_rows(titles, rows))
        for paired in (each for each in table.paired if each.by_class is not None):
            listed = changed_classes(paired, table.class_names, SHOWN_CLASSES)
            changes = ", ".join(f"{name} {change:+.1f}" for name, change in listed)
            parts.append(f"{paired.row}, classes with the largest differences: {changes or 'none'}.")
    return "\n\n".join([*parts, *paired_notes(table)]) + "\n"


def _markdown_rows(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines)


def as_csv(table: Table) -> str:
    """A CSV table for programs. Mean and standard deviation have separate columns and are not rounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    titles = [f"{metric}_{kind}" for metric in table.metrics for kind in ("published", "mean", "std")]
    tests = _paired_columns(table)
    writer.writerow(
        ["data", "row", "trained", "runs", "wanted", *titles, *FACTS, "notes", *(tests[0] if tests else ())]
    )
    for number, row in enumerate(table.rows):
        numbers: list[Any] = []
        for values, metric in ((row.values(metric), metric) for metric in table.metrics):
            mean = statistics.mean(values) if values else ""
            std = statistics.stdev(values) if len(values) > 1 else ""
            numbers += [row.published.get(metric, ""), mean, std]
        cells = [row.data, row.name, row.trained.replace(",", ""), len(row.results), row.wanted]
        facts = ["; ".join(_facts(row.results, fact)) for fact in FACTS]
        notes = "; ".join(dict.fromkeys([*table.notes, *_notes_of(row)]))
        writer.writerow([*cells, *numbers, *facts, notes, *(tests[number].values() if tests else ())])
    return out.getvalue()


def _paired_columns(table: Table) -> list[dict[str, Any]]:
    """The columns of the paired tests of each row; the first row has empty ones. Empty without tests."""
    if not table.paired:
        return []
    metrics = dict.fromkeys(metric for paired in table.paired for metric in paired.differences or ())
    intervals = [f"{metric}_{kind}" for metric in metrics for kind in ("difference", "low", "high")]
    names = [*intervals, "wins", "losses", "p", "classes_won", "classes_lost", "classes_tied", "not_tested"]
    columns = [dict.fromkeys(names, "")]
    for paired in table.paired:
        cells: dict[str, Any] = dict.fromkeys(names, "")
        for metric, interval in (paired.differences or {}).items():
            values = (interval.difference, interval.low, interval.high)
            cells |= dict(zip((f"{metric}_{kind}" for kind in ("difference", "low", "high")), values, strict=True))
        if paired.mcnemar is not None:
            cells |= {"wins": paired.mcnemar.wins, "losses": paired.mcnemar.losses, "p": paired.mcnemar.p}
        if paired.by_class is not None:
            cells |= dict(zip(("classes_won", "classes_lost", "classes_tied"), paired.classes, strict=True))
        columns.append(cells | {"not_tested": paired.reason})
    return columns


def _interval(interval: Interval) -> str:
    return f"{interval.difference:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


FACTS: dict[str, Callable[[Result], str]] = {
    "commit": lambda result: re.sub(r"^([0-9a-f]{12})[0-9a-f]*", r"\1", str(result.get("commit"))),
    "hardware": lambda result: str(result.get("hardware")),
    "torch": lambda result: str(result.get("packages", {}).get("torch")),
    "precision": lambda result: str(result.get("prec_used")),
}
"""Fact about the runs in the footnotes of a table → function that reads the fact from one result."""


def _facts(results: Sequence[Result], fact: str) -> list[str]:
    """The different values of a fact in several results."""
    return list(dict.fromkeys(FACTS[fact](result) for result in results))


def footnotes(table: Table) -> list[str]:
    """Footnotes: how the numbers were computed, the source of the published numbers, and notes of single runs."""
    rows, paper = table.rows, table.paper
    results = [result for row in rows for result in row.results]
    lines = list(table.notes)
    if results:
        numbers = sorted({result["seed"] for result in results})
        seeds = f"seed{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
        averaged = any(len(row.results) > 1 for row in rows)
        facts = "; ".join(f"{fact} {', '.join(_facts(results, fact))}" for fact in FACTS)
        lines.append(f"{f'Mean ± standard deviation over {seeds}' if averaged else seeds.capitalize()}; {facts}.")
    if paper:
        unsure = any("(" in text for row in rows for text in row.published.values())
        lines.append(
            f"Published: {paper}; empty where the number is not known here." + (f" {MEMORY}" if unsure else "")
        )
    if any(map(_adapted, results)):
        lines.append(
            "Metrics without the name of a test distribution are those of the plain predictions; `uniform.accuracy` is "
            "that of the adapted ones."
        )
    listed = [*_predictors(table), *_notes(rows), *_differences(rows)]
    return lines + (["\n".join(f"- {note}" for note in listed)] if listed else [])


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """The notes of single runs; those that are not of every row with the rows that have them."""
    finished = [row for row in rows if row.results]
    found: dict[str, list[str]] = {}
    for row in finished:
        for note in _notes_of(row):
            found.setdefault(note, []).append(_label(row, rows))
    for note, names in found.items():
        whose = list(dict.fromkeys(names))
        shown = f": {_shown(whose)}" if len(whose) < len(finished) else ""
        yield f"{note} ({len(names)} of {sum(len(row.results) for row in finished)} runs{shown})"


def _predictors(table: Table) -> Iterator[str]:
    """Of which predictor the numbers of test distributions are, where this differs or others are left out."""
    places = dict.fromkeys(metric.split(".")[0] for metric in table.metrics if metric.count(".") == 1)
    found: dict[str, list[str]] = {}
    for row in table.rows:
        for predictors in filter(None, (predictors_of(result, place) for result in row.results for place in places)):
            chosen = chosen_predictor(predictors)
            others = ", ".join(name for name in predictors if name not in ("plain", chosen))
            name = f"{chosen} (not {others})" if others else chosen
            found.setdefault(name, []).append(_label(row, table.rows))
    if set(found) - {"plain"}:
        whose = "; ".join(f"{name}: {_shown(list(dict.fromkeys(rows)))}" for name, rows in found.items())
        yield f"predictors of the columns of test distributions: {whose}"


def _label(row: Row, rows: Sequence[Row]) -> str:
    """The name of a row, with its data if the table has several."""
    return f"{row.name} ({row.data})" if len({each.data for each in rows}) > 1 else row.name


def _notes_of(row: Row) -> list[str]:
    return [note for result in row.results for note in [*result.get("notes", []), *_remarks(result)]]


def _differences(rows: Sequence[Row]) -> Iterator[str]:
    """What makes numbers of one column differ in meaning, between rows of the same data."""
    for data in dict.fromkeys(row.data for row in rows if row.results):
        first, *others = (row for row in rows if row.results and row.data == data)
        grouped = [row.name for row in others if None not in (row.groups, first.groups) and row.groups != first.groups]
        if grouped:
            yield f"many, medium and few are not the classes that they are in {first.name}: {_shown(grouped)}"
        images = [row.name for row in others if row.tested[1] != first.tested[1]]
        if images:
            yield f"other test images than those of {first.name}: {_shown(images)}"


def _shown(names: Sequence[str]) -> str:
    return ", ".join([*names[:SHOWN_ROWS], *(["…"] if len(names) > SHOWN_ROWS else [])])


def _adapted(result: Result) -> bool:
    """Whether predictions were adapted to the test distributions (test-time adaptation, or a target prior)."""
    distributions = result.get("distributions", {}).values()
    return any(name != "plain" for distribution in distributions for name in distribution["predictors"])


def _remarks(result: Result) -> list[str]:
    """What a result says of itself in other entries than its notes."""
    found = ["stopped before its last epoch (max_steps or patience)"] if result.get("stopped_early") else []
    trained_on = result.get("evaluation", {}).get("test_train")
    return found + (["evaluated on the training images (test_train)"] if trained_on else [])
