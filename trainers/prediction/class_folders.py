"""`ClassFolders`: copies of images, sorted into a folder for each class."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tailtune.configs.errors import UserError

UNSAFE = re.compile(r'[\x00-\x1f/\\:*?"<>|]')
"""Characters that a name must not have on one of the usual file systems."""


class ClassFolders:
    """Copies images into `folder/<class>/`. Images of the same name are kept apart by a number: `a.jpg`, `a_2.jpg`.

    Args:
        folder: the folder of the copies, which is empty.
        labels: the labels that images may get; they are distinct.
    """

    def __init__(self, folder: Path, labels: Sequence[str]) -> None:
        self.folder, self._names = folder, dict(zip(labels, folder_names(labels), strict=True))
        self._repeated: Counter[Path] = Counter()
        """Copies of each name that was met more than once, without the first."""

    def add(self, path: str, label: str) -> None:
        """Copy an image with its times and permissions.

        Args:
            path: the file.
            label: its class.

        Raises:
            UserError: the file system refuses to read or to write.
        """
        home = self.folder / self._names[label]
        try:
            self._copy(path, home)
        except OSError as error:
            raise UserError(f"cannot copy {path} into {home.name}/: {error.strerror}") from error

    def _copy(self, path: str, home: Path) -> None:
        home.mkdir(exist_ok=True)
        first = target = home / os.path.basename(path)
        while os.path.lexists(target):
            self._repeated[first] += 1
            target = first.with_name(f"{first.stem}_{self._repeated[first] + 1}{first.suffix}")
        shutil.copy2(path, target)


def folder_names(labels: Sequence[str]) -> list[str]:
    """A name for the folder of each label, which every file system accepts. Names that would be equal get a number.

    Args:
        labels: distinct texts.
    """
    names, used = [], set[str]()
    for label in labels:
        name = safe = UNSAFE.sub("_", label).strip(" .")[:100] or "class"
        number = 1
        while name.lower() in used:
            number += 1
            name = f"{safe}_{number}"
        used.add(name.lower())
        names.append(name)
    return names
