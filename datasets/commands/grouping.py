"""Which images belong together, such as all images of one patient or video; they never lie in two splits."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tailtune.configs.errors import UserError, printable
from tailtune.datasets.sources.text_files import numbered_lines

COLUMNS = ("file", "group")


def read_groups(rule: str, paths: Sequence[str]) -> list[str]:
    """The group of each image.

    Args:
        rule: path of a CSV file with the columns `file` and `group`; or a regular expression, whose first parenthesis
            in a path, or else the whole match, is the group.
        paths: N paths relative to the folder of the images.

    Returns:
        Names of groups, [N].

    Raises:
        UserError: the file or the expression is wrong, or some images have no group.
    """
    if rule.lower().endswith(".csv"):
        group_of = _read_csv(Path(rule))
        groups = [group_of.get(path) for path in paths]
    else:
        expression = _compiled(rule)
        groups = [_group_in(expression.search(path)) for path in paths]
    if without := [path for path, group in zip(paths, groups, strict=True) if group is None]:
        raise UserError(
            f"--groups {printable(rule)}: {len(without):,} of {len(paths):,} images have no group "
            f"(first: {without[0]}); every image needs one"
        )
    return [group for group in groups if group is not None]


def _compiled(rule: str) -> re.Pattern[str]:
    try:
        return re.compile(rule)
    except re.error as error:
        raise UserError(f"--groups {printable(rule)} is no regular expression ({error}) and no .csv file") from None


def _group_in(match: re.Match[str] | None) -> str | None:
    if match is None:
        return None
    return match[1] if match.re.groups else match[0]


def _read_csv(file: Path) -> dict[str, str]:
    """Path of an image → its group."""
    lines = (f"{line}\n" for _, line in numbered_lines(file))
    reader = csv.DictReader(lines)
    if not set(COLUMNS) <= set(reader.fieldnames or ()):
        found = ", ".join(reader.fieldnames or ()) or "none"
        raise UserError(f"--groups {file}: the first line must name the columns file and group (found: {found})")
    groups: dict[str, str] = {}
    for row in reader:
        path, group = row["file"], row["group"]
        if not path or not group:
            raise UserError(f"--groups {file} line {reader.line_num}: give a file and its group")
        if groups.setdefault(path, group) != group:
            both = f"{path} has two groups, {groups[path]} and {group}"
            raise UserError(f"--groups {file} line {reader.line_num}: {both}; give it one")
    return groups


def joined(keys: Sequence[str], together: Iterable[Sequence[int]]) -> list[str]:
    """Join groups that share an image, so that copies of one file come into one split.

    Args:
        keys: group of each image, [N].
        together: sets of positions whose groups become one.

    Returns:
        Groups after joining, [N]; the name of a joined group is the smallest of its names.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while (above := parent.get(key, key)) != key:
            key = above
        return key

    for positions in together:
        roots = sorted({root(keys[position]) for position in positions})
        parent |= {other: roots[0] for other in roots[1:]}
    return [root(key) for key in keys]
