"""Reads and writes `tailtune.json`: the entries of a folder that a run has created, and checksums of its files.

Only this file shows that a folder belongs to a run. Names do not: any program may write a `config.yaml` or a
`checkpoint/`.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailtune.configs.errors import UserError
from tailtune.trainers.storage.atomic_io import FACTS, Damaged, Digest, write_bytes

MARKER = "tailtune.json"
LOCK = ".tailtune.lock"
HOLDER = ".tailtune.holder"
"""Record of the launch that holds the lock, see `runs/run_lock.py`."""
FORMAT = "tailtune run"
DEEPEST = 3
"""Largest number of folders between a run's folder and a file in it, as in `tests/<key>/tensorboard/`."""


@dataclass
class Manifest:
    """The content of `tailtune.json` in one run folder. Only the process that holds the folder's lock changes it.

    Attributes:
        home: the run's folder.
        run: identifier of the run.
        made: names of entries in the folder that the run has created or is about to create.
        files: path below the folder → checksum and size, for files that are read again.
    """

    home: Path
    run: str
    made: list[str] = field(default_factory=list)
    files: dict[str, Digest] = field(default_factory=dict)

    @classmethod
    def read(cls, home: Path) -> "Manifest | None":
        """Read the manifest of a folder.

        Args:
            home: the folder.

        Returns:
            The manifest; None if the file is missing or another program has written it.

        Raises:
            UserError: the manifest is damaged.
        """
        path = home / MARKER
        if path.exists() and not path.is_file():  # reading a pipe would block
            return None
        try:
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        try:
            content = json.loads(text)
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError("it is no marker of a run")
            if content.pop("sha256", None) != _own_digest(content):
                raise ValueError("its checksum is wrong")
            files = {name: Digest(*digest) for name, digest in content["files"].items()}
            return cls(home, content["run"], list(content["made"]), files)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged ({error}), so nothing tells what in {home} is this run's; put it back from a copy, "
                "or move the folder away and start again"
            ) from error

    @classmethod
    def new(cls, home: Path) -> "Manifest":
        """The manifest of a new run; nothing is written yet."""
        return cls(home, uuid.uuid4().hex)

    def own(self, *names: str) -> None:
        """Record that entries of the folder belong to this run, before they are created.

        Args:
            names: names of the entries.

        Raises:
            UserError: an entry exists already, and this run did not create it.
        """
        self.check_free(*names)
        new = [name for name in names if name not in self.made]
        if new or not (self.home / MARKER).exists():
            self.made += new
            self._write()

    def check_free(self, *names: str) -> None:
        """Check that entries of the folder do not exist, or belong to this run.

        Args:
            names: names of the entries.

        Raises:
            UserError: an entry exists and does not belong to this run; the message names the first one.
        """
        for name in names:
            if name not in self.made and os.path.lexists(self.home / name):
                raise UserError(
                    f"{self.home / name} was not made by the run in that folder and would be overwritten; move it away "
                    "or choose another output_dir"
                )

    def seal(self, digests: dict[Path, Digest], gone: Sequence[Path] = ()) -> None:
        """Record the digests of files that have just been written.

        Args:
            digests: file → digest.
            gone: files and folders that are about to be removed; their digests are forgotten.
        """
        for path in gone:
            removed = path.relative_to(self.home).as_posix()
            self.files = {
                name: digest
                for name, digest in self.files.items()
                if name != removed and not name.startswith(f"{removed}/")
            }
        self.files |= {path.relative_to(self.home).as_posix(): digest for path, digest in digests.items()}
        self._write()

    def check(self, path: Path) -> None:
        """Raise `Damaged` if a file is missing or has changed since the run wrote it."""
        digest = self.files.get(path.relative_to(self.home).as_posix())
        if digest is None:
            raise Damaged(path, "the run did not finish writing it")
        digest.check(path)

    def intact(self, path: Path) -> bool:
        """Whether a file exists and has not changed since the run wrote it."""
        try:
            self.check(path)
        except Damaged:
            return False
        return True

    def _write(self) -> None:
        content: dict[str, Any] = {"format": FORMAT, "schema": 1, "run": self.run, "made": sorted(self.made)}
        content["files"] = {name: list(digest) for name, digest in sorted(self.files.items())}
        content["sha256"] = _own_digest(content)
        write_bytes(self.home / MARKER, (json.dumps(content, indent=1) + "\n").encode())


def manifest_of(path: Path) -> Manifest | None:
    """The manifest of the run whose folder a file is in; None if the file is in no run's folder."""
    for home in [path.parent, *path.parents][: DEEPEST + 1]:
        if (home / MARKER).exists():
            return Manifest.read(home)
    return None


def is_in_manifest(folder: Path) -> bool:
    """Whether a run has recorded files of a folder; True if the folder does not belong to any run."""
    manifest = manifest_of(folder / FACTS)
    if manifest is None:
        return True
    prefix = f"{folder.relative_to(manifest.home).as_posix()}/"
    return any(name.startswith(prefix) for name in manifest.files)


def check_file(path: Path) -> None:
    """Check that a file in a run's folder has not changed since the run wrote it. Other files are not checked.

    Args:
        path: the file.

    Raises:
        Damaged: the file is missing or has changed.
    """
    manifest = manifest_of(path)
    if manifest is not None:
        manifest.check(path)


def read_bytes(path: Path) -> bytes:
    """Read a file. If a run wrote it, its checksum is compared first.

    Args:
        path: the file.

    Raises:
        Damaged: the file is missing, or has changed since it was written.
        UserError: the run's manifest is damaged.
    """
    check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise Damaged(path, error.strerror or str(error)) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a file as `read_bytes` does, and parse it as a JSON object.

    Args:
        path: the file.

    Raises:
        Damaged: the file is missing, has changed since it was written, or does not hold a JSON object.
    """
    try:
        content = json.loads(read_bytes(path).decode())
    except (ValueError, RecursionError) as error:
        raise Damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise Damaged(path, "no JSON object")
    return content


def is_run(folder: Path) -> bool:
    """Whether a folder belongs to a run."""
    try:
        return Manifest.read(folder) is not None
    except UserError:
        return False


def _own_digest(content: dict[str, Any]) -> str:
    """Checksum of a manifest's content, without the entry that holds this checksum."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
