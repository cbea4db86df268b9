"""An unstable sort, written down: the order of equal counts in SADE's published test lists is that of this algorithm.

It is NumPy's scalar `argsort` (introsort) of the time when those lists were made. NumPy today sorts most types with
vector instructions, whose order of equal values differs between processors, so it cannot be asked.
"""

from collections.abc import Sequence

SMALL = 16
"""Segments of at most so many values are sorted by insertion."""


def introsort_argsort(values: Sequence[int]) -> list[int]:
    """Positions in ascending order of their values.

    Quicksort by the median of three, insertion sort of short segments. NumPy's third part, heap sort of a segment that
    stays long after many cuts, is left out: no class counts come near it.
    """
    order = list(range(len(values)))
    segments = [(0, len(values) - 1)]
    while segments:
        first, last = segments.pop()
        if last - first + 1 > SMALL:
            middle = _partition(values, order, first, last)
            segments += [(first, middle - 1), (middle + 1, last)]
        else:
            _insertion_sort(values, order, first, last)
    return order


def _partition(values: Sequence[int], order: list[int], first: int, last: int) -> int:
    """Cut a segment at the median of its first, middle and last value; returns where that stands then."""
    middle = (first + last) // 2
    for low, high in ((first, middle), (middle, last), (first, middle)):
        if values[order[high]] < values[order[low]]:
            order[low], order[high] = order[high], order[low]
    pivot = values[order[middle]]
    order[middle], order[last - 1] = order[last - 1], order[middle]
    low, high = first, last - 1
    while True:
        low, high = low + 1, high - 1
        while values[order[low]] < pivot:  # both stop at equal values
            low += 1
        while pivot < values[order[high]]:
            high -= 1
        if low >= high:
            break
        order[low], order[high] = order[high], order[low]
    order[low], order[last - 1] = order[last - 1], order[low]
    return low


def _insertion_sort(values: Sequence[int], order: list[int], first: int, last: int) -> None:
    for position in range(first + 1, last + 1):
        moved = order[position]
        while position > first and values[moved] < values[order[position - 1]]:
            order[position] = order[position - 1]
            position -= 1
        order[position] = moved
