"""Defines the exception for wrong input, and helpers that formulate its messages."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TypeVar

from tailtune.configs.known_as import VALUES_KNOWN_AS

Entry = TypeVar("Entry")
MAX_LISTED_NAMES = 60
"""A message lists all choices up to this number. If there are more, it lists only the most similar ones."""
MAX_SHOWN_CHARACTERS = 120
"""A message shows at most this many characters of a value."""


class UserError(Exception):
    """Wrong input. The message is one line that names the wrong value and the remedy; `main.py` exits with code 2."""


def unknown(kind: str, name: str, choices: Iterable[str], known_as: Mapping[str, str] | None = None) -> UserError:
    """Create the error for an unknown name. It suggests the most similar choice and lists the choices.

    Args:
        kind: what the name should be, for example "loss_type".
        name: the unknown name.
        choices: the names that exist. If there are more than `MAX_LISTED_NAMES`, only the most similar are listed.
        known_as: name in other projects → name in TailTune. It is suggested before similar names. None: that of the
            option of which the name should be a value.

    Returns:
        The error, for the caller to raise.
    """
    choices, name = sorted(choices), printable(name)
    known_as = VALUES_KNOWN_AS.get(kind.removeprefix("value of "), {}) if known_as is None else known_as
    translated = known_as.get(name.lower().replace("-", "_"))
    suggested = [translated] if translated in choices else nearest(name, choices, 1)
    hint = f"; did you mean '{suggested[0]}'?" if suggested else ";"
    if len(choices) > MAX_LISTED_NAMES:
        others = [choice for choice in choices if choice not in suggested]
        similar = nearest(name, others, 5 - len(suggested), least=0.0)
        choices = [*suggested, *similar, f"… ({len(choices)} in all)"]
    what = f"unknown {kind} '{name}'{hint}" if name else f"no {kind} is given;"
    return UserError(f"{what} choices: {', '.join(choices)}")


def nearest(name: str, choices: Sequence[str], count: int, least: float = 0.55) -> list[str]:
    """The choices that are most similar to a name, ignoring case.

    Args:
        name: the name to compare with.
        choices: the names to choose from.
        count: largest number of names to return.
        least: the smallest similarity, from 0 to 1. With less than 0.55, `learning_rate` would match `calibrate`.

    Returns:
        Up to `count` choices, the most similar first.
    """
    if not count:
        return []
    by_lower_case = {choice.lower(): choice for choice in reversed(choices)}
    return [by_lower_case[match] for match in get_close_matches(name.lower(), by_lower_case, n=count, cutoff=least)]


def printable(value: object) -> str:
    """A value as text that fits into a one-line message.

    Control characters become escapes, and a long text is cut with a note of its length.
    """
    text = str(value)
    if not text[: 2 * MAX_SHOWN_CHARACTERS].isprintable():
        text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    if len(text) <= MAX_SHOWN_CHARACTERS:
        return text
    return f"{text[: MAX_SHOWN_CHARACTERS - 20]}… ({len(text):,} characters)"


@contextmanager
def prefix_errors(key: str) -> Iterator[None]:
    """Within the block, make sure that the message of every `UserError` names an option.

    Args:
        key: the option. It is put before messages that do not contain it as a word.
    """
    try:
        yield
    except UserError as error:
        if re.search(rf"\b{re.escape(key)}\b", str(error)):
            raise
        raise type(error)(f"{key}: {error}") from error


def lookup(table: Mapping[str, Entry], name: str, kind: str) -> Entry:
    """Look up an entry of a table.

    Args:
        table: name → entry.
        name: the name to look up.
        kind: what the name should be, for the message.

    Raises:
        UserError: the table has no such name; the message lists the names that it has.
    """
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]
