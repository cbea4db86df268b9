"""What the parts of the campaign share: seeded draws, scratch folders, small commands."""

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.strategies import SearchStrategy

from tests.fuzz.runner import Limits, Outcome, run

Value = TypeVar("Value")
BATCH = 50
"""Values drawn at once."""

TINY = ["-d", "fake_lt", "-m", "tiny_clip_peft", "num_workers", "0", "max_test_images", "40"]
SHORT = ["batch_size", "32", "max_steps", "4", "save_every", "1"]
"""A run of four steps on generated images: two seconds."""


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

    @contextmanager
    def fresh(self, like: Path | None = None) -> Iterator[Path]:
        """The working directory of a case, empty or a copy of another, always at the same place, as a run notes where
        its data lie."""
        path = self.folder / "case"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir() if like is None else shutil.copytree(like, path, symlinks=True)
        yield path

    def run(self, words: Sequence[str], cwd: Path) -> Outcome:
        return run(words, cwd, self.limits)

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
