"""The run folder: `output/<name>/`, whose it is, its lock, its config, and what of it is finished."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from configs import CfgNode, config_hash, load_resolved, values_of
from configs.errors import UserError
from configs.key import TEST, TRAIN
from configs.schema import SCHEMA
from datasets.identity import Chosen, Kept, Record, parse_splits, split_files
from trainers.exchange.foreign import FILE, Foreign
from trainers.files import FACTS as FACTS_FILE
from trainers.files import Damaged, Digest, write_bytes
from trainers.manifest import LOCK, MARKER, Manifest, is_run, read_bytes, read_json
from trainers.methods import declared

OUTPUT = Path("output")
FACTS = Path("checkpoint") / FACTS_FILE
OWN_RUNTIME = ("data_dir", "root", "lists", "output_dir", "num_workers", "micro_batch_size")
"""Runtime keys worth writing down: a run can be told from them, and repeated elsewhere."""

TRAINING = ("config.yaml", "log.txt", "splits", "state", "checkpoint", "tensorboard")
"""What training makes in its folder."""
RESULTS = ("metrics.json", "logits.safetensors", "val_logits.safetensors")

log = logging.getLogger("tailtune")


class RunFolder:
    """Paths of a run and the decisions that depend on what they hold.

    The folder is a run's if `tailtune.json` says so (trainers/manifest.py); only what that lists is ever changed.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self.path = OUTPUT / (cfg.output_dir or cfg.run_name)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.json"
        self.checkpoint = self.path / "checkpoint"
        self.states = self.path / "state"
        self.splits = self.path / "splits"
        self.events = self.path / "tensorboard"
        found = self._own() if cfg.model_dir is None else _existing(cfg.model_dir)
        self.source, self.foreign = found
        """Whose checkpoint is evaluated; the file, if it is of other people's code."""
        self._created = self._begun = False
        self._manifest: Manifest | None = None

    def _own(self) -> tuple[Path, Foreign | None]:
        """A command that tests what LIFT has trained under the same name finds it here."""
        lift = self.cfg.test_only and not self.checkpoint.exists() and (self.path / FILE).is_file()
        return self.path, Foreign(self.path / FILE) if lift else None

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
    def origin(self) -> str:
        """Where the checkpoint is, in words."""
        return str(self.foreign.path if self.foreign else self.source)

    # --- whose folder it is --------------------------------------------------------------------------------------

    def hold(self, lock: FileLock) -> None:
        """Keep a second launch out of the folder; the system drops the lock with the process. Nothing else is written.

        Raises:
            UserError: another process holds it, the folder is not a run's, or it cannot be made.
        """
        try:
            self._marker()  # before a lock is put into a folder of somebody else
            self._created = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise UserError(
                f"{self.path} is in use by another launch; wait for it or choose another output_dir"
            ) from None
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}; choose another output_dir") from error
        self._manifest = None  # read again: another launch may have ended meanwhile

    @property
    def manifest(self) -> Manifest:
        """The run's marker, new where no run has begun here."""
        if self._manifest is None:
            self._manifest = self._marker() or Manifest.new(self.path)
        return self._manifest

    def _marker(self) -> Manifest | None:
        """The run's marker; None where no run has begun here. Raises `UserError` where something else is."""
        found = Manifest.read(self.path)
        if found is None and self.path.is_dir() and self.foreign is None:
            strange = sorted(each.name for each in self.path.iterdir() if not self._harmless(each))
            if strange:
                older = " (a run of an earlier version can be evaluated: `test_only True model_dir …`)"
                raise UserError(
                    f"{self.path} holds {', '.join(strange[:3])} and no {MARKER}, so nothing in it is known to be a "
                    f"run's; choose another output_dir, or move it away{older if 'config.yaml' in strange else ''}"
                )
        return found

    @staticmethod
    def _harmless(entry: Path) -> bool:
        """What may stand in a folder before a run begins: the lock, a write that was cut off, other runs."""
        return entry.name in (LOCK, f".{MARKER}.tmp") or (entry.is_dir() and is_run(entry))

    def check_free(self, *names: str) -> None:
        """Refuse to write over what this run has not made; before anything is written."""
        self.manifest.check_free(*names)

    def own(self, *names: str) -> None:
        """Say that these entries are about to be made by this run."""
        self._begun = self._begun or not (self.path / MARKER).exists()
        self.manifest.own(*names)

    def log_file(self) -> Path:
        """Where the log goes; LIFT's own folders have a `log.txt` of theirs."""
        log_file = self.path / "log.txt"
        if log_file.exists() and log_file.name not in self.manifest.made:
            return self.path / "tests" / "log.txt"
        self.own(log_file.name)
        return log_file

    def withdraw(self) -> None:
        """Take away what this launch has begun, where it is worth nothing, so that the corrected command is not told
        of another run here."""
        if self._begun and self.empty():
            for name in (*self.manifest.made, MARKER):
                entry = self.path / name
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)
        if self._created or self._begun:
            (self.path / LOCK).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    # --- a run that begins ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse what the folder holds, if this command does not belong to it; writes nothing.

        Raises:
            UserError: it holds a run with other options, or files that this run has not made.
        """
        starts_over = not self.cfg.resume and not self.cfg.test_only
        if not self.empty() and not starts_over:
            self._compare()
        self.check_free(*(("tests",) if self.cfg.test_only else (*TRAINING, *RESULTS)))

    def claim(self, trains: bool) -> None:
        """Make the folder this run's: move a run that is started over aside, write the config of one that trains."""
        if not self.cfg.resume and not self.cfg.test_only and not self.empty():
            self._move_aside()
        self.own(*((*TRAINING, *RESULTS) if trains else ("tests",)))
        if trains or (self.config.exists() and not self.manifest.intact(self.config)):
            values = values_of(self.cfg, TRAIN, TEST) | {key: self.cfg[key] for key in OWN_RUNTIME}
            # An unfinished run is evaluated as the last command says.
            self.seal({self.config: write_bytes(self.config, yaml.safe_dump(values, sort_keys=False).encode())})

    def _move_aside(self) -> None:
        """Move what the run has made to `<name>.previous-<n>`, its marker last; what others put here stays."""
        number = 1
        while os.path.lexists(aside := self.path.with_name(f"{self.path.name}.previous-{number}")):
            number += 1
        aside.mkdir()
        for name in (*self.manifest.made, MARKER):
            if os.path.lexists(self.path / name):
                (self.path / name).rename(aside / name)
        log.info("the run that was here is now in %s", aside)
        self._manifest = Manifest.new(self.path)

    def keep_splits(self, records: Mapping[str, Record], chosen: Chosen) -> None:
        """Write down which images each split has."""
        files = split_files(records, chosen.unused, chosen.unreadable)
        digests = {self.splits / name: write_bytes(self.splits / name, content) for name, content in files.items()}
        self.seal(digests)

    def seal(self, digests: dict[Path, Digest], gone: Sequence[Path] = ()) -> None:
        """Take down the checksums of files that have been written; those below `gone` are about to be removed."""
        self.manifest.seal(digests, gone)

    def empty(self) -> bool:
        """Whether nothing is here that cost anything: neither a state nor a result."""
        return not any(each.exists() for each in (self.states, self.checkpoint, self.metrics, self.path / "tests"))

    # --- what it holds -------------------------------------------------------------------------------------------

    def kept(self) -> Kept | None:
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
            stored = values_of(load_resolved(self.config, declared()))
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
        return all(stored.get(key, SCHEMA[key].default) == value for key, value in values_of(self.cfg, TEST).items())


def counts_of(home: Path) -> list[int] | None:
    """Training images per class of the run in a folder, as far as its checkpoint says."""
    return read_json(home / FACTS).get("class_counts") if (home / FACTS).is_file() else None


def kept_splits(home: Path) -> Kept | None:
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


def _existing(model_dir: str, key: str = "model_dir") -> tuple[Path, Foreign | None]:
    """The folder of a run by its path, or by its name below output/; or other people's file of a checkpoint."""
    for path in (Path(model_dir).expanduser(), OUTPUT / model_dir):
        if path.is_file():
            return path.parent, Foreign(path)
        if (path / FACTS).is_file():
            return path, None
        if (path / FILE).is_file():
            return path, Foreign(path / FILE)
    raise UserError(
        f"{key} {model_dir} holds no checkpoint/; name the folder of a finished run, a {FILE} of LIFT, or "
        "a checkpoint file of RIDE or SADE"
    )
