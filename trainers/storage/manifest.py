"""`tailtune.json`: what a run has made in its folder, and the checksums of the files that later commands read.

Nothing else proves that a folder is a run's. Names never do: a `config.yaml` or a `checkpoint/` may be anybody's.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.trainers.storage.atomic_io import FACTS, TENSORS, Damaged, Digest, write_bytes

MARKER = "tailtune.json"
LOCK = ".tailtune.lock"
FORMAT = "tailtune run"
DEEPEST = 3
"""Folders between a run's folder and a file in it: `tests/<key>/tensorboard/`."""


@dataclass
class Manifest:
    """The marker of one run folder. Only the process that holds the folder's lock changes it."""

    home: Path
    run: str
    made: list[str] = field(default_factory=list)
    """Names in the folder that the run has made or is about to make."""
    files: dict[str, Digest] = field(default_factory=dict)
    """Path below the folder → checksum and size, of what is read again."""

    @classmethod
    def read(cls, home: Path) -> "Manifest | None":
        """The marker of a folder; None where there is none, or another program's file of that name.

        Raises:
            UserError: it is damaged.
        """
        path = home / MARKER
        if path.exists() and not path.is_file():  # a pipe would be waited for
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
            files = {name: Digest(*each) for name, each in content["files"].items()}
            return cls(home, content["run"], list(content["made"]), files)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged ({error}), so nothing tells what in {home} is this run's; put it back from a copy, "
                "or move the folder away and start again"
            ) from error

    @classmethod
    def new(cls, home: Path) -> "Manifest":
        """A marker for a run that begins; nothing is written yet."""
        return cls(home, uuid.uuid4().hex)

    def own(self, *names: str) -> None:
        """Say that entries of the folder are this run's, before they are made.

        Raises:
            UserError: one is there that the run has not made.
        """
        self.check_free(*names)
        fresh = [name for name in names if name not in self.made]
        if fresh or not (self.home / MARKER).exists():
            self.made += fresh
            self._write()

    def check_free(self, *names: str) -> None:
        """Raise a `UserError` that names the first entry which is there and is not this run's."""
        for name in names:
            if name not in self.made and os.path.lexists(self.home / name):
                raise UserError(
                    f"{self.home / name} was not made by the run in that folder and would be overwritten; move it away "
                    "or choose another output_dir"
                )

    def seal(self, digests: dict[Path, Digest], gone: Sequence[Path] = ()) -> None:
        """Take checksums of files that have just been written; those below `gone` are forgotten."""
        for path in gone:
            start = path.relative_to(self.home).as_posix()
            self.files = {k: v for k, v in self.files.items() if k != start and not k.startswith(f"{start}/")}
        self.files |= {path.relative_to(self.home).as_posix(): each for path, each in digests.items()}
        self._write()

    def check(self, path: Path) -> None:
        """Raise `Damaged` if a file is not what the run wrote."""
        known = self.files.get(path.relative_to(self.home).as_posix())
        if known is None:
            raise Damaged(path, "the run did not finish writing it")
        known.check(path)

    def intact(self, path: Path) -> bool:
        """Whether a file is there and what the run wrote."""
        try:
            self.check(path)
        except Damaged:
            return False
        return True

    def _write(self) -> None:
        content: dict[str, Any] = {"format": FORMAT, "schema": 1, "run": self.run, "made": sorted(self.made)}
        content["files"] = {name: list(each) for name, each in sorted(self.files.items())}
        content["sha256"] = _own_digest(content)
        write_bytes(self.home / MARKER, (json.dumps(content, indent=1) + "\n").encode())


def manifest_of(path: Path) -> Manifest | None:
    """The marker of the run whose folder a file is in; None for a file that is in none."""
    for home in [path.parent, *path.parents][: DEEPEST + 1]:
        if (home / MARKER).exists():
            return Manifest.read(home)
    return None


def is_taken_down(folder: Path) -> bool:
    """Whether a run knows files in a folder of its own; True for folders in no run."""
    found = manifest_of(folder / FACTS)
    if found is None:
        return True
    start = f"{folder.relative_to(found.home).as_posix()}/"
    return any(name.startswith(start) for name in found.files)


def check_file(path: Path) -> None:
    """Raise `Damaged` if a file in a run's folder is not what the run wrote; files elsewhere pass."""
    found = manifest_of(path)
    if found is not None:
        found.check(path)


def read_bytes(path: Path) -> bytes:
    """The content of a file, after a look at its checksum where a run wrote it.

    Raises:
        Damaged: it is not there, or not what was written. UserError: the run's marker is damaged.
    """
    check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise Damaged(path, error.strerror or str(error)) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError` for anything else, and as `read_bytes`."""
    try:
        content = json.loads(read_bytes(path).decode())
    except (ValueError, RecursionError) as error:
        raise Damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise Damaged(path, "no JSON object")
    return content


def read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_folder` wrote.

    Raises:
        Damaged: a file is missing, torn or altered.
    """
    try:
        facts, content = read_json(path / FACTS), read_bytes(path / TENSORS)
        if hashlib.sha256(content).hexdigest() != facts.get("sha256"):
            raise ValueError("its checksum is wrong")
        return load(content), facts
    except (ValueError, SafetensorError) as error:
        raise Damaged(path, str(error)) from error


def is_run(folder: Path) -> bool:
    """Whether a run has marked the folder as its own."""
    try:
        return Manifest.read(folder) is not None
    except UserError:
        return False


def _own_digest(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
