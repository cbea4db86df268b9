"""Rows in which every pair of entries of several axes occurs: few of them do what a full product would."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product

Row = dict[str, str]


def pairwise(axes: Mapping[str, Sequence[str]], fits: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """A covering array of strength two, filled greedily; the same axes give the same rows.

    Args:
        axes: entries of each axis.
        fits: whether entries go together; it is also asked about rows that are filled in part.

    Returns:
        Rows with one entry of each axis that fit. A pair that fits in no row is left out.
    """
    pairs = [
        {one: first, other: second}
        for one, other in combinations(axes, 2)
        for first, second in product(axes[one], axes[other])
    ]
    uncovered = {key_of(pair) for pair in pairs if fits(pair)}
    rows: list[Row] = []
    for pair in pairs:
        if key_of(pair) in uncovered and (row := filled(pair, axes, fits, uncovered)) is not None:
            rows.append(row)
            uncovered -= pairs_of(row)
    return rows


def filled(start: Row, axes: Mapping[str, Sequence[str]], fits: Callable[[Row], bool], uncovered: set) -> Row | None:
    """A whole row with these entries, each further axis at the entry that covers most; None if nothing fits."""
    axis = next((name for name in axes if name not in start), None)
    if axis is None:
        return {name: start[name] for name in axes}
    choices = [{**start, axis: entry} for entry in axes[axis]]
    choices.sort(key=lambda row: len(pairs_of(row) & uncovered), reverse=True)
    rows = (filled(row, axes, fits, uncovered) for row in choices if fits(row))
    return next((row for row in rows if row is not None), None)


def pairs_of(row: Row) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def key_of(pair: Row) -> frozenset[tuple[str, str]]:
    return frozenset(pair.items())
