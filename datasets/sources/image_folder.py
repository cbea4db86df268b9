"""Images laid out in class folders: what belongs to a class, and what is left out of it.

Links to files and to folders are followed, so that data may lie elsewhere; but a link never takes a folder into a class
that the data hold in another place, and no folder is read twice.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tailtune.configs.errors import UserError
from tailtune.datasets.images.image_files import EXTENSIONS
from tailtune.datasets.sources.image_sources import MissingData
from tailtune.datasets.sources.listing import Listing

log = logging.getLogger("tailtune")

SPLITS = ("train", "val", "test")
CLUTTER = {"Thumbs.db", "desktop.ini", "__MACOSX"}
"""Files and folders that systems leave behind; names that begin with a dot count like these."""


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders, sorted.

    Raises:
        UserError: there is no such folder, none in it, or a link in it that leads nowhere.
    """
    if not os.path.isdir(folder):
        raise MissingData(f"image folder not found: {folder.absolute()} (`root` must hold train/<class>/…)")
    names = []
    for entry in _entries(str(folder)):
        if _is_folder(entry) and not _is_clutter(entry.name):
            names.append(entry.name)
        elif _leads_nowhere(entry) and not _is_picture(entry):
            raise UserError(f"{entry.path} leads nowhere: a link to {os.readlink(entry.path)} (mend or remove it)")
    if not names:
        raise UserError(f"no class folders in {folder.absolute()} (`root` must hold train/<class>/…)")
    return sorted(names)


def read_folder(root: Path, split: str, class_names: Sequence[str]) -> Listing:
    """`root/<split>/<class>/**`: all images below the class folders, in the order of torchvision's ImageFolder.

    What is left out (hidden files, other kinds of files, links that lead back) is logged.

    Raises:
        UserError: a class folder that is not among `class_names`, or one of train without an image, or no image at all.
    """
    folder = root / split
    present = class_folders(folder)
    for name in present:
        if name not in class_names:
            raise UserError(f"{folder / name}: '{name}' is no class, since {root / 'train'} has no such folder")
    walk = Walk(root, split, present)
    images = {name: walk.images(name) for name in present}
    left_out = walk.left_out()
    more = f"; left out of {split}: {left_out}" if left_out else ""
    empty = [name for name, paths in images.items() if not paths]
    if len(empty) == len(present):
        raise UserError(f"no images in the class folders of {folder.absolute()}{more}")
    if empty and split == "train":
        others = f" (and in {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(
            f"no image in the class folder {folder / empty[0]}{others}: add one, or remove the folder{more}"
        )
    if left_out:
        log.info("left out of %s: %s", folder, left_out)
    if shared := walk.shared():
        log.warning("%s: %d class folders are those of train (%s …)", folder, len(shared), shared[0])
    numbers = {name: label for label, name in enumerate(class_names)}
    labels = [numbers[name] for name, paths in images.items() for _ in paths]
    return Listing(None, [path for paths in images.values() for path in paths], np.array(labels, dtype=np.int64), [])


