"""Formats tables of results for a terminal of 80 columns."""

from collections.abc import Sequence

from tailtune.configs.console_text import WIDEST_NAME, Column, table_lines, wrapped
from tailtune.trainers.comparison.tables import (
    SHOWN_CLASSES,
    Table,
    cells_of,
    changed_classes,
    footnotes,
    header,
    paired_notes,
    paired_table,
)

LEGEND = "trained: trained parameters; runs: runs in the row, one a seed; then their mean metrics (accuracies in %)"


def as_text(table: Table) -> str:
    """The tables and notes of `as_markdown`, with at most 80 columns. Names that were shortened are below the table."""
    names = [row.name for row in table.rows]
    numbered = [f"{number} {name}" for number, name in enumerate(names, start=1)]
    titles, rows = header(table), [cells_of(row, table) for row in table.rows]
    place = titles.index("row")
    lines = _table(numbered, _without(place, titles), [_without(place, row) for row in rows])
    lines += [line for name in numbered if len(name) > WIDEST_NAME for line in wrapped(name, "  ")]
    lines += wrapped(LEGEND)
    notes = [line for note in footnotes(table) for line in note.split("\n")]
    titles, rows = paired_table(table)
    paragraphs = [_paragraph(notes)]
    if rows:
        tested = [numbered[names.index(row[0])] for row in rows]
        paragraphs.append(_table(tested, titles[1:], [row[1:] for row in rows]))
        changed = [paired for paired in table.paired if paired.by_class is not None]
        for paired in changed:
            listed = changed_classes(paired, table.class_names, SHOWN_CLASSES)
            changes = ", ".join(f"{name} {change:+.1f}" for name, change in listed)
            text = f"{numbered[names.index(paired.row)]}, classes with the largest differences: {changes or 'none'}."
            paragraphs.append(wrapped(text, "  "))
    paragraphs.append(_paragraph(paired_notes(table)))
    return "\n\n".join("\n".join(part) for part in [lines, *paragraphs] if part) + "\n"


def _table(names: Sequence[str], titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    columns = [Column(title, cells) for title, cells in zip(titles, zip(*rows, strict=True), strict=True)]
    return table_lines(Column("row", names), [columns])


def _paragraph(notes: Sequence[str]) -> list[str]:
    return [line for note in notes for line in wrapped(note, "  ")]


def _without(place: int, cells: Sequence[str]) -> list[str]:
    return [*cells[:place], *cells[place + 1 :]]
