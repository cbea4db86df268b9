"""The run folder: `output/<name>/`, whose it is, its lock, its config, and what of it is finished."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from tailtune.configs import CfgNode, config_hash, load_resolved, schema_of, values_of
from tailtune.configs.errors import UserError
from tailtune.configs.key import TEST, TRAIN
from tailtune.datasets.data_settings import DataFolders
from tailtune.datasets.sources.image_list import first_file
from tailtune.datasets.splits.split_records import ChosenSplits, Record, StoredSplits, parse_splits, split_files
from tailtune.datasets.test_distributions.frequency_rules import distribution_names
from tailtune.datasets.test_distributions.settings import DistributionSettings
from tailtune.trainers.foreign_checkpoints.checkpoint_file import LIFT_FILE, ForeignCheckpoint
from tailtune.trainers.runs.ownership import OwnedFolder
from tailtune.trainers.storage.atomic_io import FACTS as FACTS_FILE
from tailtune.trainers.storage.atomic_io import Damaged, write_bytes
from tailtune.trainers.storage.manifest import MARKER, Manifest, read_bytes, read_json

OUTPUT = Path("output")
FACTS = Path("checkpoint") / FACTS_FILE
TRAINING = ("config.yaml", "log.txt", "splits", "state", "checkpoint", "tensorboard")
"""What training makes in its folder."""
RESULTS = ("metrics.json", "logits.safetensors", "val_logits.safetensors")

log = logging.getLogger("tailtune")


@dataclass(frozen=True)
class Checkpoint:
    """Where what a run has trained lies."""

    home: Path
    """Folder of the run."""
    foreign: ForeignCheckpoint | None = None
    """A file of other people's code, in place of the run's own checkpoint."""


def folder_of(cfg: CfgNode) -> Path:
    """The folder of a run."""
    return OUTPUT / (cfg.output_dir or cfg.run_name)


class RunFolder(OwnedFolder):
    """Paths of a run and the decisions that depend on what they hold.

    The whole config is its subject: it writes `config.yaml`, and compares a command with the one that is there. The
    folder is a run's if `tailtune.json` says so (`manifest.py`). Only what that file lists is ever changed.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        super().__init__(folder_of(cfg))
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.json"
        self.checkpoint = self.path / "checkpoint"
        self.states = self.path / "state"
        self.splits = self.path / "splits"
        self.events = self.path / "tensorboard"
        found = self._own() if cfg.model_dir is None else _existing(cfg.model_dir)
        self.source, self.foreign = found
        """Whose checkpoint is evaluated; the file, if it is of other people's code."""
        self.adopts = self.foreign is not None

    def _own(self) -> tuple[Path, ForeignCheckpoint | None]:
        """A command that tests what LIFT has trained under the same name finds it here."""
        lift = self.cfg.test_only and not self.checkpoint.exists() and (self.path / LIFT_FILE).is_file()
        return self.path, ForeignCheckpoint(self.path / LIFT_FILE) if lift else None

    @cached_property
    def soup(self) -> tuple[Path, ...]:
        """The runs that `ensemble_runs` names."""
        found = [_existing(name, "ensemble_runs") for name in self.cfg.ensemble_runs or ()]
        for _, foreign in found:
            if foreign is not None:
                raise UserError(f"ensemble_runs: {foreign.path} is of other people's code; name runs of our own")
        paths = [path for path, _ in found]
        for number, path in enumerate(paths):
            if path.resolve() in [each.resolve() for each in (self.source, *paths[:number])]:
                raise UserError(f"ensemble_runs: {path} is there twice; name other runs than the one that is evaluated")
        return tuple(paths)

    @property
    def evaluated(self) -> Checkpoint:
        """The checkpoint that is evaluated or continued."""
        return Checkpoint(self.source, self.foreign)

    @property
    def origin(self) -> str:
        """Where the checkpoint is, in words."""
        return str(self.foreign.path if self.foreign else self.source)

    # --- a run that begins ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse what the folder holds, if this command does not belong to it; writes nothing.

        Raises:
            UserError: it holds a run with other options, or files that this run has not made.
        """
        starts_over = not self.cfg.resume and not self.cfg.test_only
        trained = any(each.exists() for each in (self.config, self.states, self.checkpoint, self.metrics))
        if trained and not self.empty() and not starts_over:
            self._compare()
        self.check_free(*(("tests",) if self.cfg.test_only else (*TRAINING, *RESULTS)))
        if self.cfg.export is not None and self.cfg.model_dir is None:
            self.check_free("export")

    def claim(self, trains: bool) -> None:
        """Make the folder this run's: move a run that is started over aside, write the config of one that trains."""
        if not self.cfg.resume and not self.cfg.test_only and not self.empty():
            self.move_aside()
        self.own(*((*TRAINING, *RESULTS) if trains else ("tests",)))
        if trains or (self.metrics.exists() and not self.manifest.intact(self.config)):
            recorded = (key for key, entry in schema_of(self.cfg).items() if entry.recorded)
            values = values_of(self.cfg, TRAIN, TEST) | {key: self.cfg[key] for key in recorded}
            # An unfinished run is evaluated as the last command says.
            self.seal({self.config: write_bytes(self.config, yaml.safe_dump(values, sort_keys=False).encode())})

    def keep_splits(self, records: Mapping[str, Record], chosen: ChosenSplits) -> None:
        """Write down which images each split has."""
        files = split_files(records, chosen.unused, chosen.unreadable)
        digests = {self.splits / name: write_bytes(self.splits / name, content) for name, content in files.items()}
        self.seal(digests)

    def empty(self) -> bool:
        """Whether nothing is here that cost anything: neither a state nor a result."""
        return not any(each.exists() for each in (self.states, self.checkpoint, self.metrics, self.path / "tests"))

    # --- what it holds -------------------------------------------------------------------------------------------

    def kept(self) -> StoredSplits | None:
        """The splits of the run whose checkpoint is evaluated or continued; None if it has not written them down.

        Raises:
            UserError: they are damaged.
        """
        return kept_splits(self.source) if self.foreign is None else None

    def target(self, other_test: str = "") -> Path:
        """Where this command's evaluation goes: the run's own folder, or `tests/<key>/`.

        Args:
            other_test: fingerprint of the test images, where they are not those that the run was trained beside.
        """
        if self.cfg.test_only or other_test or (self.finished() and not self._same_test()):
            suffix = f"_test_{other_test.partition(':')[2][:8]}" if other_test else ""
            return self.path / "tests" / f"{self.cfg.test_key}{suffix}"
        return self.path

    def checkpoint_id(self) -> str | None:
        """Digests of what was trained and of its base model, also by `ensemble_runs`; None if nothing was.

        Other people's files do not say what they are of, so there it is the options that the file is read with.
        """
        if self.foreign is not None:
            return f"{self.foreign.digest}-{self.foreign.kind}-{config_hash(self.cfg)}"
        found = [self.source, *self.soup]
        if not (self.source / FACTS).exists():
            return None
        stored = [read_json(each / FACTS) for each in found]
        return "+".join(f"{str(each.get('sha256'))[:16]}-{each.get('base')}" for each in stored)

    def class_counts(self) -> list[int] | None:
        """Training images per class of the run whose checkpoint is evaluated, as far as it says."""
        return counts_of(self.source) if self.foreign is None else None

    def files_read(self) -> dict[str, str]:
        """Digests of the files that say what a result is of, besides images and checkpoint; of those that are there."""
        cfg = self.cfg
        names = [name for name in (cfg.target_prior, cfg.dirichlet_list) if name and "." in name]
        if cfg.shift_files:
            names += [
                cfg.shift_files.replace("{name}", shift) for shift in distribution_names(DistributionSettings.of(cfg))
            ]
        folders = [Path(), *DataFolders.of(cfg).for_lists()]
        found = {name: first_file(str(Path(name).expanduser()), folders) for name in names}
        return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in found.items() if path}

    def finished(self) -> bool:
        """Whether the run has ended, and its result and checkpoint are what it wrote."""
        return self.metrics.exists() and not self.damage()

    def damage(self) -> str:
        """What of a finished run is not as the run wrote it, in words; empty if all is."""
        marker = Manifest.read(self.path)
        if marker is None:
            return f"{self.path} has no {MARKER}"
        try:
            marker.check(self.metrics)
            for path in map(self.path.joinpath, marker.files):
                if path.parent in (self.checkpoint, self.splits):
                    marker.check(path)
        except Damaged as error:
            return str(error)
        return ""

    def _compare(self) -> None:
        """Refuse to go on with another run."""
        try:
            stored = values_of(load_resolved(self.config, schema_of(self.cfg)))
            read_bytes(self.config)
        except UserError as error:
            if self._same_hash():
                return  # the config is what this command says, and is written again
            raise UserError(f"{error}; start over with `resume False`, or choose another output_dir") from error
        home = stored.get("data_dir")
        if home and home != self.cfg.data_dir and Path(home).is_dir():  # else the data have moved
            raise UserError(
                f"{self.path} holds a run on '{self.cfg.data}' of {home}, another data config of that name; choose "
                "another output_dir"
            )
        for key, value in values_of(self.cfg, TRAIN).items():
            if stored.get(key) != value:
                raise UserError(
                    f"{self.path} holds another run: {key} is {stored.get(key)} there and {value} here; choose another "
                    "output_dir, or start over with `resume False`"
                )

    def _same_hash(self) -> bool:
        """Whether what was trained is of this command's options, where the config file is damaged."""
        for path in (self.path / FACTS, *self.states.glob(f"*/{FACTS_FILE}")):
            try:
                facts = read_json(path)
            except Damaged:
                continue
            return bool(facts.get("identity", facts).get("config") == config_hash(self.cfg))
        return False

    def _same_test(self) -> bool:
        """Whether the run was evaluated as this command asks."""
        stored = read_json(self.metrics).get("evaluation", {})
        schema = schema_of(self.cfg)
        return all(stored.get(key, schema[key].default) == value for key, value in values_of(self.cfg, TEST).items())


