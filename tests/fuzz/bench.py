"""What the parts of the campaign share: seeded draws, scratch folders, small commands."""

import random
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.strategies import SearchStrategy

from tailtune.tests.fuzz.promises import broken
from tailtune.tests.fuzz.runner import Limits, Outcome, run

Value = TypeVar("Value")
BATCH = 50
"""Values drawn at once."""
PATIENCE = 30.0
"""Seconds in which a folder of the case before must be gone."""

words = shlex.split
TINY = words("-d fake_lt -m tiny_clip_peft num_workers 0 max_test_images 40")
SHORT = words("batch_size 32 max_steps 4 save_every 1")
"""A run of four steps on generated images: two seconds."""


class Unusable(Exception):
    """A command on sound files did not end well, so its part has nothing to compare with: args are a `Finding`."""


class Bench:
    """A part's own seed, random numbers and scratch folder.

    Args:
        folder: scratch, removed by whoever made it.
    """

    def __init__(self, part: str, seed: int, folder: Path, limits: Limits):
        self.seed = f"{part}-{seed}"
        self.rng = random.Random(self.seed)
        self.folder, self.limits = folder, limits
        folder.mkdir(parents=True)
        set_hypothesis_home_dir(folder / "hypothesis")  # else it makes a folder where the campaign is started

    @contextmanager
    def fresh(self, like: Path | None = None) -> Iterator[Path]:
        """The working directory of a case, empty or a copy of another, always at the same place, as a run notes where
        its data lie."""
        path = self.folder / "case"
        end = time.monotonic() + PATIENCE
        while path.exists() and time.monotonic() < end:  # a killed process may be in the middle of a write
            shutil.rmtree(path, ignore_errors=True)
        path.mkdir() if like is None else shutil.copytree(like, path, symlinks=True)
        yield path

    def run(self, words: Sequence[str], cwd: Path) -> Outcome:
        return run(words, cwd, self.limits)

    def sound(self, words: Sequence[str], cwd: Path, program: Sequence[str] | None = None) -> Outcome:
        """A command that must succeed before anything can be harmed. Raises Unusable."""
        outcome = run(words, cwd, self.limits, program)
        found = broken(outcome, "on sound files", codes=(0,), limits=self.limits)
        if outcome.code:
            raise Unusable(found)
        return outcome

    def draws(self, strategy: SearchStrategy[Value]) -> Iterator[Value]:
        """Values of a strategy without end, the same for the same seed."""
        batch = 0
        while True:
            yield from _drawn(strategy, f"{self.seed}-{batch}")
            batch += 1


def _drawn(strategy: SearchStrategy[Value], seed: str) -> list[Value]:
    found: list[Value] = []

    @seeded(seed)
    @settings(
        max_examples=BATCH,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: Value) -> None:
        found.append(value)

    collect()
    return found
