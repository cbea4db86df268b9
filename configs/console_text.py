"""Text for a console of 80 columns: wrapped lines, and tables of which no line is wider."""

import os
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

WIDTH = 80
"""Largest number of columns of a line."""
WIDEST_NAME = 24
"""Largest number of columns of a name in the first column of a table."""
GAP = "  "


class Column(NamedTuple):
    """A column of a table, with one cell for each row."""

    title: str
    cells: Sequence[str]

    def shortened(self, width: int) -> "Column":
        """The column in which no text is longer than `width`."""
        return Column(shortened(self.title, width), [shortened(cell, width) for cell in self.cells])

    @property
    def width(self) -> int:
        return max(map(len, (self.title, *self.cells)))

    def lines(self, align: str) -> list[str]:
        """Title and cells, aligned to the left (`<`) or to the right (`>`)."""
        return [f"{text:{align}{self.width}}" for text in (self.title, *self.cells)]


def wrapped(text: str, indent: str = "", whole: bool = False) -> list[str]:
    """The lines of a text, none wider than WIDTH.

    Args:
        text: one paragraph.
        indent: what every line but the first begins with.
        whole: do not break words, and leave a long path where it is. Then a line can be wider.
    """
    if len(text) <= WIDTH:
        return [text]
    lines = textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=not whole)
    joined = lines[:1]
    for line in lines[1:]:
        word = line.split(maxsplit=1)[0]
        if whole and len(word) > WIDTH // 2 and os.sep in word:
            joined[-1] += " " + line.removeprefix(indent)
        else:
            joined.append(line)
    return joined


def shortened(text: str, width: int) -> str:
    """A text of at most `width` characters. In a longer one, `…` replaces the middle: names differ at the end."""
    if len(text) <= width:
        return text
    end = (width - 1) * 2 // 3
    return text[: width - 1 - end] + "…" + text[len(text) - end :]


def table_lines(names: Column, groups: Sequence[Sequence[Column]]) -> list[str]:
    """A table, or several ones below each other if its columns do not fit beside each other. Each begins with `names`.

    Args:
        names: the first column.
        groups: columns that stay beside each other as long as a line has room for them.

    Returns:
        The lines; tables are separated by an empty line.
    """
    names = names.shortened(WIDEST_NAME)
    room = WIDTH - names.width
    tables: list[list[Column]] = [[]]
    for group in groups:
        columns = [column.shortened(room - len(GAP)) for column in group]
        parts = [columns] if _width(columns) <= room else [[column] for column in columns]
        for part in parts:
            if tables[-1] and _width(tables[-1] + part) > room:
                tables.append([])
            tables[-1] += part
    lines = []
    for columns in tables:
        rows = [GAP.join(cells) for cells in zip(names.lines("<"), *(each.lines(">") for each in columns), strict=True)]
        lines += ["", rows[0], "─" * len(rows[0]), *map(str.rstrip, rows[1:])]
    return lines[1:]


def _width(columns: Sequence[Column]) -> int:
    return sum(len(GAP) + column.width for column in columns)
