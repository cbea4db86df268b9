"""Which images the weights of a model were trained on, over all runs that contributed to them."""

from pathlib import Path

from tailtune.datasets.splits.split_records import Record, StoredSplits
from tailtune.trainers.runs.run_folder import FACTS, RunFolder, kept_splits
from tailtune.trainers.storage.atomic_io import Damaged
from tailtune.trainers.storage.manifest import read_json


def trained_on(folder: RunFolder, kept: StoredSplits | None) -> list[Record]:
    """The training images of every run that contributed to the evaluated model.

    These are the run itself, the runs that `ensemble_runs` names, and the runs that each of them continued (`after`) or
    merged (`merge_runs`).

    Args:
        folder: run folder of the command.
        kept: splits recorded by the run; None if the run has not recorded any.

    Returns:
        The different training splits. Runs that have not recorded their splits are missing.
    """
    homes = [folder.source, *folder.soup] if folder.foreign is None else []
    for home in homes:  # grows in the loop
        homes += [earlier for earlier in _earlier(home) if earlier not in homes]
    recorded = [splits for splits in (kept, *map(_kept_or_none, homes)) if splits is not None]
    return list({splits.records["train"].fingerprint: splits.records["train"] for splits in recorded}.values())


def _kept_or_none(home: Path) -> StoredSplits | None:
    """The splits recorded by the run in a folder; None if they are missing or damaged."""
    try:
        return kept_splits(home)
    except Damaged:
        return None


def _earlier(home: Path) -> list[Path]:
    """Folders of the runs from whose weights the run in a folder started (options `after` and `merge_runs`)."""
    facts = read_json(home / FACTS) if (home / FACTS).exists() else {}
    return [Path(name) for name in (facts.get("after"), *facts.get("merged", ())) if name]
