"""The command by which the user has started TailTune, for usage texts and messages."""

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from tailtune.configs.errors import UserError

IN_CHECKOUT = Path(__file__).parents[1].joinpath("tailtune.py").is_file()
"""Whether this is a checkout; the installed package has this file as `__init__.py`."""


class Parser(argparse.ArgumentParser):
    """A parser that raises a `UserError` for wrong arguments."""

    def error(self, message: str) -> NoReturn:
        """Raise the error instead of exiting."""
        raise UserError(f"{message}; see {self.prog} --help")


def program() -> str:
    """The command that the user typed, such as `python main.py` or `tailtune`.

    In a process of another program, such as a notebook, this is the command that the user could type.
    """
    started = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]  # without the arguments of the program
    if started[-2:] == ["-m", "tailtune"]:
        return "python -m tailtune"
    if started and Path(started[-1]).stem == "tailtune":
        return "tailtune"
    return "python main.py" if IN_CHECKOUT else "tailtune"


def launch_target() -> str:
    """What stands for this program behind `accelerate launch`: `main.py` or `-m tailtune`."""
    return "main.py" if program() == "python main.py" else "-m tailtune"


def print_text(text: str) -> None:
    """Print on standard output. A closed pipe, as in `main.py --list | head`, is no error.

    Args:
        text: the lines.
    """
    with suppress(BrokenPipeError):
        print(text)
