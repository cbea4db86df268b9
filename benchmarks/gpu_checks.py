"""Rows of `benchmarks/gpu.py` that are no measured steps: the memory of every shipped config, and tests on the GPU."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tailtune.benchmarks.gpu_steps import Bench, Facts
from tailtune.benchmarks.steps.side import ROOT
from tailtune.configs.errors import UserError

CARD = 20e9
"""Bytes of the card that every shipped config should fit."""
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")
NAME = re.compile(r"tests/\S+::.*?(?= (?:PASSED|FAILED|ERROR|SKIPPED)\b| - |$)")


@dataclass(frozen=True)
class MemoryRows:
    """Two steps of each config with its own batch."""

    configs: Sequence[str]
    """Data config and model config, as words."""
    needs: float = 15
    """Seconds for one of them, and for the start of the process."""

    @property
    def names(self) -> list[str]:
        """The row of each config."""
        return [row_of(words) for words in self.configs]

    def measure(self, bench: Bench) -> Iterator[tuple[str, Facts]]:
        """Row and facts of one config after another, until the time is over."""
        left = list(self.configs)
        while left and bench.left() > self.needs:
            try:
                with bench.side("memory", {"name": "shipped configs"}) as side:
                    while left and bench.left() > self.needs:
                        yield row_of(left[0]), judged(side.step(left[0]), bench)
                        left.pop(0)
            except UserError as error:  # the process ended; the next config gets another one
                yield row_of(left.pop(0)), bench.ended(error)


def row_of(words: str) -> str:
    """The name of the row of a config."""
    return f"memory {words}"


def judged(facts: Facts, bench: Bench) -> Facts:
    """What a process has answered about a config, with the target."""
    if "why" in facts:
        return {"status": "skipped" if facts["why"] == "nothing trains" else "failed", **facts}
    fits = not bench.device or facts["reserved"] <= CARD
    return {"status": "measured", **facts, "missed": [] if fits else [f"more than {CARD / 1e9:.0f} GB"]}


@dataclass(frozen=True)
class TestsRow:
    """A part of the tests, run by pytest on the device of the bench."""

    __test__ = False  # pytest collects classes of this name
    name: str
    words: Sequence[str]
    """Arguments of pytest."""
    log: Path
    """Where its output goes."""
    limit: float
    """Seconds after which it is stopped."""
    needs: float = 40

    @property
    def names(self) -> list[str]:
        """The one row."""
        return [self.name]

    def measure(self, bench: Bench) -> Iterator[tuple[str, Facts]]:
        """The row and its facts: `passed`, `failed` (names), `skipped`, `complete` (no limit stopped it)."""
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not slow", "-v"]
        environment = {**os.environ, "TAILTUNE_TEST_DEVICE": "cuda" if bench.device else "cpu"}
        started, complete = time.monotonic(), True
        with self.log.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*command, *self.words], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                process.wait(max(min(self.limit, bench.left()), 0))
            except subprocess.TimeoutExpired:
                complete = False
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with the workers of pytest-xdist
                    process.wait()
        facts = outcomes(self.log.read_text(encoding="utf-8")) | {"complete": complete}
        facts["tests_took"] = time.monotonic() - started
        failed = facts["failed"]
        facts["missed"] = [f"{len(failed)} tests failed"] if failed else [] if facts["passed"] else ["no test passed"]
        if not complete and not failed and not facts["passed"]:
            facts = {"status": "not run", "why": f"no test ended within {facts['tests_took']:.0f} s"}
        yield self.name, {"status": "measured", **facts}


def outcomes(output: str) -> Facts:
    """Count what `pytest -v` has printed so far, with and without pytest-xdist.

    Args:
        output: its lines.

    Returns:
        `passed` and `skipped`: numbers; `failed`: names, those of errors too.
    """
    found: dict[str, str] = {}
    for line in output.splitlines():
        outcome, named = OUTCOME.search(line), NAME.search(line)
        if outcome and named and found.get(name := named.group().strip()) not in ("FAILED", "ERROR"):
            found[name] = outcome.group()
    kinds = list(found.values())
    failed = sorted(name for name, kind in found.items() if kind in ("FAILED", "ERROR"))
    return {"passed": kinds.count("PASSED"), "skipped": kinds.count("SKIPPED"), "failed": failed}
