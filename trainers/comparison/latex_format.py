"""Formats tables of results as LaTeX."""

import re
import unicodedata
from collections.abc import Sequence

from tailtune.trainers.comparison.tables import Table, cells_of, footnotes, header, paired_notes, paired_table

SIGNS = {
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"},
    **{"±": r"$\pm$", "Δ": r"$\Delta$", "−": "$-$", "<": "$<$", ">": "$>$", "×": r"$\times$", "·": r"$\cdot$"},
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
}
"""Character → its LaTeX command. Without one, the default fonts print another character for `<`, `>` and `|`."""
GREEK = re.compile("GREEK SMALL LETTER ((?!OMICRON|FINAL)[A-Z]+)$")


def as_latex(table: Table) -> str:
    """LaTeX tables for the booktabs package, with the footnotes as comments."""
    lines = _latex_rows("ll", header(table), [cells_of(row, table) for row in table.rows])
    notes = footnotes(table)
    titles, rows = paired_table(table)
    if rows:
        lines += ["", *_latex_rows("l", titles, rows)]
    return (
        "\n".join([*lines, *(f"% {line}" for note in notes + paired_notes(table) for line in note.splitlines())]) + "\n"
    )


def _latex_rows(left: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [" & ".join(map(_tex, cells)) + r" \\" for cells in (titles, *rows)]
    begin = rf"\begin{{tabular}}{{{left + 'r' * (len(titles) - len(left))}}}"
    return [begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]


def _tex(text: str) -> str:
    return "".join(map(_tex_of, text))


def _tex_of(character: str) -> str:
    """A character as LaTeX. pdfLaTeX has no Greek letters in text, and stops at them with an error."""
    if greek := GREEK.match(unicodedata.name(character, "")):
        return rf"$\{greek[1].lower().replace('lamda', 'lambda')}$"
    return SIGNS.get(character, " " if character.isspace() else character)
