"""A process that belongs to a run is killed or stopped: a loader's worker; a rank of two, or their launcher."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random

import psutil

from tailtune.tests.fuzz.bench import TINY, Bench, words
from tailtune.tests.fuzz.promises import Finding, broken, numbers, weights
from tailtune.tests.fuzz.runner import MAIN, Limits, Outcome, Running

WORDS = [*TINY, *words("batch_size 32 max_steps 20 num_epochs 9 save_every 1 output_dir run")]
LAUNCH = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
)
SOON = 30.0
"""Seconds in which a run must end after the harm."""

AFTERWARDS = 3.0
"""Seconds in which our line follows the end of a launcher."""


def _kill_one(running: Running, rng: Random) -> None:
    others = running.children()
    if others:
        rng.choice(others).kill()


def _stop(number: signal.Signals, group: bool) -> Callable[[Running, Random], None]:
    return lambda running, rng: running.send(number, group)


Harm = tuple[Callable[[Running, Random], None], str]
TO_WORKERS: Mapping[str, Harm] = {
    "kill -9 of a worker": (_kill_one, "error: "),
    "Ctrl-C, with workers": (_stop(signal.SIGINT, True), "interrupted"),
    "SIGTERM, with workers": (_stop(signal.SIGTERM, False), "interrupted"),
}
TO_RANKS: Mapping[str, Harm] = {
    "kill -9 of a rank": (_kill_one, "error: "),
    "kill -9 of the launcher": (_stop(signal.SIGKILL, False), ""),
    "SIGTERM to the launcher": (_stop(signal.SIGTERM, False), "interrupted"),
    "Ctrl-C to launcher and ranks": (_stop(signal.SIGINT, True), "interrupted"),
}
"""What is done → how, and how the last line on standard error begins."""


def workers(bench: Bench) -> Iterator[Finding | None]:
    """One case: `num_workers 2`, the harm at a random moment, the command repeated."""
    yield from _cases(bench, [*WORDS, "num_workers", "2"], None, TO_WORKERS)


def ranks(bench: Bench) -> Iterator[Finding | None]:
    """One case: a launch of two processes, the harm at a random moment, the launch repeated; now and then a refusal."""
    launch = (*LAUNCH, *MAIN)
    with bench.fresh() as folder:
        refused = Running(["lr", "fast", *WORDS], folder, bench.limits, launch)
        yield _last_line(_settled(refused, refused.wait()), "a refused option", "error: ")
    yield from _cases(bench, WORDS, launch, TO_RANKS)


def _cases(
    bench: Bench, argv: list[str], launch: tuple[str, ...] | None, harms: Mapping[str, Harm]
) -> Iterator[Finding | None]:
    with bench.fresh() as folder:
        bench.sound(argv, folder, launch)
        sound = _left(folder)
    while True:
        for what, harm in harms.items():
            with bench.fresh() as folder:
                running = Running(argv, folder, bench.limits, launch)
                delay = bench.rng.uniform(0, 3)
                found = _harmed(bench, folder, running, (what, *harm), delay)
                yield found or _repeated(bench, folder, argv, launch, f"{what} {delay:.1f} s into training", sound)


def _harmed(
    bench: Bench, folder: Path, running: Running, harm: tuple[str, Callable[[Running, Random], None], str], delay: float
) -> Finding | None:
    what, act, line = harm
    while not (folder / "output/run/state").exists() and running.alive(0.02):
        pass
    running.alive(delay)
    others = running.children()
    act(running, bench.rng)
    running.limits = Limits(time.monotonic() - running.begin + SOON)
    outcome = running.wait()
    outlived = psutil.wait_procs(others, timeout=SOON)[1]
    for each in outlived:
        each.kill()
    if outlived:
        return Finding("c", f"{what}: processes outlive it", outcome.command, outcome.stderr[-1500:])
    if "launcher" in what or "rank" in what:
        # A signal may come when the processes have just ended well; only the launcher has something to say then.
        finished = (folder / "output/run/metrics.json").exists()
        return _last_line(_settled(running, outcome), what, "" if finished else line)
    return broken(outcome, what, codes=(0, 2 if line == "error: " else 130))


def _settled(running: Running, outcome: Outcome) -> Outcome:
    """With what is said after a launcher has ended."""
    time.sleep(AFTERWARDS)
    return replace(outcome, stderr=running.texts()[1])


def _last_line(outcome: Outcome, what: str, line: str) -> Finding | None:
    """Of a launch: the launcher has lines and exit codes of its own, but ours comes last."""
    if found := broken(replace(outcome, code=0, stdout="", stderr="")):
        return replace(found, what=f"{what}: {found.what}", detail=outcome.stderr[-1500:])
    last = (outcome.stderr.strip().splitlines() or [""])[-1]
    if outcome.code == 0 or last.startswith(line):
        return None
    return Finding("d", f"{what}: the last line is not `{line}…`", outcome.command, outcome.stderr[-1500:])


def _repeated(
    bench: Bench, folder: Path, argv: list[str], launch: tuple[str, ...] | None, story: str, sound: object
) -> Finding | None:
    again = Running(argv, folder, bench.limits, launch).wait()
    found = _last_line(again, "the same launch again", "") if launch else broken(again, f"{story}, then", codes=(0,))
    if found or again.code:
        return found or Finding(
            "d", f"the same launch again ends in {again.code}", f"{story}, then {again.command}", again.stderr
        )
    if _left(folder) != sound:
        return Finding(
            "b", "a harmed run ends in other numbers", f"{story}, then: {again.command}", again.stdout[-800:]
        )
    return None


def _left(folder: Path) -> object:
    return weights(folder / "output" / "run"), numbers(folder / "output" / "run")