def counts_of(home: Path) -> list[int] | None:
    """Training images per class of the run in a folder, as far as its checkpoint says."""
    return read_json(home / FACTS).get("class_counts") if (home / FACTS).is_file() else None


def kept_splits(home: Path) -> StoredSplits | None:
    """The splits that the run in a folder has written down; None if it has not.

    Raises:
        UserError: they are damaged.
    """
    marker = Manifest.read(home)
    names = [name for name in marker.files if name.startswith("splits/")] if marker else []
    if not names:
        return None
    try:
        return parse_splits({name.partition("/")[2]: read_bytes(home / name) for name in names})
    except (KeyError, ValueError, TypeError) as error:
        raise Damaged(home / "splits", str(error)) from error


def _existing(model_dir: str, key: str = "model_dir") -> tuple[Path, ForeignCheckpoint | None]:
    """The folder of a run by its path, or by its name below output/; or other people's file of a checkpoint."""
    for path in (Path(model_dir).expanduser(), OUTPUT / model_dir):
        if path.is_file():
            return path.parent, ForeignCheckpoint(path)
        if (path / FACTS).is_file():
            return path, None
        if (path / LIFT_FILE).is_file():
            return path, ForeignCheckpoint(path / LIFT_FILE)
    raise UserError(
        f"{key} {model_dir} holds no checkpoint/; name the folder of a finished run, a {LIFT_FILE} of LIFT, or "
        "a checkpoint file of RIDE or SADE"
    )