class Walk:
    """Finds the images of one split, and counts what it leaves out.

    Args:
        root: folder of the data.
        split: one of `SPLITS`.
        class_names: its class folders.

    Raises:
        UserError: two classes in one folder.
    """

    def __init__(self, root: Path, split: str, class_names: Sequence[str]):
        self.root, self.split = root, split
        self.hidden, self.beside, self.nowhere = 0, 0, 0
        self.others: Counter[str] = Counter()
        self.links: list[str] = []
        self.tops = _real_folders(root / split, class_names)
        self._check_tops()
        self.own = _own_folders(root)
        self.above_own = {parent for folder in self.own for parent in _parents(folder)}
        self.walked = set(self.tops.values())
        for entry in _entries(str(root / split)):
            if _is_clutter(entry.name):
                self.hidden += 1
            elif not _is_folder(entry):
                self._count(entry)

    def _check_tops(self) -> None:
        classes: dict[str, str] = {}
        for name, real in self.tops.items():
            folder = self.root / self.split / name
            if real in classes:
                raise UserError(f"{folder} is the same folder as {folder.parent / classes[real]}: remove one of them")
            classes[real] = name
        for name, real in self.tops.items():
            if outer := next((classes[parent] for parent in _parents(real) if parent in classes), None):
                folder = self.root / self.split / name
                raise UserError(f"{folder} lies in the folder of another class, '{outer}': remove one of them")

    def images(self, name: str) -> list[str]:
        """Paths below the root of all images of a class, in the order of torchvision's ImageFolder."""
        top = self.root / self.split / name
        folders = [(str(top), f"{self.split}/{name}", self.tops[name])]
        found: dict[str, list[str]] = {}
        while folders:
            path, relative, real = folders.pop()
            found[relative] = []
            for entry in _entries(path):
                inner = f"{relative}/{entry.name}"
                if _is_clutter(entry.name):
                    self.hidden += 1
                elif _is_folder(entry):
                    if target := self._follow(entry, inner, real):
                        folders.append((entry.path, inner, target))
                elif _is_picture(entry):
                    found[relative].append(inner)
                else:
                    self._count(entry)
        return [path for folder in sorted(found) for path in found[folder]]

    def _follow(self, entry: os.DirEntry[str], relative: str, real: str) -> str | None:
        """Where a folder in the folder `real` really is; None when it is not to be read from here."""
        target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
        if target in self.walked or (entry.is_symlink() and self._is_own(target)):
            self.links.append(relative)
            return None
        self.walked.add(target)
        return target

    def _is_own(self, target: str) -> bool:
        """Whether a folder is, holds, or lies in a folder of the splits and classes."""
        return target in self.own or target in self.above_own or any(each in self.own for each in _parents(target))

    def _count(self, entry: os.DirEntry[str]) -> None:
        """A file that is no image of a class."""
        if _is_picture(entry):
            self.beside += 1
        elif _leads_nowhere(entry):
            self.nowhere += 1
        else:
            self.others[os.path.splitext(entry.name)[1].lower() or "no extension"] += 1

    def left_out(self) -> str:
        """What was left out, for people; an empty text when it was nothing."""
        ranked = sorted(self.others, key=lambda kind: (-self.others[kind], kind))
        kinds = ", ".join(ranked[:5]) + (" …" if len(ranked) > 5 else "")
        links = ", ".join(self.links[:2]) + (" …" if len(self.links) > 2 else "")
        parts = [
            (self.hidden, "hidden file or folder", "hidden files or folders", ""),
            (self.others.total(), "file of another kind", "files of other kinds", f" ({kinds})"),
            (self.beside, "image outside the class folders", "images outside the class folders", ""),
            (len(self.links), "folder that is read elsewhere", "folders that are read elsewhere", f" ({links})"),
            (self.nowhere, "link that leads nowhere", "links that lead nowhere", ""),
        ]
        return ", ".join(f"{n} {one if n == 1 else many}{more}" for n, one, many, more in parts if n)

    def shared(self) -> list[str]:
        """Classes of another split than train whose folder is one that is trained on."""
        if self.split == "train":
            return []
        train = set(_real_folders(self.root / "train", list(self.tops)).values())
        return [name for name, real in self.tops.items() if real in train]


def _real_folders(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Name of a folder in this folder → where it really is."""
    real = os.path.realpath(folder)
    inner = {name: os.path.join(real, name) for name in names}
    return {name: os.path.realpath(path) if os.path.islink(path) else path for name, path in inner.items()}


def _own_folders(root: Path) -> set[str]:
    """Where the splits and their class folders really are."""
    own = set()
    for split in SPLITS:
        if os.path.isdir(root / split):
            own.add(os.path.realpath(root / split))
            own |= {os.path.realpath(each.path) for each in _entries(str(root / split)) if each.is_symlink()}
    return own


def _parents(path: str) -> Iterable[str]:
    """The folders around a path, innermost first."""
    while (parent := os.path.dirname(path)) != path:
        yield parent
        path = parent


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder, by name, links last, so that a folder is read from where it lies."""
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


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name in CLUTTER


def _is_picture(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(EXTENSIONS)
