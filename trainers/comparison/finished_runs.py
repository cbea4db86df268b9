"""Finds the results among folders, and puts those that differ only in their seed into one row."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tailtune.configs import load_resolved, values_of
from tailtune.configs.errors import UserError
from tailtune.configs.key import TRAIN
from tailtune.configs.schema import Schema
from tailtune.trainers.comparison.rows import Result, Row
from tailtune.trainers.runs.result_table import read_result

SHOWN = 5
"""Number of folders without a result that the message names."""


def folder_rows(folders: Sequence[Path], schema: Schema) -> tuple[list[Row], str]:
    """Create one row for all runs that differ only in their seed.

    A row has each seed once, because a standard deviation over a repetition of a seed would not be one over seeds. So a
    second run of the same seed, such as one that `resume False` has moved aside, begins another row. A copy of a run is
    left out, and so is its evaluation with the same options.

    Args:
        folders: finished run folders, or folders `tests/KEY` within them.
        schema: all options.

    Returns:
        The rows; and one line about the copies that were left out, empty if there are none.

    Raises:
        UserError: a file of a run is damaged.
    """
    copies: list[str] = []
    groups: dict[tuple[str, int], list[tuple[Path, Result]]] = {}
    checkpoints: dict[tuple[str, Any], dict[str, Path]] = {}
    for folder in dict.fromkeys(folders):
        contents = read_result(folder / "metrics.json")
        identity, seed = _identity(folder, contents, schema)
        known = checkpoints.setdefault((identity, seed), {})
        checkpoint = contents.get("evaluation", {}).get("checkpoint") or os.path.realpath(folder)
        if checkpoint in known:
            copies.append(f"{folder} (the same as {known[checkpoint]})")
            continue
        groups.setdefault((identity, len(known)), []).append((folder, contents))
        known[checkpoint] = folder
    return [_row(group) for group in groups.values()], _left_out(copies, len(folders))


def with_result(names: Sequence[str]) -> tuple[list[Path], str]:
    """Select the folders that contain the result of a run.

    Args:
        names: paths, such as all that the shell expands from `output/*`.

    Returns:
        The folders with a result; and one line about the other paths, empty if there are none.

    Raises:
        UserError: a path does not exist, or no folder contains a result.
    """
    for name in names:
        if not Path(name).exists():
            raise UserError(f"{name} is no folder; name run folders")
    reasons = {name: _why_no_result(Path(name)) for name in dict.fromkeys(names)}
    folders = [Path(name) for name, reason in reasons.items() if not reason]
    others = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
    if not folders:
        raise UserError(f"no metrics.json of a run in {', '.join(others[:SHOWN])}; name the folder of a finished run")
    return folders, _left_out(others, len(reasons))


def _left_out(folders: Sequence[str], total: int) -> str:
    """One line about the folders that were left out, out of `total`; empty if there are none."""
    if not folders:
        return ""
    shown = ", ".join([*folders[:SHOWN], *(["…"] if len(folders) > SHOWN else [])])
    return f"left out {len(folders)} of {total}: {shown}"


def run_folder(folder: Path) -> Path:
    """The run folder: `folder` itself, or the folder that contains `folder` as `tests/KEY`."""
    return folder if (folder / "config.yaml").is_file() else folder.parent.parent


def _why_no_result(folder: Path) -> str:
    """Why a path is not a run folder with a result, or a folder `tests/KEY` in a run folder; empty if it is one."""
    if not (run_folder(folder) / "config.yaml").is_file():
        return "no run"
    if (folder / "metrics.json").is_file():
        return ""
    return "not finished" if run_folder(folder) == folder else "no evaluation"


def _identity(folder: Path, contents: Result, schema: Schema) -> tuple[str, Any]:
    """All options of a run and of its evaluation, without the seed and the checkpoint, as text; and the seed."""
    trained = values_of(load_resolved(run_folder(folder) / "config.yaml", schema), TRAIN)
    tested = {key: value for key, value in contents.get("evaluation", {}).items() if key not in ("checkpoint", "of")}
    return json.dumps([{**trained, "seed": None}, tested], sort_keys=True), trained["seed"]


def _row(group: list[tuple[Path, Result]]) -> Row:
    """The row of runs that differ only in their seed."""
    folder, first = group[0]
    home = folder.parent.parent if folder.parent.name == "tests" else folder
    name = folder.relative_to(home.parent).as_posix()
    name = re.sub(r"_seed_\d+", "", name) if len(group) > 1 else name
    folders, results = zip(*group, strict=True)
    return Row(first["data"], name, len(group), list(results), folders=folders)
