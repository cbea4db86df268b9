"""One subject of comparison, an original or several that belong together, and the process that an original runs in."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailtune.configs.errors import UserError
from tailtune.parity.job import Case, Job, Tensors, chosen

Row = dict[str, Any]
"""A line of the table and of docs/parity.json: what was compared, its figures (None: not of this kind), a note."""
Asked = tuple[Mapping[str, Sequence[Case]], Mapping[str, Any]]
"""Kind → its cases, and the settings that all cases share."""

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Subject:
    """What the driver needs to know of a comparison."""

    name: str
    """Its folder below `parity/`."""
    about: str
    """What is compared, in one line."""
    sources: Mapping[str, str]
    """Name of a checkout → the repository that it is cloned from."""
    originals: Mapping[str, tuple[str, str]]
    """What runs as a process → the name of its checkout, and the folder below it to run in."""
    names: Mapping[str, int]
    """The keys that say what a row is → their width in the table."""
    tolerance: Mapping[str, float] | float
    """Largest accepted error of each figure, or of all."""
    figures: Sequence[str]
    procedure: str
    """How the figures were made, for docs/parity.json."""
    ask: Callable[[Mapping[str, Path]], Asked]
    """Checkouts → all cases and settings."""
    inputs: Callable[[Mapping[str, Any]], Tensors]
    """Settings → images, labels and logits for both sides."""
    comparisons: Mapping[str, Callable[[Case, Job], Sequence[Row]]]
    """Kind → (case, answered job) → its rows."""
    patches: Sequence[str] = ()
    """What was replaced in the originals, in memory, so that they run on a CPU of today."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Further environment variables of the originals' processes."""

    def limit(self, figure: str) -> float:
        """The largest accepted error of a figure."""
        return self.tolerance if isinstance(self.tolerance, float) else self.tolerance[figure]

    def above(self, row: Row) -> bool:
        """Whether a figure of a row is above its limit, or not a number."""
        return any(row[name] is not None and not row[name] <= self.limit(name) for name in self.figures)

    def header(self) -> str:
        """First line of the table."""
        return " " * sum(self.names.values()) + "".join(f"{name:>14}" for name in self.figures)

    def line(self, row: Row) -> str:
        """A row as a line of the table."""
        names = "".join(f"{row[key]:{width}.{width - 1}}" for key, width in self.names.items())
        figures = "".join(f"{'' if row[name] is None else format(row[name], '.1e'):>14}" for name in self.figures)
        return names + figures + ("  <-- above" if self.above(row) else "")


def compare(subject: Subject, checkouts: Mapping[str, Path], folder: Path, only: str = "") -> Iterator[Row]:
    """Let the originals compute their side, then compute ours and compare.

    Args:
        subject: what is compared.
        checkouts: name of a checkout → its folder.
        folder: where the originals' tensors go. A tensor file that is there already is not computed again.
        only: compare the cases that contain this text; empty for all.

    Yields:
        The rows, in the order of the cases.

    Raises:
        UserError: no case contains the text, or an original ended with an error.
    """
    all_cases, settings = subject.ask(checkouts)
    cases = chosen(all_cases, only)
    asked = [case for of_kind in cases.values() for case in of_kind]
    if not asked:
        raise UserError(f"no case of {subject.name} has '{only}' in its kind, name, network or data")
    job = Job(folder, cases, settings, subject.inputs(settings))
    job.write()
    for part, (checkout, below) in subject.originals.items():
        if any(case.get("repository", part) == part for case in asked):
            run_original(subject, part, checkouts[checkout] / below, folder)
    for kind, of_kind in cases.items():
        for case in of_kind:
            yield from subject.comparisons[kind](case, job)


def run_original(subject: Subject, part: str, code: Path, folder: Path) -> None:
    """Run `parity/SUBJECT/original.py` in a process of its own, without a GPU, in the folder of an original's code.

    Python puts the working folder first on its path, so the original's packages have their bare names there; ours are
    imported below `tailtune`, which takes this checkout off the path again.

    Raises:
        UserError: the process ended with an error, whose last lines are shown.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, **subject.environment}
    command = [sys.executable, "-m", f"tailtune.parity.{subject.name}.original", str(folder), part]
    done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        raise UserError(f"the original {part} in {code} stopped; its last lines stand above")
