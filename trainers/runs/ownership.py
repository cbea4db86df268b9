"""A folder that a run may change: one that says so itself (`tailtune.json`), or that is new."""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from tailtune.configs.errors import UserError
from tailtune.trainers.storage.atomic_io import Digest, temporary_pattern
from tailtune.trainers.storage.manifest import LOCK, MARKER, Manifest, is_run

log = logging.getLogger("tailtune")


class OwnedFolder:
    """Whose a folder is, and what of it the run may change: what its marker lists, nothing else.

    Args:
        path: the folder; it need not exist.
    """

    adopts = False
    """A run may begin beside files of others, as in a folder with LIFT's checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest: Manifest | None = None
        self._created = self._begun = False
        self._aside: Path | None = None
        """Where this launch has moved the run that was here."""

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

    def check_owner(self) -> None:
        """Raise a `UserError` if the folder is not a run's; before the run before it trains for hours."""
        self._marker()

    @property
    def manifest(self) -> Manifest:
        """The run's marker, new where no run has begun here."""
        if self._manifest is None:
            self._manifest = self._marker() or Manifest.new(self.path)
        return self._manifest

    def _marker(self) -> Manifest | None:
        """The run's marker; None where no run has begun here. Raises `UserError` where something else is."""
        found = Manifest.read(self.path)
        if found is None and self.path.is_dir() and not self.adopts:
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
        if entry.name == LOCK or temporary_pattern(MARKER).fullmatch(entry.name):
            return True
        if not entry.is_dir() or entry.is_symlink():
            return False
        return is_run(entry) or all(map(OwnedFolder._harmless, entry.iterdir()))  # or the start of one

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

    def empty(self) -> bool:
        """Whether nothing is here that cost anything."""
        raise NotImplementedError

    def withdraw(self) -> None:
        """Take away what a refused launch has begun, where it is worth nothing, and put back what it has moved."""
        if self._begun and self.empty():
            for name in (*self.manifest.made, MARKER):
                entry = self.path / name
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)
            if self._aside is not None:
                for entry in self._aside.iterdir():
                    entry.rename(self.path / entry.name)
                self._aside.rmdir()
        if not (self.path / MARKER).exists():
            (self.path / LOCK).unlink(missing_ok=True)
            if self._created and not any(self.path.iterdir()):
                self.path.rmdir()

    def move_aside(self) -> None:
        """Move what the run has made to `<name>.previous-<n>`, its marker last; what others put here stays."""
        number = 1
        while os.path.lexists(aside := self.path.with_name(f"{self.path.name}.previous-{number}")):
            number += 1
        aside.mkdir()
        for name in (*self.manifest.made, MARKER):
            if os.path.lexists(self.path / name):
                (self.path / name).rename(aside / name)
        self._aside = aside
        log.info("the run that was here is now in %s", aside)
        self._manifest = Manifest.new(self.path)

    def seal(self, digests: dict[Path, Digest], gone: Sequence[Path] = ()) -> None:
        """Take down the checksums of files that have been written; those below `gone` are about to be removed."""
        self.manifest.seal(digests, gone)
