"""The four promises as checks of what a command did, and what a broken one is reported as."""

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailtune.tests.fuzz.runner import Limits, Outcome

NUMBERS = ("class_counts", "params", "test", "distributions", "ensemble", "experts_used")
"""What of metrics.json must not depend on when, where and in how many pieces it was computed."""
PASSING = {"log.txt", ".lock", ".tailtune.lock", "tailtune.json"}
"""Files of a run's own folder that a refused command may touch: what it said, that it was there."""


@dataclass(frozen=True)
class Finding:
    """A broken promise.

    Args:
        promise: a, b, c or d, as the package says.
        what: what was seen, without the numbers and names of the case, so that equal ones can be counted.
        command: how to see it again, with what was done to the files before.
        detail: the end of what the command printed.
    """

    promise: str
    what: str
    command: str
    detail: str = ""


def broken(
    outcome: Outcome, story: str = "", codes: Collection[int] = (0, 2), limits: Limits | None = None
) -> Finding | None:
    """Whether promise c or d is broken.

    Args:
        story: what was done to the files before, in words.
        codes: exit codes that are right here; 2 and 130 come with one line.
    """
    limits = limits or Limits()
    command = f"{story}: {outcome.command}" if story else outcome.command
    printed = (outcome.stdout[-700:] + outcome.stderr)[-1500:]
    lines = outcome.stderr.splitlines()
    if outcome.hung:
        return Finding("c", f"hangs ({_stage(outcome)})", command, f"killed after {outcome.seconds:.0f} s\n{printed}")
    if outcome.memory > limits.memory:
        gigabytes = outcome.memory / 2**30
        return Finding(
            "c", f"takes more than a gigabyte ({_stage(outcome)})", command, f"{gigabytes:.1f} GiB\n{printed}"
        )
    if outcome.left:
        return Finding("c", "leaves processes behind", command, f"{outcome.left} of them\n{printed}")
    if "Traceback (most recent call last)" in outcome.stderr + outcome.stdout:
        return Finding("d", _raised(outcome.stderr + outcome.stdout), command, outcome.stderr[-1500:])
    if outcome.code not in codes:
        return Finding("d", f"exit code {outcome.code}", command, printed)
    if outcome.code == 2 and not (len(lines) == 1 and lines[0].startswith("error: ")):
        others = [line for line in lines if not line.startswith("error: ")]
        return Finding("d", f"not one line `error: …`: {_plain((others or lines or ['none'])[0])}", command, printed)
    if outcome.code == 130 and not (len(lines) == 1 and lines[0].startswith("interrupted")):
        return Finding("d", f"not one line `interrupted`: {_plain((lines or ['none'])[-1])}", command, printed)
    return None


def snapshot(folder: Path, passing: Collection[str] = ()) -> dict[str, str]:
    """Every file, link and folder below one → what it holds; but for names in `passing`."""
    found = {}
    for path in folder.rglob("*"):
        if path.name in passing:
            continue
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not any(path.iterdir()) if path.is_dir() else True:
            found[name] = "empty folder or special file"
    return found


def lost(before: Mapping[str, str], after: Mapping[str, str], command: str) -> Finding | None:
    """Promise a: whether something of `before` is gone or another thing."""
    gone = [name for name in before if name not in after]
    changed = [name for name in before if name in after and after[name] != before[name]]
    if not gone and not changed:
        return None
    what = "a file of the user's is " + ("gone" if gone else "changed")
    return Finding("a", what, command, f"gone: {gone[:5]}; changed: {changed[:5]}")


def numbers(run: Path) -> dict[str, Any]:
    """The results of a run folder and of its evaluations, by file; {} where there are none."""
    found = {}
    for path in sorted([*run.glob("metrics.json"), *run.glob("tests/*/metrics.json")]):
        content = json.loads(path.read_text())
        train = {key: (content.get("train") or {}).get(key) for key in ("epochs", "steps")}
        found[path.relative_to(run).as_posix()] = {key: content.get(key) for key in NUMBERS} | train
    return found


def weights(run: Path) -> str | None:
    """Digest of what a run has trained, None if it has not ended."""
    path = run / "checkpoint" / "tensors.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def table_of(printed: str) -> list[list[str | float]]:
    """The words and numbers of every row of results that a command shows: three numbers follow each other there."""
    rows = [line for line in printed.splitlines() if re.search(r"(?:(?:\d+\.\d\d|n/a)\s+){3}", line)]
    return [[float(word) if re.fullmatch(r"\d+\.\d\d", word) else word for word in row.split()] for row in rows]


def _stage(outcome: Outcome) -> str:
    return "dry run" if "--dry-run" in outcome.command else "run"


def _raised(printed: str) -> str:
    """Where a traceback ends in our code, and with what."""
    frames = re.findall(
        r'File "(?:[^"]*/)?((?:configs|datasets|models|trainers|scripts)/[\w/]+\.py)", line \d+, in (\w+)', printed
    )
    place = "{}: {}".format(*frames[-1]) if frames else "outside our code"
    errors = re.findall(
        r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Bomb|Exit|Warning|Empty|failed)\w*)(?=:|$)",
        printed,
        re.M,
    )
    return f"traceback: {errors[-1] if errors else 'unknown'} in {place}"


def _plain(line: str) -> str:
    """A line without what differs from case to case."""
    return re.sub(r"\d+", "0", re.sub(r"'[^']*'|/\S+", "…", line))[:120]
