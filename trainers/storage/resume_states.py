"""Saves and loads the states of an unfinished run in `state/<step>/`, so that the run can be resumed."""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tailtune.configs.atomic_file import temporary_pattern
from tailtune.configs.errors import UserError
from tailtune.trainers.storage.atomic_io import Digest, remove_folder
from tailtune.trainers.storage.manifest import is_in_manifest
from tailtune.trainers.storage.tensor_files import read_folder, write_folder

KEEP = 2
"""Number of states that are kept. There are several because the newest may be damaged."""

RecordFiles = Callable[[dict[Path, Digest], Sequence[Path]], None]
"""Records the digests of written files (file → digest), and forgets those of folders that are about to be removed."""

log = logging.getLogger("tailtune")


class ResumeStates:
    """The states of an unfinished run.

    Args:
        folder: the folder with the states.
        identity: values that have to be equal in a state of this run: config hash, base model, data.
        any_length: a digest of the options without the number of epochs. A state with the same one and fewer epochs is
            of this run, although it has another config hash. None: there is no such digest.
        epochs: number of epochs of the run.
        record: records the files that are written and removed.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        record: RecordFiles = lambda digests, removed: None,
        any_length: str | None = None,
        epochs: int = 0,
    ) -> None:
        self.folder, self.identity, self.record = folder, identity, record
        self.any_length, self.epochs = any_length, epochs

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write the state after a step, and remove all but the last two.

        Args:
            step: number of finished steps.
            tensors: name → tensor.
            facts: all other values, for JSON.

        Raises:
            UserError: the state cannot be written; the earlier states are then unchanged.
        """
        new = self.folder / f"{step:08d}"
        of_run = {"identity": self.identity, "any_length": self.any_length, "epochs": self.epochs}
        digests = write_folder(new, tensors, {**facts, **of_run})
        earlier = [path for path in self._complete() if path < new][1 - KEEP :]
        # States after this step are damaged: the run restarted from an older one.
        removed = [path for path in self._complete() if path not in (*earlier, new)]
        self.record(digests, removed)
        for path in removed:
            remove_folder(path)
        for entry in self.folder.iterdir():
            if temporary_pattern(entry.name[1:9], "new").fullmatch(entry.name):  # left by a process that was killed
                shutil.rmtree(entry)

    def begun(self) -> bool:
        """Whether there is any state, damaged or not."""
        return bool(self._complete())

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Load the newest undamaged state.

        Returns:
            The tensors and the facts that were saved; None if there is no state.

        Raises:
            UserError: every state is damaged, or the newest undamaged state belongs to another run.
        """
        paths = self._complete()
        for path in reversed(paths):
            try:
                tensors, facts = read_folder(path)
            except UserError as error:
                log.warning("warning: %s; going back to the state before it", error)
                continue
            same_but_length = self.any_length is not None and facts.get("any_length") == self.any_length
            same_but_length = same_but_length and facts["epochs"] < self.epochs
            self._check_identity(path, facts.get("identity", {}), {"config"} if same_but_length else set())
            return tensors, facts
        if paths:
            raise UserError(f"every state in {self.folder} is damaged; start over with `resume False`")
        return None

    def _check_identity(self, path: Path, identity: dict[str, Any], may_differ: set[str]) -> None:
        for name, value in self.identity.items():
            if identity.get(name) != value and name not in may_differ:
                raise UserError(
                    f"{path} is of another run: its {name} is {identity.get(name)}, here it is {value}; launch it as "
                    "before, start over with `resume False`, or choose another output_dir"
                )

    def _complete(self) -> list[Path]:
        """Folders of the completely written and recorded states, oldest first. A killed process may leave others."""
        return sorted(path for path in self.folder.glob("[0-9]*") if path.is_dir() and is_in_manifest(path))
