"""Decides which parts of a command are already finished, and whether the data have changed since."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path

from tailtune.configs import CfgNode, schema_of
from tailtune.configs.errors import UserError
from tailtune.datasets.build_records import build_records
from tailtune.datasets.sources.named_source import MissingData
from tailtune.datasets.splits.compare_records import compare_records, first_few, seen_in_training
from tailtune.datasets.splits.split_records import ChosenSplits, Record, StoredSplits
from tailtune.trainers.runs.run_folder import FACTS, RunFolder
from tailtune.trainers.runs.trained_images import trained_on
from tailtune.trainers.storage.atomic_io import Damaged
from tailtune.trainers.storage.manifest import read_json

Present = tuple[dict[str, Record], ChosenSplits | None]
"""Splits of the present data, and the images that were chosen for each; None for built-in data."""


@dataclass(frozen=True)
class Command:
    """The parts of a command that decide what still has to be computed."""

    test_only: bool
    """The command evaluates a trained checkpoint and does not train."""
    zero_shot: bool
    """The command evaluates the zero-shot classifier, which needs no checkpoint."""
    resume: bool
    """The command continues or reuses the run that is already in the folder."""
    test_train: bool
    """The command evaluates training images."""
    held_out: str | None
    """Name of the option that holds images out of the training split; None if no such option is set."""
    records: Callable[[StoredSplits | None], Present]
    """Takes the splits recorded by an earlier run; returns the splits of the present data."""

    @classmethod
    def of(cls, cfg: CfgNode) -> "Command":
        """Read the command from a config.

        Args:
            cfg: resolved config of the run.
        """
        held_out = next((key for key, entry in schema_of(cfg).items() if entry.holds_out and cfg[key]), None)
        return cls(cfg.test_only, cfg.zero_shot, cfg.resume, cfg.test_train, held_out, partial(build_records, cfg))

    @property
    def starts_over(self) -> bool:
        """Whether the command trains from the beginning; an existing run in the folder is then moved aside."""
        return not self.resume and not self.test_only


@dataclass
class Decision:
    """The work that a command still has to do in its run folder."""

    trains: bool
    """The command has to train, from the beginning or from a saved state."""
    target: Path
    """Folder into which the evaluation writes its result."""
    stored: Path | None = None
    """Existing metrics.json with the result of this command; None if the evaluation has to run."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Fingerprint of each split: of the present data; if these are missing, the one recorded at training."""
    notes: list[str] = field(default_factory=list)
    """One sentence for each change since the run was trained."""


def decide(command: Command, folder: RunFolder, kept: StoredSplits | None) -> Decision:
    """Compare a command with the content of its run folder.

    The function reads image lists, folders and file sizes. It writes nothing.

    Args:
        command: the command.
        folder: its run folder.
        kept: splits recorded by the run; None if the run has not recorded any.

    Returns:
        The work that is still to do.

    Raises:
        UserError: the folder holds another run, there is no checkpoint to evaluate, or the training images have
            changed since the run was trained.
    """
    folder.check()
    if command.test_only and not command.zero_shot and folder.checkpoint_id() is None:
        raise UserError(
            f"nothing is trained in {folder.path}: run the same command without test_only first, or name a run "
            "with model_dir"
        )
    starts_over = command.starts_over
    plan = Decision(trains=not command.test_only and (starts_over or not folder.finished()), target=folder.path)
    if folder.metrics.exists() and not starts_over and (damage := folder.damage()):
        plan.notes.append(f"{damage}; what can be made again is made again")
    _check_hold_out(command, folder, kept)
    other_test = "" if starts_over or kept is None else _compare(command, folder, kept, plan)
    if plan.trains:
        return plan
    plan.target = folder.target(other_test)
    metrics = plan.target / "metrics.json"
    if metrics.exists() and command.resume:
        if kept is None:
            _present(command, None, plan)
        # Subsets of built-in data have one fingerprint; in the folder of a run, their options have been compared.
        unclear = command.test_train and not folder.config.exists() and "built-in" in plan.fingerprints.get("train", "")
        if not unclear and still_true(metrics, folder, plan.fingerprints):
            plan.stored = metrics
    return plan


def _present(command: Command, kept: StoredSplits | None, plan: Decision) -> Present | None:
    """The present data, whose fingerprints the plan gets. If they are missing: None, and a note, unless it trains."""
    try:
        now, chosen = command.records(kept)
    except MissingData as error:
        if plan.trains:
            raise
        plan.notes.append(f"the data are not there to be compared with those of the run ({error})")
        return None
    plan.fingerprints = {name: record.fingerprint for name, record in now.items()}
    return now, chosen


def _check_hold_out(command: Command, folder: RunFolder, kept: StoredSplits | None) -> None:
    """Refuse if an older version held images out and did not record which: another draw could pick training images.

    Raises:
        UserError: the images that were held out are unknown.
    """
    evaluates = command.test_only and not command.zero_shot
    if evaluates and kept is None and folder.foreign is None and command.held_out:
        raise UserError(
            f"{folder.source} does not say which images {command.held_out} held out when it was trained, so they "
            "cannot be told from those that it was trained on; give a test_list of images that it has not seen, or "
            "train again"
        )


