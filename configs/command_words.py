"""Separates the words `KEY=VALUE` of a command line."""

import re
from collections.abc import Sequence

KEY_EQUALS = re.compile(r"[A-Za-z][\w.-]*=")
"""Beginning of a word `KEY=VALUE`."""


def separated(words: Sequence[str]) -> list[str]:
    """Replace every `KEY=VALUE` by the two words `KEY VALUE`. A value that contains `=` remains one word.

    Args:
        words: `KEY VALUE` and `KEY=VALUE` in any mixture.
    """
    found: list[str] = []
    for word in words:
        is_pair = len(found) % 2 == 0 and KEY_EQUALS.match(word)
        found += word.split("=", 1) if is_pair else [word]
    return found
