"""What every package needs to refuse bad input: one error type, one table lookup, one atomic question."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

Entry = TypeVar("Entry")
MANY = 60
"""More names than this are not listed."""


class UserError(Exception):
    """Wrong input. The message is one line that names the culprit and the remedy; `main.py` exits with 2."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """The error for a name that is in no table: the nearest entry first, then all of them, or the nearest of many."""
    choices = sorted(choices)
    near = get_close_matches(name.lower(), [choice.lower() for choice in choices], n=1, cutoff=0.5)
    hint = next((f"; did you mean '{choice}'?" for choice in choices if near and choice.lower() == near[0]), ";")
    if len(choices) > MANY:
        choices = [*get_close_matches(name, choices, n=5, cutoff=0.0), f"… ({len(choices)} in all)"]
    return UserError(f"unknown {kind} '{name}'{hint} choices: {', '.join(choices)}")


def lookup(table: Mapping[str, Entry], name: str, kind: str) -> Entry:
    """`table[name]`, or a `UserError` that lists what the table holds."""
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]
