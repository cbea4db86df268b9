"""The states of an unfinished run: everything that resuming needs, in `state/<step>/`."""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.trainers.storage.atomic_io import Digest, remove_folder, temporary_pattern, write_folder
from tailtune.trainers.storage.manifest import is_in_manifest, read_folder

KEEP = 2
"""How many states are kept, because the newest may be damaged."""

RecordFiles = Callable[[dict[Path, Digest], Sequence[Path]], None]
"""Records the digests of files that were written, and forgets the folders that are about to be removed."""

log = logging.getLogger("tailtune")


class ResumeStates:
    """The states of an unfinished run.

    Args:
        folder: the folder that they are in.
        identity: what must be equal for a state to belong to this run: config hash, base model, number of processes,
            data.
        record: records what is written and removed.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], record: RecordFiles = lambda digests, removed: None
    ) -> None:
        self.folder, self.identity, self.record = folder, identity, record

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write the state after a step, and remove all but the last two.

        Args:
            step: number of steps that are done.
            tensors: name → tensor.
            facts: everything else, as JSON.

        Raises:
            UserError: it cannot be written; the earlier states stay whole.
        """
        new = self.folder / f"{step:08d}"
        digests = write_folder(new, tensors, {**facts, "identity": self.identity})
        earlier = [path for path in self._complete() if path < new][1 - KEEP :]
        removed = [path for path in self._complete() if path not in (*earlier, new)]  # later ones were damaged
        self.record(digests, removed)
        for path in removed:
            remove_folder(path)
        for entry in self.folder.iterdir():
            if temporary_pattern(entry.name[1:9], "new").fullmatch(entry.name):  # left by a process that was killed
                shutil.rmtree(entry)

    def begun(self) -> bool:
        """Whether there is any state, whole or damaged."""
        return bool(self._complete())

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest state that is whole, as tensors and facts; None if no run was begun.

        Raises:
            UserError: every state is damaged, or the newest whole one belongs to another run.
        """
        paths = self._complete()
        for path in reversed(paths):
            try:
                tensors, facts = read_folder(path)
            except UserError as error:
                log.warning("%s; going back to the state before it", error)
                continue
            self._check_identity(path, facts.get("identity", {}))
            return tensors, facts
        if paths:
            raise UserError(f"every state in {self.folder} is damaged; start over with `resume False`")
        return None

    def _check_identity(self, path: Path, identity: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise UserError(
                    f"{path} is of another run: its {name} is {identity.get(name)}, here it is {value}; launch it as "
                    "before, start over with `resume False`, or choose another output_dir"
                )

    def _complete(self) -> list[Path]:
        """Folders of states that were written and recorded, oldest first; a killed process may leave others."""
        return sorted(path for path in self.folder.glob("[0-9]*") if path.is_dir() and is_in_manifest(path))
