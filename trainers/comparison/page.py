"""Makes the HTML page of a comparison: one file without scripts and without requests."""

from functools import cache
from pathlib import Path

import jinja2

from tailtune.trainers.comparison.curves import overlaid
from tailtune.trainers.comparison.rows import best
from tailtune.trainers.comparison.tables import (
    Table,
    cells_of,
    changed_classes,
    footnotes,
    header,
    paired_notes,
    paired_table,
)

TEMPLATE = Path(__file__).with_name("page.html")


def as_html(table: Table) -> str:
    """An HTML page with the tables, the classes that changed, and the training curves of all runs."""
    titles, rows = paired_table(table)
    first = len(header(table)) - len(table.metrics) * (2 if table.paper else 1)
    step = 2 if table.paper else 1
    return _template().render(
        header=header(table),
        rows=[cells_of(row, table) for row in table.rows],
        best={
            (number, first + step * place + step - 1)
            for place, metric in enumerate(table.metrics)
            for number in best(table.rows, metric)
        },
        notes=footnotes(table),
        paired_header=titles,
        paired=rows,
        paired_notes=paired_notes(table),
        changes=[
            (paired.row, changed_classes(paired, table.class_names))
            for paired in table.paired
            if paired.by_class is not None
        ],
        curves=overlaid(table.rows),
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
