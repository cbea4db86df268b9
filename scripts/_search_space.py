"""The search space of tune.py: options whose values are ranges, such as `lr=log(1e-3,1e-1)`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tailtune.configs.command_words import separated
from tailtune.configs.errors import UserError, printable

RANGE = re.compile(r"(log|uniform|int|choice)\((.*)\)", re.S)
EXAMPLES = "log(1e-3,1e-1), uniform(0,1), int(1,8) or choice(LA,CE)"
DIGITS, MOST_DIGITS = 4, 17
"""Significant digits of a number that is drawn, so that commands and names of run folders stay readable. It has
more, up to the second number, where it would leave the range, or where few values would remain of a narrow range."""


@dataclass(frozen=True)
class Range:
    """The values that an option may get."""

    kind: str
    """log | uniform | int | choice"""
    values: tuple[str, ...]
    """The least and the largest value, or the choices, as written."""

    @classmethod
    def parse(cls, key: str, text: str) -> "Range | None":
        """Read the value of a word `KEY=VALUE`.

        Returns:
            The range; None if the value is a single one.

        Raises:
            UserError: the range is wrong.
        """
        match = RANGE.fullmatch(text.strip())
        if match is None:
            return None
        kind, values = match[1], tuple(part.strip() for part in match[2].split(","))
        shown = f"{key}={printable(text)}"
        if kind == "choice":
            if len(set(values)) < max(2, len(values)) or not all(values):
                raise UserError(f"{shown}: a choice needs at least two different values, as in choice(LA,CE)")
            return cls(kind, values)
        try:
            least, most = (int(value) if kind == "int" else float(value) for value in values)
        except ValueError:
            raise UserError(f"{shown}: {kind} needs two numbers; a range is {EXAMPLES}") from None
        if not least < most < float("inf") or least == -float("inf"):
            raise UserError(f"{shown}: the first number must be below the second one")
        if kind == "log" and least <= 0:
            raise UserError(f"{shown}: the numbers of log must be above 0; use uniform for a range that has 0")
        return cls(kind, values)

    def suggest(self, trial: Any, key: str) -> str:
        """The value that Optuna chooses for a trial, as a word of a command."""
        if self.kind == "choice":
            return str(trial.suggest_categorical(key, self.values))
        if self.kind == "int":
            return str(trial.suggest_int(key, *map(int, self.values)))
        least, most = map(float, self.values)
        number = trial.suggest_float(key, least, most, log=self.kind == "log")
        texts = (f"{number:.{digits}g}" for digits in range(DIGITS, MOST_DIGITS))
        near = (
            text for text in texts if least <= float(text) <= most and abs(float(text) - number) < (most - least) / 500
        )
        return next(near, repr(number))

    def __str__(self) -> str:
        return f"{self.kind}({','.join(self.values)})"


def split_space(words: Sequence[str]) -> tuple[list[str], dict[str, Range]]:
    """Separate the options with one value from those with a range.

    Args:
        words: `KEY VALUE` and `KEY=VALUE` in any mixture.

    Returns:
        The words `KEY VALUE` of the former, and key → range of the latter.

    Raises:
        UserError: a range is wrong, an option is given twice, or there is no range.
    """
    flat = separated(words)
    if len(flat) % 2:
        raise UserError(f"option '{printable(flat[-1])}' has no value; give it as KEY VALUE or KEY=VALUE")
    pairs: list[str] = []
    space: dict[str, Range] = {}
    for key, text in zip(flat[::2], flat[1::2], strict=True):
        found = Range.parse(key, text)
        if key in space or (found and key in pairs[::2]):
            raise UserError(f"{key} is given twice; give it one range")
        if found is None:
            pairs += [key, text]
        else:
            space[key] = found
    if not space:
        raise UserError("nothing to search: give an option a range, in quotes for the shell: 'lr=log(1e-3,1e-1)'")
    return pairs, space
