"""Decides whether a folder belongs to a run: it is new, or its marker file `tailtune.json` says so."""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from tailtune.configs.atomic_file import temporary_pattern
from tailtune.configs.errors import UserError
from tailtune.trainers.runs.run_lock import RunLock
from tailtune.trainers.storage.atomic_io import Digest
from tailtune.trainers.storage.manifest import HOLDER, LOCK, MARKER, Manifest, is_run

log = logging.getLogger("tailtune")


class OtherRun(UserError):
    """A folder holds a run with other options than the command."""


class OwnedFolder:
    """A folder that belongs to a run. The run may change only the entries that the marker file lists.

    Args:
        path: the folder; it need not exist.
    """

    adopts = False
    """A run may start in a folder that holds files of other programs, such as the folder of LIFT's checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest: Manifest | None = None
        self._created = self._begun = False
        self._aside: Path | None = None
        """Folder into which this launch has moved the earlier run; None if it has moved none."""

    def hold(self, lock: RunLock) -> None:
        """Lock the folder, so that a second launch cannot use it. Nothing else is written.

        The operating system releases the lock when the process ends.

        Args:
            lock: the lock of the folder, not yet acquired.

        Raises:
            UserError: another process holds the lock, the folder does not belong to a run, or it cannot be created.
        """
        try:
            self._marker()  # first: no lock may be written into the folder of another program
            self._created = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}; choose another output_dir") from error
        self._manifest = None  # read the file again: another launch may have ended in the meantime

    def check_owner(self) -> None:
        """Check that the folder belongs to a run or is free.

        All stages of a chain are checked before the first one trains for hours.

        Raises:
            UserError: the folder holds files of another program.
        """
        self._marker()

    @property
    def manifest(self) -> Manifest:
        """The content of the marker file; a new one if no run has started in the folder."""
        if self._manifest is None:
            self._manifest = self._marker() or Manifest.new(self.path)
        return self._manifest

    def _marker(self) -> Manifest | None:
        """Read the marker file.

        Returns:
            Its content; None if no run has started in the folder.

        Raises:
            UserError: the folder holds files of another program.
        """
        manifest = Manifest.read(self.path)
        if manifest is None and self.path.is_dir() and not self.adopts:
            strange = sorted(entry.name for entry in self.path.iterdir() if not self._harmless(entry))
            if strange:
                older = " (a run of an earlier version can be evaluated: `test_only True model_dir …`)"
                raise UserError(
                    f"{self.path} holds {', '.join(strange[:3])} and no {MARKER}, so nothing in it is known to be a "
                    f"run's; choose another output_dir, or move it away{older if 'config.yaml' in strange else ''}"
                )
        return manifest

    @staticmethod
    def _harmless(entry: Path) -> bool:
        """Whether an entry may exist before a run starts: a lock, an interrupted write, or folders of other runs."""
        if entry.name in (LOCK, HOLDER) or temporary_pattern(MARKER).fullmatch(entry.name):
            return True
        if not entry.is_dir() or entry.is_symlink():
            return False
        # A folder without a marker file may be a run that was interrupted before it wrote the marker.
        return is_run(entry) or all(map(OwnedFolder._harmless, entry.iterdir()))

    def check_free(self, *names: str) -> None:
        """Check, before anything is written, that no file of somebody else would be overwritten.

        Args:
            names: entries of the folder that the run will write.

        Raises:
            UserError: an entry exists, and this run did not create it.
        """
        self.manifest.check_free(*names)

    def own(self, *names: str) -> None:
        """Record in the marker file that this run is about to create some entries.

        Args:
            names: the entries of the folder.

        Raises:
            UserError: an entry exists, and this run did not create it.
        """
        self._begun = self._begun or not (self.path / MARKER).exists()
        self.manifest.own(*names)

    def log_file(self) -> Path:
        """Path of the log file. It is in `tests/` if the folder has a `log.txt` of another program, such as LIFT."""
        log_file = self.path / "log.txt"
        if log_file.exists() and log_file.name not in self.manifest.made:
            return self.path / "tests" / "log.txt"
        self.own(log_file.name)
        return log_file

    def empty(self) -> bool:
        """Whether the folder holds no result that took time to compute."""
        raise NotImplementedError

    def withdraw(self) -> None:
        """Undo a launch that was refused: remove its entries if they hold no result, and restore the earlier run."""
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
            for name in (LOCK, HOLDER):
                (self.path / name).unlink(missing_ok=True)
            if self._created and not any(self.path.iterdir()):
                self.path.rmdir()

    def move_aside(self) -> None:
        """Move the entries of the run to `<name>.previous-<n>`, the marker file last.

        Entries that the run did not create stay in the folder.
        """
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
        """Record the checksums of files that have been written.

        Args:
            digests: file → digest.
            gone: files and folders that are about to be removed; their digests are forgotten.
        """
        self.manifest.seal(digests, gone)
