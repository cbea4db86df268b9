"""Reads images from class folders: `root/<split>/<class>/**`.

Links to files and folders are followed, so that data may be stored elsewhere. But no folder is read twice, and a link
never adds the folder of a split or class to another class.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tailtune.configs.errors import UserError
from tailtune.datasets.images.image_files import EXTENSIONS
from tailtune.datasets.sources.listing import Listing
from tailtune.datasets.sources.named_source import MissingData
from tailtune.datasets.sources.path_list import PathList

log = logging.getLogger("tailtune")

SPLITS = ("train", "val", "test")
SYSTEM_NAMES = {"Thumbs.db", "desktop.ini", "__MACOSX"}
"""Files and folders that operating systems create. They are left out, as are names that begin with a dot."""


def class_folders(folder: Path) -> list[str]:
    """The names of the class folders of a split, sorted.

    Args:
        folder: the folder of the split.

    Raises:
        UserError: the folder does not exist, contains no folder, or contains a broken link that may have been one.
    """
    if not os.path.isdir(folder):
        raise MissingData(f"image folder not found: {folder.absolute()} (`root` must hold train/<class>/…)")
    names = []
    for entry in _entries(str(folder)):
        if _is_folder(entry) and not is_hidden(entry.name):
            names.append(entry.name)
        elif _is_broken_link(entry) and not _is_image(entry):
            raise UserError(f"{entry.path} is a broken link to {os.readlink(entry.path)}: repair or remove it")
    if not names:
        raise UserError(f"no class folders in {folder.absolute()} (`root` must hold train/<class>/…)")
    return sorted(names)


def read_folder(root: Path, split: str, class_names: Sequence[str]) -> Listing:
    """All images below the class folders of a split, in the order of torchvision's ImageFolder.

    Hidden files, other kinds of files and links to folders that are read elsewhere are left out; the log says how many.

    Args:
        root: folder of the data.
        split: one of `SPLITS`.
        class_names: names of all C classes in the order of their labels.

    Returns:
        The images, with paths relative to `root`.

    Raises:
        UserError: a class folder is not among `class_names`, the split has no image, or a class of train has none.
    """
    folder = root / split
    present = class_folders(folder)
    for name in present:
        if name not in class_names:
            reason = f"'{name}' is no class, because {root / 'train'} has no such folder"
            raise UserError(f"{folder / name}: {reason}; remove or rename it")
    reader = ClassFolderReader(root, split, present)
    images = {name: reader.images(name) for name in present}
    left_out = reader.left_out()
    _check_empty(images, folder, split, left_out)
    if left_out:
        log.info("left out of %s: %s", folder, left_out)
    if shared := reader.shared_with_train():
        log.warning("warning: %s: %d of its class folders also belong to train (%s …)", folder, len(shared), shared[0])
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = [label_of[name] for name, paths in images.items() for _ in paths]
    paths = PathList(path for of_class in images.values() for path in of_class)
    return Listing(None, paths, np.array(labels, dtype=np.int64), [])


def _check_empty(images: dict[str, list[str]], folder: Path, split: str, left_out: str) -> None:
    """Refuse a split without images, and a class of train without images."""
    note = f"; left out of {split}: {left_out}" if left_out else ""
    empty = [name for name, paths in images.items() if not paths]
    if len(empty) == len(images):
        raise UserError(f"no images in the class folders of {folder.absolute()}: add some{note}")
    if empty and split == "train":
        others = f" (and in {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(
            f"no image in the class folder {folder / empty[0]}{others}: add one, or remove the folder{note}"
        )


class ClassFolderReader:
    """Finds the images of one split, and counts what it leaves out.

    Args:
        root: folder of the data.
        split: one of `SPLITS`.
        class_names: the class folders of the split.

    Raises:
        UserError: two classes are the same folder, or one lies inside another.
    """

    def __init__(self, root: Path, split: str, class_names: Sequence[str]):
        self.root, self.split = root, split
        self.hidden, self.outside, self.broken_links = 0, 0, 0
        self.other_kinds: Counter[str] = Counter()
        """Extension of files that are no images → their number."""
        self.skipped_links: list[str] = []
        """Links to folders that are read elsewhere."""
        self.real_folders = _real_folders(root / split, class_names)
        self._check_class_folders()
        self.data_folders = _data_folders(root)
        self.above_data_folders = {parent for folder in self.data_folders for parent in _parents(folder)}
        self.visited = set(self.real_folders.values())
        for entry in _entries(str(root / split)):
            if is_hidden(entry.name):
                self.hidden += 1
            elif not _is_folder(entry):
                self._count_file(entry)

    def _check_class_folders(self) -> None:
        class_of: dict[str, str] = {}
        for name, real in self.real_folders.items():
            folder = self.root / self.split / name
            if real in class_of:
                raise UserError(f"{folder} is the same folder as {folder.parent / class_of[real]}: remove one of them")
            class_of[real] = name
        for name, real in self.real_folders.items():
            if outer := next((class_of[parent] for parent in _parents(real) if parent in class_of), None):
                folder = self.root / self.split / name
                raise UserError(f"{folder} lies in the folder of another class, '{outer}': remove one of them")

    def images(self, name: str) -> list[str]:
        """All images of a class, in the order of torchvision's ImageFolder.

        Args:
            name: the class.

        Returns:
            Paths relative to the root of the data.
        """
        top = self.root / self.split / name
        folders = [(str(top), f"{self.split}/{name}", self.real_folders[name])]
        images_in: dict[str, list[str]] = {}
        while folders:
            path, relative, real = folders.pop()
            images_in[relative] = []
            for entry in _entries(path):
                entry_path = f"{relative}/{entry.name}"
                if is_hidden(entry.name):
                    self.hidden += 1
                elif _is_folder(entry):
                    if target := self._follow(entry, entry_path, real):
                        folders.append((entry.path, entry_path, target))
                elif _is_image(entry):
                    images_in[relative].append(entry_path)
                else:
                    self._count_file(entry)
        return [path for folder in sorted(images_in) for path in images_in[folder]]

    def _follow(self, entry: os.DirEntry[str], relative: str, real: str) -> str | None:
        """The real path of a folder inside the folder `real`; None if it must not be read from here."""
        target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
        if target in self.visited or (entry.is_symlink() and self._overlaps_data(target)):
            self.skipped_links.append(relative)
            return None
        self.visited.add(target)
        return target

    def _overlaps_data(self, target: str) -> bool:
        """Whether a folder is, contains, or lies in the folder of a split or class."""
        inside = any(parent in self.data_folders for parent in _parents(target))
        return target in self.data_folders or target in self.above_data_folders or inside

    def _count_file(self, entry: os.DirEntry[str]) -> None:
        """Count a file that is no image of a class."""
        if _is_image(entry):
            self.outside += 1
        elif _is_broken_link(entry):
            self.broken_links += 1
        else:
            self.other_kinds[os.path.splitext(entry.name)[1].lower() or "no extension"] += 1

    def left_out(self) -> str:
        """A description of what was left out, for the log; an empty text if it was nothing."""
        by_number = sorted(self.other_kinds, key=lambda kind: (-self.other_kinds[kind], kind))
        kinds = ", ".join(by_number[:5]) + (" …" if len(by_number) > 5 else "")
        links = ", ".join(self.skipped_links[:2]) + (" …" if len(self.skipped_links) > 2 else "")
        number_of_links = len(self.skipped_links)
        parts = [
            (self.hidden, "hidden file or folder", "hidden files or folders", ""),
            (self.other_kinds.total(), "file of another kind", "files of other kinds", f" ({kinds})"),
            (self.outside, "image outside the class folders", "images outside the class folders", ""),
            (number_of_links, "folder that is read elsewhere", "folders that are read elsewhere", f" ({links})"),
            (self.broken_links, "broken link", "broken links", ""),
        ]
        return ", ".join(
            f"{number} {singular if number == 1 else plural}{examples}"
            for number, singular, plural, examples in parts
            if number
        )

    def shared_with_train(self) -> list[str]:
        """Classes of this split whose folder is also a class folder of train; none if this split is train."""
        if self.split == "train":
            return []
        train_folders = set(_real_folders(self.root / "train", list(self.real_folders)).values())
        return [name for name, real in self.real_folders.items() if real in train_folders]


def _real_folders(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Name of a folder inside `folder` → its real path."""
    real = os.path.realpath(folder)
    paths = {name: os.path.join(real, name) for name in names}
    return {name: os.path.realpath(path) if os.path.islink(path) else path for name, path in paths.items()}


def _data_folders(root: Path) -> set[str]:
    """Real paths of the splits, and of their class folders that are links."""
    folders = set()
    for split in SPLITS:
        if os.path.isdir(root / split):
            folders.add(os.path.realpath(root / split))
            folders |= {os.path.realpath(entry.path) for entry in _entries(str(root / split)) if entry.is_symlink()}
    return folders


def _parents(path: str) -> Iterable[str]:
    """The folders that contain a path, innermost first."""
    while (parent := os.path.dirname(path)) != path:
        yield parent
        path = parent


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """The content of a folder by name. Links to folders come last, so that a folder is read at its real place."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: (entry.is_symlink() and _is_folder(entry), entry.name))
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_broken_link(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out because of its name."""
    return name.startswith(".") or name in SYSTEM_NAMES


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(EXTENSIONS)
