"""FORMATS: the formats in which a table of results is written."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from tailtune.configs.errors import UserError
from tailtune.trainers.comparison.latex_format import as_latex
from tailtune.trainers.comparison.tables import Table, as_csv, as_markdown
from tailtune.trainers.comparison.text_format import as_text
from tailtune.trainers.storage.atomic_io import write_bytes


def _html(table: Table) -> str:
    from tailtune.trainers.comparison.page import as_html  # Jinja is imported only where it is used

    return as_html(table)


FORMATS: Mapping[str, Callable[[Table], str]] = MappingProxyType(
    {"text": as_text, "md": as_markdown, "csv": as_csv, "latex": as_latex, "html": _html}
)
"""Name of a format → function that writes a table in it."""
ENDINGS: Mapping[str, str] = MappingProxyType(
    {"text": ".txt", "md": ".md", "csv": ".csv", "latex": ".tex", "html": ".html"}
)
"""Format → ending of its files."""


def format_of_console() -> str:
    """The format of a table that is printed: text on a terminal; Markdown in a file or a pipe, where it is used on."""
    return "text" if sys.stdout is not None and sys.stdout.isatty() else "md"


def format_of(path: Path) -> str:
    """The format that the ending of a file stands for.

    Raises:
        UserError: no format has this ending.
    """
    for name, ending in ENDINGS.items():
        if path.suffix.lower() == ending:
            return name
    raise UserError(f"--output {path}: its ending must be {', '.join(ENDINGS.values())}; or add --format")


def write_table(table: Table, path: Path, kind: str) -> None:
    """Write a table to a file, completely or not at all.

    Args:
        table: the table.
        path: the file; an existing file is replaced.
        kind: entry of FORMATS.

    Raises:
        UserError: the file system refuses to write.
    """
    write_bytes(path, FORMATS[kind](table).encode(errors="surrogateescape"))
