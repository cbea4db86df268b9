"""`KeptTensors`: results that take long to compute, in a folder of the user that all runs share.

An entry is one file. Its name is a digest of everything that its tensor depends on, and its header has these facts and
the checksum of the tensor. An entry that cannot be read or written is computed again, which a warning says.
"""

import errno
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tailtune.configs.atomic_file import atomic_file, temporary_pattern
from tailtune.configs.machine import LARGEST_SHARE

TENSOR = "features"
ABANDONED = 3600.0
"""Age in seconds of a temporary file whose process was probably killed."""
log = logging.getLogger("tailtune")


class KeptTensors:
    """Tensors in a folder.

    Args:
        folder: the folder, which is made when the first entry is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def below_home(cls, folder: Path) -> "KeptTensors | None":
        """The tensors in a folder that may begin with `~`; None, with a warning, for a user without a home folder."""
        try:
            return cls(folder.expanduser())
        except RuntimeError:  # as in containers whose user has no name
            log.warning("warning: this user has no home folder for %s, so nothing is kept; set HOME", folder)
            return None

    def path(self, facts: Mapping[str, Any]) -> Path:
        """The file of an entry.

        Args:
            facts: everything that its tensor depends on, as JSON.
        """
        return self.folder / f"{hashlib.sha256(as_text(facts).encode()).hexdigest()[:32]}.safetensors"

    def read(self, facts: Mapping[str, Any], checked: bool = False) -> Tensor | None:
        """The tensor of an entry, on the CPU; None if there is none that is complete and unchanged.

        Its memory is the file, which the processes of a machine share, and of which they load what they use.

        Args:
            facts: as for `path`.
            checked: leave out the checksum, because another process of this machine has compared it.
        """
        path = self.path(facts)
        try:
            if not path.exists():
                return None
            with safe_open(path, "pt") as file:
                about, tensor = file.metadata() or {}, file.get_tensor(TENSOR)
            if about.get("facts") != as_text(facts) or not checked and about.get("sha256") != _checksum(tensor):
                raise ValueError("its checksum is wrong")
        except (OSError, ValueError, SafetensorError) as error:
            log.warning("warning: %s is not used (%s); it is computed again", path, error)
            return None
        return tensor

    def write(self, facts: Mapping[str, Any], tensor: Tensor) -> bool:
        """Write an entry completely or not at all.

        Args:
            facts: as for `path`.
            tensor: on the CPU.

        Returns:
            Whether it is written. If not, because the disk has too little space or refuses to write, a warning says so.
        """
        path, size = self.path(facts), tensor.nbytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.remove_abandoned(path)
            free = shutil.disk_usage(self.folder).free
            if size > LARGEST_SHARE * free:
                raise OSError(errno.ENOSPC, f"{size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free")
            content = save({TENSOR: tensor}, {"facts": as_text(facts), "sha256": _checksum(tensor)})
            with atomic_file(path) as file:
                file.write(content)
        except OSError as error:
            log.warning("warning: cannot write %s (%s); the next run computes it again", path, error.strerror)
            return False
        return True

    def remove_abandoned(self, path: Path) -> None:
        """Remove what a process that was killed while it wrote the entry of this file has left."""
        written = temporary_pattern(path.name)
        for left in self.folder.glob(f".{path.name}.*.tmp"):
            with suppress(FileNotFoundError):  # another process removes it, too
                if written.fullmatch(left.name) and time.time() - left.stat().st_mtime > ABANDONED:
                    left.unlink()


def as_text(facts: Mapping[str, Any]) -> str:
    """Facts as JSON, the same text for equal facts."""
    return json.dumps(facts, sort_keys=True)


def _checksum(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
