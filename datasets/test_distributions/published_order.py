"""The sorting algorithm that decides the order of classes with equal counts in SADE's published test lists.

It is NumPy's `argsort` (introsort, which is not stable) of the time when those lists were made. Today NumPy sorts most
types with vector instructions, and the order of equal values depends on the processor. So NumPy cannot be used here.
"""

from collections.abc import Sequence

MAX_INSERTION_LENGTH = 16
"""Segments of at most this length are sorted by insertion sort."""


def introsort_argsort(values: Sequence[int]) -> list[int]:
    """Sort as NumPy's scalar introsort did: quicksort with the median of three, and insertion sort of short segments.

    NumPy's third part, a heap sort of segments that stay long after many partitions, is left out, because class counts
    never need it.

    Args:
        values: N numbers.

    Returns:
        The N positions in ascending order of their values.
    """
    order = list(range(len(values)))
    segments = [(0, len(values) - 1)]
    while segments:
        first, last = segments.pop()
        if last - first + 1 > MAX_INSERTION_LENGTH:
            pivot = _partition(values, order, first, last)
            segments += [(first, pivot - 1), (pivot + 1, last)]
        else:
            _insertion_sort(values, order, first, last)
    return order


def _partition(values: Sequence[int], order: list[int], first: int, last: int) -> int:
    """Partition a segment by the median of its first, middle and last value; returns the new position of the median."""
    middle = (first + last) // 2
    for low, high in ((first, middle), (middle, last), (first, middle)):
        if values[order[high]] < values[order[low]]:
            order[low], order[high] = order[high], order[low]
    pivot = values[order[middle]]
    order[middle], order[last - 1] = order[last - 1], order[middle]
    low, high = first, last - 1
    while True:
        low, high = low + 1, high - 1
        while values[order[low]] < pivot:  # both loops stop at values that are equal to the median
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
