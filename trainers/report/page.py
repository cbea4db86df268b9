"""Makes `report.html`: one file with everything in it, so that it can be sent and opened anywhere."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from tailtune.trainers.report import tables
from tailtune.trainers.report.figures import svg_figures
from tailtune.trainers.report.subject import Subject
from tailtune.trainers.runs.result_table import number, usage_line

HEADLINE = ("accuracy", "mean_acc", "many_acc", "med_acc", "few_acc", "ece")
"""Metrics that stand above the page in large digits."""


def page(subject: Subject) -> bytes:
    """The content of report.html.

    Args:
        subject: what the report shows.
    """
    result = subject.result
    splits, metrics = tables.metric_rows(result)
    mistakes = tables.confident_mistakes(subject)
    used = result["test"].get("experts_used")
    html = _template().render(
        result=result,
        headline=[(tables.HEADINGS[name], number(result["test"][name])) for name in HEADLINE],
        splits=splits,
        metrics=metrics,
        usage=usage_line(used) if used else "",
        classes=tables.class_rows(subject),
        pairs=tables.confused_pairs(subject),
        mistakes=mistakes,
        pictures=any(picture["data"] for picture in mistakes),
        distributions=tables.distribution_rows(result),
        dirichlet=tables.dirichlet_rows(result),
        calibration={key: number(result["test"]["calibration"][key]) for key in ("ece", "mce")},
        bins=result["test"]["calibration"]["bins"],
        figures=svg_figures(subject),
        facts=tables.facts(result),
        launch=subject.launch,
        images=len(subject.predicted.labels),
    )
    return html.encode(errors="backslashreplace")  # a path may hold bytes that are no text


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")
