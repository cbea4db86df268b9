"""What of a command is done already, and whether the data are still those that it was done with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tailtune.configs import CfgNode, schema_of
from tailtune.configs.errors import UserError
from tailtune.datasets import build_records
from tailtune.datasets.sources.image_sources import MissingData
from tailtune.datasets.splits.compare_records import compare_records, first_few, seen_in_training
from tailtune.datasets.splits.split_records import ChosenSplits, Record, StoredSplits
from tailtune.trainers.runs.run_folder import FACTS, RunFolder, kept_splits
from tailtune.trainers.storage.atomic_io import Damaged
from tailtune.trainers.storage.manifest import read_json


@dataclass(frozen=True)
class Command:
    """What of a command decides whether it is done already."""

    test_only: bool
    zero_shot: bool
    resume: bool
    held_out: str | None
    """The option that holds images out of the training split, if one is given."""
    records: Callable[[StoredSplits], tuple[dict[str, Record], ChosenSplits | None]]
    """Splits that a run has written down → the splits of the data at hand."""

    @classmethod
    def of(cls, cfg: CfgNode) -> "Command":
        held_out = next((key for key, entry in schema_of(cfg).items() if entry.holds_out and cfg[key]), None)
        return cls(cfg.test_only, cfg.zero_shot, cfg.resume, held_out, lambda kept: build_records(cfg, kept))

    @property
    def starts_over(self) -> bool:
        """Whether a run that is there is moved aside."""
        return not self.resume and not self.test_only


@dataclass
class Decision:
    """What a command has to do in its run folder."""

    trains: bool
    target: Path
    """Folder that the evaluation goes to."""
    stored: Path | None = None
    """A metrics.json that answers the command."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Of the splits: at hand, or where the data are not there, when the run was trained."""
    notes: list[str] = field(default_factory=list)
    """What has changed since the run was trained."""


def decide(command: Command, folder: RunFolder, kept: StoredSplits | None) -> Decision:
    """Compare a command with what its run folder holds; reads lists, folders and sizes of files, and writes nothing.

    Args:
        kept: splits that the run has written down.

    Raises:
        UserError: the folder holds another run, or the run was trained on images that have changed.
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
    if metrics.exists() and command.resume and still_true(metrics, folder, plan.fingerprints):
        plan.stored = metrics
    return plan


def _check_hold_out(command: Command, folder: RunFolder, kept: StoredSplits | None) -> None:
    """Refuse to draw anew what an earlier version has held out and not written down."""
    evaluates = command.test_only and not command.zero_shot
    if evaluates and kept is None and folder.foreign is None and command.held_out:
        raise UserError(
            f"{folder.source} does not say which images {command.held_out} held out when it was trained, so they "
            "cannot be told from those that it was trained on; give a test_list of images that it has not seen, or "
            "train again"
        )


def _compare(command: Command, folder: RunFolder, kept: StoredSplits, plan: Decision) -> str:
    """Say what has changed since the run wrote its splits down, or refuse.

    Returns:
        The fingerprint of the test images if they are others now, else nothing.
    """
    plan.fingerprints = {name: each.fingerprint for name, each in kept.records.items()}
    try:
        now, chosen = command.records(kept)
    except MissingData as error:
        if plan.trains:
            raise
        plan.notes.append(f"the data are not there to be compared with those of the run ({error})")
        return ""
    plan.fingerprints = {name: each.fingerprint for name, each in now.items()}
    if not _same_data(kept, now):
        return ""
    for name in ("train", "val"):
        if described := _difference(kept, now, name, {"train": "training", "val": "validation"}[name]):
            _train_changed(command, folder, plan, described)
    plan.notes += _new_images(chosen)
    described = _difference(kept, now, "test", "test")
    if not described:
        return ""
    root, before = chosen.root if chosen else Path(), kept.records.get("test")
    seen = [path for each in trained_on(folder, kept) for path in seen_in_training(now["test"], each, root, before)]
    plan.notes.append(f"{described}; {f'{len(seen)} of them were' if seen else 'none of them was'} trained on")
    return "" if plan.trains else now["test"].fingerprint


def _same_data(kept: StoredSplits, now: dict[str, Record]) -> bool:
    """Whether any image is the same; else `model_dir` has named a run on other data."""
    return any(
        set(each.paths) & set(now[name].paths) or each.fingerprint == now[name].fingerprint
        for name, each in kept.records.items()
        if name in now
    )


def _difference(kept: StoredSplits, now: dict[str, Record], name: str, what: str) -> str:
    before, after = kept.records.get(name), now.get(name)
    if before is None or after is None or before.fingerprint == after.fingerprint:
        return ""
    return compare_records(before, after).describe(what)


def _train_changed(command: Command, folder: RunFolder, plan: Decision, described: str) -> None:
    """The images that the run was trained on are no longer the same."""
    if command.test_only:
        plan.notes.append(
            f"since the run was trained, {described}; groups and class priors stay those of the images that it was "
            "trained on"
        )
    elif plan.trains:
        raise UserError(
            f"since the run in {folder.path} was begun, {described}; put the images back, or start over with "
            "`resume False`"
        )
    else:
        raise UserError(
            f"since the run in {folder.path} was trained, {described}; train on them with `resume False` (the finished "
            "run is kept aside), or evaluate the finished run with `test_only True`"
        )


def _new_images(chosen: ChosenSplits | None) -> list[str]:
    if chosen is None or not chosen.new:
        return []
    count = f"{len(chosen.new):,} images are" if len(chosen.new) > 1 else "1 image is"
    return [
        f"{count} new since the run wrote its splits down ({first_few(chosen.new)}), and in none of them; "
        "`resume False` starts over with all images"
    ]


def trained_on(folder: RunFolder, kept: StoredSplits | None) -> list[Record]:
    """The training images of every run that the evaluated model comes from, as far as they are written down."""
    homes = [folder.source, *folder.soup] if folder.foreign is None else []
    found = [kept] if kept is not None else []
    for home in homes:
        found += [each for each in (_kept_or_none(home),) if each is not None]
        for _ in range(5):  # the runs before it
            earlier = _earlier(home)
            if earlier is None:
                break
            home = earlier
            found += [each for each in (_kept_or_none(home),) if each is not None]
    return list({each.records["train"].fingerprint: each.records["train"] for each in found}.values())


def _kept_or_none(home: Path) -> StoredSplits | None:
    try:
        return kept_splits(home)
    except Damaged:
        return None


def _earlier(home: Path) -> Path | None:
    """The run that the one in a folder began from."""
    facts = home / FACTS
    after = read_json(facts).get("after") if facts.exists() else None
    return Path(after) if after else None


def still_true(metrics: Path, folder: RunFolder, fingerprints: dict[str, str]) -> bool:
    """Whether a stored result is whole, and of the checkpoint, images and files beside it that are there now."""
    try:
        about = read_json(metrics).get("evaluation")
    except Damaged:
        return False
    if not isinstance(about, dict) or about.get("checkpoint") != folder.checkpoint_id():
        return False
    stored = about.get("images", {})
    if any(stored.get(name, each) != each for name, each in fingerprints.items()):
        return False
    return bool(about.get("files", {}) == folder.files_read())
