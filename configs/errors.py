"""What every package needs to refuse bad input: one error type, one table lookup, who is to blame."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TypeVar

Entry = TypeVar("Entry")
MANY = 60
"""More names than this are not listed."""
LONGEST = 120
"""Characters of a value that a message shows."""


class UserError(Exception):
    """Wrong input. The message is one line that names the culprit and the remedy; `main.py` exits with 2."""


def unknown(kind: str, name: str, choices: Iterable[str], known_as: Mapping[str, str] | None = None) -> UserError:
    """The error for a name that is in no table: the nearest entry first, then all of them, or the nearest of many.

    Args:
        known_as: what other projects call an entry → its name here; it comes before any resemblance.
    """
    choices, name = sorted(choices), shown(name)
    meant = (known_as or {}).get(name.lower().replace("-", "_"))
    near = [meant] if meant in choices else nearest(name, choices, 1)
    hint = f"; did you mean '{near[0]}'?" if near else ";"
    if len(choices) > MANY:
        first = nearest(name, [each for each in choices if each not in near], 5 - len(near), least=0.0)
        choices = [*near, *first, f"… ({len(choices)} in all)"]
    return UserError(f"unknown {kind} '{name}'{hint} choices: {', '.join(choices)}")


def nearest(name: str, choices: Sequence[str], count: int, least: float = 0.55) -> list[str]:
    """The entries that a name resembles most, whatever their case, the nearest first.

    Args:
        least: resemblance from 0 to 1; with less than 0.55 `learning_rate` would mean `calibrate`.
    """
    by_lower = {choice.lower(): choice for choice in reversed(choices)}
    return (
        [by_lower[each] for each in get_close_matches(name.lower(), by_lower, n=count, cutoff=least)] if count else []
    )


def shown(value: object) -> str:
    """A value within a message: its text, control characters as escapes, shortened where a line could not hold it."""
    text = str(value)
    if not text[: 2 * LONGEST].isprintable():
        text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 20]}… ({len(text):,} characters)"


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Within the block a `UserError` whose message does not name this option begins with it."""
    try:
        yield
    except UserError as error:
        if re.search(rf"\b{re.escape(key)}\b", str(error)):
            raise
        raise type(error)(f"{key}: {error}") from error


def lookup(table: Mapping[str, Entry], name: str, kind: str) -> Entry:
    """`table[name]`, or a `UserError` that lists what the table holds."""
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]