def _compare(command: Command, folder: RunFolder, kept: StoredSplits, plan: Decision) -> str:
    """Compare the present data with the splits recorded by the run.

    Args:
        command: the command.
        folder: its run folder.
        kept: splits recorded by the run.
        plan: receives the fingerprints of the splits and a note for each change.

    Returns:
        The fingerprint of the test images if they have changed and the command does not train; otherwise an empty text.

    Raises:
        MissingData: the data are missing, and the command has to train.
        UserError: the training or validation images have changed, and the command is not `test_only`.
    """
    plan.fingerprints = {name: record.fingerprint for name, record in kept.records.items()}
    if (present := _present(command, kept, plan)) is None:
        return ""
    now, chosen = present
    if not _same_data(kept, now):
        return ""
    for name in ("train", "val"):
        if described := _difference(kept, now, name, {"train": "training", "val": "validation"}[name]):
            _train_changed(command, folder, plan, described)
    if chosen is not None and (described := _renamed(folder, kept, chosen.class_names)):
        _train_changed(command, folder, plan, described)
    plan.notes += _new_images(chosen)
    described = _difference(kept, now, "test", "test")
    if not described:
        return ""
    assert chosen is not None, "built-in data do not change"
    before = kept.records.get("test")
    seen = [
        path
        for training in trained_on(folder, kept)
        for path in seen_in_training(now["test"], training, chosen, before)
    ]
    plan.notes.append(f"{described}; {f'{len(seen)} of them were' if seen else 'none of them was'} trained on")
    return "" if plan.trains else now["test"].fingerprint


def _same_data(kept: StoredSplits, now: dict[str, Record]) -> bool:
    """Whether at least one image is in both data sets; otherwise `model_dir` names a run on other data."""
    return any(
        recorded.fingerprint == now[name].fingerprint or set(recorded.paths) & set(now[name].paths)
        for name, recorded in kept.records.items()
        if name in now
    )


def _difference(kept: StoredSplits, now: dict[str, Record], name: str, what: str) -> str:
    """Describe how a split has changed, in words.

    Args:
        kept: splits recorded by the run.
        now: split name → its present images.
        name: name of the split.
        what: adjective for its images, such as "training".

    Returns:
        The description; empty if the split has not changed, or if it is missing on one side.
    """
    before, after = kept.records.get(name), now.get(name)
    if before is None or after is None or before.fingerprint == after.fingerprint:
        return ""
    return compare_records(before, after).describe(what)


def _train_changed(command: Command, folder: RunFolder, plan: Decision, described: str) -> None:
    """React to changed training or validation images: add a note for `test_only`, otherwise refuse.

    Args:
        command: the command.
        folder: its run folder.
        plan: receives the note.
        described: description of the change.

    Raises:
        UserError: the command is not `test_only`.
    """
    if command.test_only:
        plan.notes.append(
            f"since the run was trained, {described}; groups and class priors stay those of the images that it was "
            "trained on"
        )
    elif plan.trains:
        raise UserError(
            f"since the run in {folder.path} was begun, {described}; undo that, or start over with `resume False`"
        )
    else:
        raise UserError(
            f"since the run in {folder.path} was trained, {described}; train on them with `resume False` (the finished "
            "run is kept aside), or evaluate the finished run with `test_only True`"
        )


def _renamed(folder: RunFolder, kept: StoredSplits, names: Sequence[str]) -> str:
    """Describe a class that has another name than when the run was begun; empty if there is none, or if the run does
    not say which names it had."""
    before: Sequence[str] = kept.class_names
    if not before and folder.foreign is None and (folder.source / FACTS).exists():
        before = read_json(folder.source / FACTS)["class_names"]
    if not before:
        return ""
    both = enumerate(zip_longest(before, names))
    return next((f"class {label} is '{now}' and not '{was}' any more" for label, (was, now) in both if was != now), "")


def _new_images(chosen: ChosenSplits | None) -> list[str]:
    """A note about images that were added after the run recorded its splits; an empty list if there are none."""
    if chosen is None or not chosen.new:
        return []
    count = f"{len(chosen.new):,} images are" if len(chosen.new) > 1 else "1 image is"
    return [
        f"{count} new since the run wrote its splits down ({first_few(chosen.new)}), and in none of them; "
        "`resume False` starts over with all images"
    ]


def still_true(metrics: Path, folder: RunFolder, fingerprints: dict[str, str]) -> bool:
    """Whether a stored result is undamaged, and of the present options, checkpoint, images and other files it read.

    Args:
        metrics: the metrics.json of the result.
        folder: run folder of the command.
        fingerprints: fingerprint of each split of the present data.
    """
    try:
        about = read_json(metrics).get("evaluation")
    except Damaged:
        return False
    if not isinstance(about, dict) or about.get("checkpoint") != folder.checkpoint_id():
        return False
    if not folder.is_of_same_test(metrics):  # the name of its folder does not say all options
        return False
    stored = about.get("images", {})
    if any(stored.get(name, fingerprint) != fingerprint for name, fingerprint in fingerprints.items()):
        return False
    return bool(about.get("files", {}) == folder.files_read())
