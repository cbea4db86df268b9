"""The run folder: `output/<name>/`, its lock, its config, and what of it is finished."""

import logging
import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from configs import CfgNode, config_hash, load_resolved, values_of
from configs.errors import UserError
from configs.key import TEST, TRAIN
from trainers.exchange.foreign import FILE, Foreign
from trainers.files import read_json, write_bytes
from trainers.methods import declared

OUTPUT = Path("output")
FACTS = Path("checkpoint") / "facts.json"
OWN_RUNTIME = ("data_dir", "root", "lists", "output_dir", "num_workers", "micro_batch_size")
"""Runtime keys worth writing down: a run can be told from them, and repeated elsewhere."""

OWN_NAMES = (
    *("config.yaml", "metrics.json", "logits.safetensors", "checkpoint", "state", "tensorboard", "tests"),
    *("export", "analysis", "val_logits.safetensors"),
)
"""What a run writes into its folder, besides the log and the lock. Nothing else there is ever removed."""
OTHERS = ("stage1", ".lock", "log.txt", FILE)

log = logging.getLogger("tailtune")


class RunFolder:
    """Paths of a run and the decisions that depend on what they hold."""

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self.path = OUTPUT / (cfg.output_dir or cfg.run_name)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.json"
        self.checkpoint = self.path / "checkpoint"
        self.states = self.path / "state"
        self.events = self.path / "tensorboard"
        found = self._own() if cfg.model_dir is None else _existing(cfg.model_dir)
        self.source, self.foreign = found
        """Whose checkpoint is evaluated; the file, if it is of other people's code."""

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

    def hold(self, lock: FileLock) -> None:
        """Keep a second launch out of the folder; the system drops the lock with the process.

        Raises:
            UserError: another process holds it, or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            found = (each.name for each in self.path.iterdir() if not each.name.endswith(".tmp"))  # cut off by a kill
            strange = [name for name in found if name not in (*OWN_NAMES, *OTHERS)]
            if strange and not self.config.exists():
                raise UserError(f"{self.path} holds other files ({strange[0]}) and no run; choose another output_dir")
            lock.acquire()
        except Timeout:
            raise UserError(
                f"{self.path} is in use by another launch; wait for it or choose another output_dir"
            ) from None
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}; choose another output_dir") from error

    def claim(self) -> None:
        """Make the folder this run's: start over if asked to, write the config if it is new.

        Raises:
            UserError: it holds a run with other options.
        """
        if not self.cfg.resume and not self.cfg.test_only:
            self.clear()
        if self.config.exists() and not self.empty():
            self._compare(self.stored_values())
        # An unfinished run is evaluated as the last command says.
        if not self.cfg.test_only and not self.finished():
            values = values_of(self.cfg, TRAIN, TEST) | {key: self.cfg[key] for key in OWN_RUNTIME}
            write_bytes(self.config, yaml.safe_dump(values, sort_keys=False).encode())

    def empty(self) -> bool:
        """Whether nothing is here that cost anything: neither a state nor a result."""
        return not any(each.exists() for each in (self.states, self.checkpoint, self.metrics, self.path / "tests"))

    def drop_if_empty(self) -> None:
        """Take away what a refused command has begun, so that the corrected one finds no other run here."""
        if self.empty():
            self.clear()
            for name in ("log.txt", ".lock"):
                (self.path / name).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def clear(self) -> None:
        """Remove what a run writes; the log, which is open, is emptied."""
        for each in (self.path / name for name in OWN_NAMES):
            if each.is_dir():
                shutil.rmtree(each)
            else:
                each.unlink(missing_ok=True)
        if (self.path / "log.txt").exists():
            os.truncate(self.path / "log.txt", 0)

    def target(self) -> Path:
        """Where this command's evaluation goes: the run's own folder, or `tests/<key>/`."""
        if self.cfg.test_only or (self.finished() and not self._same_test()):
            return self.path / "tests" / self.cfg.test_key
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

    def finished(self) -> bool:
        return self.metrics.exists()

    def stored_values(self) -> dict[str, Any]:
        try:
            return values_of(load_resolved(self.config, declared()))
        except UserError as error:
            raise UserError(f"{error}; start over with `resume False`, or choose another output_dir") from error

    def _compare(self, stored: dict[str, Any]) -> None:
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

    def _same_test(self) -> bool:
        stored = self.stored_values()
        return all(stored.get(key) == value for key, value in values_of(self.cfg, TEST).items())


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
