"""Runs of one and of two stages that are stopped at random moments, and repeated until they are done."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tailtune.tests.fuzz.bench import TINY, Bench, words
from tailtune.tests.fuzz.promises import Finding, broken, numbers, weights
from tailtune.tests.fuzz.runner import MAIN, Outcome, Running

STEPS = words("batch_size 32 max_steps 12 save_every 1 num_epochs 4 test_dists uniform,forward5 output_dir run")
RUNS: Mapping[str, list[str]] = {
    "one stage": [*TINY, *STEPS],
    "two stages": ["-d", "fake_lt", "-m", "tiny_clip_h2t", *TINY[4:], *STEPS],
}
GAP = 0.15
"""Seconds between two of several Ctrl-C."""


def _once(number: signal.Signals) -> Callable[[Running], None]:
    return lambda running: running.send(number, group=number == signal.SIGINT)


def _impatient(running: Running) -> None:
    for _ in range(5):
        running.send(signal.SIGINT, group=True)
        time.sleep(GAP)


STOPS: Mapping[str, tuple[Callable[[Running], None], int, bool]] = {
    "SIGKILL": (_once(signal.SIGKILL), -signal.SIGKILL, False),
    "SIGTERM": (_once(signal.SIGTERM), 130, False),
    "Ctrl-C": (_once(signal.SIGINT), 130, False),
    "Ctrl-C five times": (_impatient, 130, True),
}
"""How → (what is done, exit code, whether in a Python of its own, so that imports and exit are met too)."""
WEIGHTS = (5, 1, 1, 1)


def cases(bench: Bench) -> Iterator[Finding | None]:
    """One case is one run, stopped one to three times; runs of one and of two stages by turns."""
    sound = {}
    while True:
        for kind, argv in RUNS.items():
            if kind not in sound:
                with bench.fresh() as folder:
                    whole = bench.sound(argv, folder)
                    sound[kind] = left(folder), whole.seconds
            with bench.fresh() as folder:
                yield _case(bench, folder, argv, *sound[kind])


def _case(bench: Bench, folder: Path, argv: list[str], sound: object, seconds: float) -> Finding | None:
    story = []
    for _ in range(bench.rng.choice((1, 2, 3))):
        (how,) = bench.rng.choices(list(STOPS), WEIGHTS)
        stop, code, own = STOPS[how]
        delay = bench.rng.uniform(0.05, 1.1) * (seconds + (8 if own else 0))
        story.append(f"{how} after {delay:.2f} s")
        outcome = stopped(Running(argv, folder, bench.limits, MAIN if own else None), delay, stop)
        if found := broken(outcome, ", ".join(story), codes=(0, code)):
            return found
    outcome = bench.run(argv, folder)
    if found := broken(outcome, ", ".join([*story, "then"]), codes=(0,)):
        return found
    if left(folder) != sound:
        printed = f"{sound}\n{left(folder)}"[:3000]
        return Finding("b", "a stopped run ends in other numbers", f"{', '.join(story)}: {outcome.command}", printed)
    return None


def stopped(running: Running, delay: float, stop: Callable[[Running], None]) -> Outcome:
    if running.alive(delay):
        stop(running)
    return running.wait()


def left(folder: Path) -> object:
    """Weights and numbers of every stage."""
    runs = [folder / "output" / "run", folder / "output" / "run" / "stage1"]
    return [(weights(each), numbers(each)) for each in runs]
