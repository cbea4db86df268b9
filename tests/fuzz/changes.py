"""Data that change between commands: a stored number is never shown for other data without a word, and no image that
was trained on is evaluated as a held-out one."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from tailtune.tests.fuzz.bench import Bench, words
from tailtune.tests.fuzz.edits import EDITS, LAYOUTS, add_test, make, nothing
from tailtune.tests.fuzz.files import alike
from tailtune.tests.fuzz.promises import Finding, broken, lost, snapshot, table_of
from tailtune.tests.fuzz.runner import Outcome

RUN = words("-m tiny_clip_peft num_workers 0 batch_size 16 max_steps 6 num_epochs 2 output_dir run")
WORD = re.compile(
    r"chang|\bnew\b|gone|differ|other |edited|moved|renam|missing|added|removed|no longer|anew|again", re.I
)
"""What tells a user that the data are not those of before."""


COMMANDS: tuple[list[str], ...] = (
    [],
    ["test_only", "True"],
    ["test_only", "True", "few_below", "4"],
    ["test_only", "True", "tte", "True"],
)


def cases(bench: Bench) -> Iterator[Finding | None]:
    """One case: a finished run (sometimes with evaluations), an edit of its data, a command."""
    sound: dict[tuple[str, int], Outcome] = {}
    homes: dict[str, Path] = {}
    while True:
        for layout in LAYOUTS:
            if layout not in homes:
                homes[layout] = prepare(bench, layout)
            which, edit = bench.rng.randrange(len(COMMANDS)), bench.rng.choice(EDITS)
            command = ["-d", "my.yaml", *RUN, *COMMANDS[which]]
            if (layout, which) not in sound:
                with bench.fresh(homes[layout]) as folder:
                    sound[layout, which] = bench.sound(command, folder)
            with bench.fresh(homes[layout]) as folder:
                has_test = (folder / "images" / "test").is_dir()
                if edit is add_test and not has_test:
                    continue
                yield _case(bench, folder, f"{layout}: ", edit, command, sound[layout, which])


def _case(
    bench: Bench, folder: Path, layout: str, edit: Callable[[Path, Random], str], argv: list[str], sound: Outcome
) -> Finding | None:
    old = evaluated(folder)
    story = layout + edit(folder, bench.rng)
    concerned = "test_only" not in argv or evaluated(folder) != old
    before = snapshot(folder / "images")
    outcome = bench.run(argv, folder)
    command = f"{story}: {outcome.command}"
    found = broken(outcome, story) or lost(before, snapshot(folder / "images"), command)
    if found or outcome.code:
        refused = found is None and edit is nothing
        return Finding("b", "refuses data that did not change", command, outcome.stderr) if refused else found
    lists = list((folder / "output" / "run").rglob("splits/*.txt"))
    if found := leaked(lists, command):
        return found
    told = new_words(outcome.stdout + outcome.stderr, sound.stdout)
    same = alike(table_of(outcome.stdout), table_of(sound.stdout))
    if edit is nothing:
        return (
            None if same else Finding("b", "other numbers, although the data did not change", command, outcome.stdout)
        )
    if not told and (concerned or not same):
        shown = "the stored numbers" if same else "other numbers"
        return Finding("b", f"{shown} without a word, {edit.__name__}", command, outcome.stdout)
    if "held out" in layout and not lists:
        return Finding("b", "no splits/*.txt says what was held out", command)
    return None


def evaluated(folder: Path) -> dict[str, str]:
    """What an evaluation reads, as far as can be told from outside: test images and their list, else all images."""
    split = folder / "images" / "test"
    files = snapshot(split if split.is_dir() else folder / "images", passing={".DS_Store", "README.txt"})
    return {**files, "list": (folder / "test.txt").read_text() if (folder / "test.txt").exists() else ""}


def leaked(lists: list[Path], command: str) -> Finding | None:
    """Whether a list of evaluated images, lines `relative/path label`, holds one that was trained on."""
    named = {path: {line.rpartition(" ")[0] for line in path.read_text().splitlines()} for path in lists}
    trained = set().union(*(each for path, each in named.items() if "train" in path.name))
    for path, each in named.items():
        if "train" not in path.name and (both := each & trained):
            return Finding("b", "evaluates images that were trained on", command, f"{path.name}: {sorted(both)[:9]}")
    return None


def new_words(printed: str, usual: str) -> list[str]:
    """Lines that a command on the old data does not print, and that speak of a change."""
    known = {re.sub(r"\d+", "0", line) for line in usual.splitlines()}
    return [line for line in printed.splitlines() if re.sub(r"\d+", "0", line) not in known and WORD.search(line)]


def prepare(bench: Bench, layout: str) -> Path:
    """A finished run on images of three classes, with one evaluation."""
    home = bench.folder / layout.replace(" ", "-")
    with bench.fresh() as folder:
        make(folder, bench.rng, layout)
        for extra in ([], COMMANDS[-1]):
            bench.sound(["-d", "my.yaml", *RUN, *extra], folder)
        return folder.rename(home)
