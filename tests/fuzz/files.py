"""Damage to any file of a run folder, finished or not; then the same numbers as before, or one line, never others."""

import hashlib
import json
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import strategies as st

from tailtune.tests.fuzz.bench import TINY, Bench, Unusable, words
from tailtune.tests.fuzz.damage import DAMAGES, Unfit, fits
from tailtune.tests.fuzz.promises import NUMBERS, Finding, broken, table_of, weights
from tailtune.tests.fuzz.runner import Outcome, Running

LORA = [*TINY, *words("adaptformer False lora True test_dists uniform,forward5 output_dir run")]
TRAIN = [*LORA, *words("batch_size 32 max_steps 10 save_every 1")]
KILLED_AFTER = 5
CLOSE = 0.05
"""Largest difference of percentages that only rounding explains."""
TESTED = ["test_only", "True", "tte", "True"]
COMMANDS: Sequence[tuple[str, list[str]]] = (
    ("metrics.json", []),
    ("tests/max*forward5/metrics.json", ["test_only", "True"]),
    ("tests/*many_above_5*/metrics.json", ["test_only", "True", "many_above", "5"]),
    ("tests/max*tte_True/metrics.json", TESTED),
    ("tests/few_below*/metrics.json", [*TESTED, "few_below", "10"]),
    ("export/**/*.safetensors", ["export", "merged"]),
)
"""What is asked of a finished run: (its result, words)."""


UNREAD = {"log.txt", ".lock", ".tailtune.lock"}
TELLING = ["number", "key", "rows", "nan"]
"""Damage that leaves a file which can be read; drawn more often."""


@dataclass(frozen=True)
class Sound:
    """What a command does to files that are whole."""

    table: list[list[str | float]]
    results: list[Any]
    weights: str | None


def cases(bench: Bench) -> Iterator[Finding | None]:
    """One case is one damaged file and one command; every third is an unfinished run."""
    finished, unfinished = bench.folder / "finished", bench.folder / "unfinished"
    prepare(bench, finished, unfinished)
    sound: dict[int, Sound] = {}
    kinds = st.sampled_from([*DAMAGES, *3 * TELLING])
    for kind, draw, which in bench.draws(st.tuples(kinds, st.integers(0, 2**32), st.integers(-3, len(COMMANDS) - 1))):
        home, (pattern, extra) = (finished, COMMANDS[which]) if which >= 0 else (unfinished, COMMANDS[0])
        which = max(which, -1)
        if which not in sound:
            with bench.fresh(like=home) as folder:
                sound[which] = seen(bench.sound([*TRAIN, *extra], folder), folder / "output" / "run", pattern)
        with bench.fresh(like=home) as folder:
            path = chosen(folder / "output" / "run", kind, Random(draw))
            try:
                story = f"{path.relative_to(folder)} of {home.name} run: {DAMAGES[kind](path, Random(draw))}"
            except Unfit:
                continue
            outcome = bench.run([*TRAIN, *extra], folder)
            yield broken(outcome, story) or compare(outcome, folder / "output" / "run", pattern, sound[which], story)


def chosen(run: Path, kind: str, rng: Random) -> Path:
    """A file that such damage fits; seldom one that no later command reads."""
    files = [each for each in sorted(run.rglob("*")) if each.is_file() and fits(kind, each)]
    read = [each for each in files if each.name not in UNREAD and each.parent.name != "tensorboard"]
    return rng.choice(read if read and rng.random() < 0.9 else files)


def prepare(bench: Bench, finished: Path, unfinished: Path) -> None:
    """A finished run with two evaluations, and one that was killed."""
    for folder in (finished, unfinished):
        folder.mkdir()
    for extra in ([], TESTED):
        bench.sound([*TRAIN, *extra], finished)
    running = Running(TRAIN, unfinished)
    while not (unfinished / f"output/run/state/{KILLED_AFTER:08d}/facts.json").exists() and running.alive():
        time.sleep(0.002)
    running.send(signal.SIGKILL)
    if (outcome := running.wait()).code != -signal.SIGKILL:
        raise Unusable(Finding("d", "ends before it could be killed", outcome.command, outcome.stderr))


def compare(outcome: Outcome, run: Path, pattern: str, sound: Sound, story: str) -> Finding | None:
    """Whether a command on damaged files that says it is done has given other numbers."""
    if outcome.code:
        return None
    command = f"{story}: {outcome.command}"
    try:
        now = seen(outcome, run, pattern)
    except (ValueError, OSError) as error:
        return Finding("b", "exit 0 beside a result that cannot be read", command, f"{error}\n{outcome.stdout[-800:]}")
    if not alike(now.table, sound.table):
        return Finding("b", "shows other numbers", command, f"{sound.table}\nnow {now.table}")
    if not alike(now.results, sound.results):
        return Finding(
            "b", f"writes or keeps other numbers in {pattern}", command, f"{sound.results}\n{now.results}"[:3000]
        )
    if now.weights != sound.weights and "of unfinished run" in story:
        return Finding("b", "trains other weights", command, outcome.stdout[-800:])
    return None


def alike(one: Any, other: Any) -> bool:
    """Whether numbers and texts agree; logits are stored in half precision, so what is computed from them may differ by
    `CLOSE`, and bins of confidence by an image."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one if key != "calibration")
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= CLOSE
    return bool(one == other)


def seen(outcome: Outcome, run: Path, pattern: str) -> Sound:
    """What a command showed and left. Raises ValueError or OSError for a result that is no result."""
    results = []
    for path in sorted(run.glob(pattern)):
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            results.append({key: content.get(key) for key in NUMBERS})
        else:
            results.append(hashlib.sha256(path.read_bytes()).hexdigest())
    if not results:
        raise OSError(f"no {pattern}")
    return Sound(table_of(outcome.stdout), results, weights(run))
