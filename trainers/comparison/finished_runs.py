"""Finds the results among folders, and puts those that differ only in their seed into one row."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tailtune.configs import load_resolved, values_of
from tailtune.configs.errors import UserError
from tailtune.configs.key import TRAIN
from tailtune.configs.schema import Schema
from tailtune.trainers.comparison.rows import Result, Row
from tailtune.trainers.runs.result_table import read_result
from tailtune.trainers.runs.run_folder import FACTS
from tailtune.trainers.storage.manifest import read_json

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
    checkpoints: dict[tuple[str, int], dict[str, Path]] = {}
    for folder in dict.fromkeys(folders):
        contents = read_result(folder / "metrics.json")
        identity = _identity(folder, contents, schema)
        known = checkpoints.setdefault((identity, contents["seed"]), {})
        checkpoint = contents.get("evaluation", {}).get("checkpoint") or os.path.realpath(folder)
        if checkpoint in known:
            copies.append(f"{folder} (the same as {known[checkpoint]})")
            continue
        groups.setdefault((identity, len(known)), []).append((folder, contents))
        known[checkpoint] = folder
    return _with_different_names([_row(group) for group in groups.values()]), _left_out(copies, len(folders))


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


def _identity(folder: Path, contents: Result, schema: Schema) -> str:
    """All options of a run and of its evaluation, without the seed and the checkpoint, as text for comparison."""
    about = contents.get("evaluation", {})
    tested = {key: value for key, value in about.items() if key not in ("checkpoint", "of", "notes")}
    return json.dumps([_trained(_evaluated_run(folder, about), schema), tested], sort_keys=True)


def _evaluated_run(folder: Path, about: Mapping[str, Any]) -> Path | dict[str, Any]:
    """Folder of the run whose checkpoint a result is of; what the result says of it if that folder is not there."""
    home = run_folder(folder)
    origin = Path(about.get("of") or home)
    if folder == home or origin.name == home.name:  # the folder may have been moved since
        return home
    return origin if (origin / "config.yaml").is_file() else {key: about.get(key) for key in ("of", "checkpoint")}


def _trained(run: Path | dict[str, Any], schema: Schema) -> dict[str, Any]:
    """The training options of a run and of the runs before it (`after`), without their seeds.

    The config of a run holds the hash of the config before it, which differs by the seed. It is replaced by the options
    of that config. If the earlier run is not there any more or has become another one, the hash stays.
    """
    if isinstance(run, dict):
        return run
    cfg = load_resolved(run / "config.yaml", schema)
    values = {**values_of(cfg, TRAIN), "seed": None}
    facts = read_json(run / FACTS) if cfg.after is not None and (run / FACTS).is_file() else {}
    earlier = Path(facts.get("after", ""))
    same = (earlier / FACTS).is_file() and read_json(earlier / FACTS).get("sha256") == facts.get("after_id")
    if facts and same and (earlier / "config.yaml").is_file():
        values["after_hash"] = _trained(earlier, schema)
    return values


def _with_different_names(rows: list[Row]) -> list[Row]:
    """The rows. Those with the same name get the path of their first folder as name."""
    times = Counter(row.name for row in rows)
    return [replace(row, name=row.folders[0].as_posix()) if times[row.name] > 1 else row for row in rows]


def _row(group: list[tuple[Path, Result]]) -> Row:
    """The row of runs that differ only in their seed."""
    folder, first = group[0]
    home = folder.parent.parent if folder.parent.name == "tests" else folder
    name = folder.relative_to(home.parent).as_posix()
    name = re.sub(r"_seed_\d+", "", name) if len(group) > 1 else name
    folders, results = zip(*group, strict=True)
    return Row(first["data"], name, len(group), list(results), folders=folders)
