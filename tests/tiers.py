"""Which cases of a parametrisation run by default."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_except(kept: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`, of which those not in `kept` run in `make test-slow` only.

    Args:
        kept: representatives: one case of each path through the code.
        cases: all cases; a tuple holds the values of several arguments.

    Raises:
        AssertionError: a representative is not among the cases, so that a renamed entry is not lost silently.
    """
    cases = list(cases)
    assert all(case in cases for case in kept), [case for case in kept if case not in cases]
    return [case if case in kept else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
