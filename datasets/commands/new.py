"""`data new`: makes a YAML, list files and a picture of the class frequencies from a folder of images."""

import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from tailtune.configs.atomic_file import atomic_file, atomic_folder
from tailtune.configs.errors import UserError
from tailtune.configs.program import program
from tailtune.datasets.commands.assign_splits import assign_splits
from tailtune.datasets.commands.class_curve import LABELS, class_curve
from tailtune.datasets.commands.copies import exact_copies
from tailtune.datasets.commands.grouping import joined, read_groups
from tailtune.datasets.commands.notes import collected_notes
from tailtune.datasets.commands.result_files import cannot_write, plain_name
from tailtune.datasets.commands.split_files import SplitFiles
from tailtune.datasets.images.decode_many import decode_many
from tailtune.datasets.images.inspect_files import inspect_files
from tailtune.datasets.long_tail import shot_masks
from tailtune.datasets.sources.image_folder import SPLITS, class_folders, read_folder
from tailtune.datasets.sources.image_sources import FileSource
from tailtune.datasets.splits.split_records import Split

SHOWN = 10
"""Entries of a list that the terminal shows; the files have all of them."""


@dataclass(frozen=True)
class NewRequest:
    """What `data new` shall make."""

    folder: Path
    """Holds one folder for each class."""
    output: Path
    """The new folder for the YAML and the lists; it must not exist."""
    test: float = 0.2
    """Test images of each class: a share below 1, or a number."""
    val: float = 0.0
    """Validation images of each class, as `test`."""
    seed: int = 0
    groups: str | None = None
    """A regular expression or a CSV file, see `read_groups`."""
    decode: bool = False
    many_above: int = 100
    few_below: int = 20


@dataclass
class NewData:
    """The images of a folder, and how they are split."""

    root: Path
    class_names: list[str]
    paths: list[str]
    """Paths relative to the root, [N]."""
    labels: np.ndarray
    """int64 [N]."""
    left_out: dict[str, str]
    """Path of an image that is in no split → the reason."""
    notes: list[str] = field(default_factory=list)
    split_of: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=object))
    """Name of the split of each image, [N]."""

    def counts(self, split: str) -> np.ndarray:
        """Images of each class in a split, int64 [C]."""
        return np.bincount(self.labels[self.split_of == split], minlength=len(self.class_names))

    def splits(self) -> list[str]:
        """Names of the splits that have images."""
        return [split for split in SPLITS if (self.split_of == split).any()]


def new_data(request: NewRequest) -> str:
    """Split a folder of images, and write the YAML, the lists and the picture. An existing folder is not changed.

    Args:
        request: the folder, and how to split it.

    Returns:
        What was made, for the terminal.

    Raises:
        UserError: the folder does not hold class folders with images, the output exists, the groups are wrong, or the
            file system refuses to write.
    """
    _check(request)
    data = _read(request)
    together = _leave_out(request, data)
    keys = read_groups(request.groups, data.paths) if request.groups else data.paths
    held_out = {name: amount for name, amount in (("test", request.test), ("val", request.val)) if amount}
    num_classes = len(data.class_names)
    data.split_of = assign_splits(data.labels, joined(keys, together), held_out, num_classes, request.seed)
    for name in held_out:
        without = [data.class_names[label] for label in np.flatnonzero(data.counts(name) == 0)]
        if without:
            data.notes.append(f"{_some(without)} without a {name} image: too few images, or all are in one group")
    if "test" not in data.splits():
        raise UserError(f"no image is left for the test split; raise --test {request.test:g}, or add images")
    _write(request.output, _files(request, data))
    return _summary(request, data)


def _check(request: NewRequest) -> None:
    if os.path.lexists(request.output):
        raise UserError(f"{request.output} exists already: name another folder with --output, or remove it")
    for key, amount in (("test", request.test), ("val", request.val)):
        if not math.isfinite(amount) or amount < 0 or (amount >= 1 and amount != int(amount)):
            raise UserError(f"--{key} {amount:g}: give a share below 1, or a whole number of images of each class")
    if not request.test:
        raise UserError("--test 0: a data set needs test images; give a share below 1 or a number of images")
    inside = Path(os.path.realpath(request.output)).is_relative_to(os.path.realpath(request.folder))
    if inside:
        raise UserError(f"--output {request.output} lies in the folder of the images; name a folder outside")


def _read(request: NewRequest) -> NewData:
    """The images of the folder whose paths a list file can hold."""
    folder = Path(os.path.abspath(request.folder))
    names = class_folders(folder)
    if set(names) <= set(SPLITS):
        inner = folder / names[0]
        raise UserError(f"{request.folder} is split already: check it with data verify, or make a new split of {inner}")
    with collected_notes() as notes:
        listing = read_folder(folder.parent, folder.name, names)
    paths = [path.removeprefix(f"{folder.name}/") for path in listing.paths]
    left_out = {path: reason for path in paths if (reason := _unlistable(path))}
    return NewData(folder, names, paths, listing.labels, left_out, notes)


def _unlistable(path: str) -> str:
    """Why a list file cannot hold a path; an empty text if it can."""
    if "\n" in path or "\r" in path:
        return "its name holds a line break"
    if path != path.strip():
        return "its name begins with a blank"
    return "" if path.isprintable() or _is_utf8(path) else "its name is not UTF-8"


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _leave_out(request: NewRequest, data: NewData) -> list[list[int]]:
    """Leave out what cannot be read, and classes without images. Returns sets of positions with the same content."""
    source = FileSource(data.root, data.paths, data.labels)
    files = SplitFiles({"all": Split(source, np.arange(len(source)))})
    inspection = inspect_files(files)
    problems = dict(inspection.problems)
    if request.decode:
        good = np.setdiff1d(np.arange(len(files)), list(problems))
        problems |= {int(good[each.position]): each.problem for each in decode_many(files.take(good)) if each.problem}
    sizes = inspection.sizes.copy()
    sizes[list(problems)] = -1
    copies = exact_copies(files, sizes, np.arange(len(files)))
    problems |= copies.unreadable
    data.left_out |= {data.paths[index]: reason for index, reason in sorted(problems.items())}
    together = []
    for group in copies.groups:
        if len({int(data.labels[index]) for index in group}) > 1:
            names = ", ".join(data.paths[index] for index in group[:3])
            data.left_out |= {data.paths[index]: f"the same file is in several classes ({names})" for index in group}
        together.append(group)
    kept = [index for index, path in enumerate(data.paths) if path not in data.left_out]
    number_of = {index: number for number, index in enumerate(kept)}
    data.paths, data.labels = [data.paths[index] for index in kept], data.labels[kept]
    present = np.unique(data.labels)
    empty = [name for label, name in enumerate(data.class_names) if label not in set(present.tolist())]
    if empty:
        data.notes.append(f"{_some(empty)} left out: no image that can be read")
    if len(present) < 2:
        given = f"{request.folder} has images of {len(present)} classes"
        raise UserError(f"{given}; give at least two class folders with images")
    data.class_names = [data.class_names[label] for label in present]
    data.labels = np.searchsorted(present, data.labels)
    together = [[number_of[index] for index in group if index in number_of] for group in together]
    together = [group for group in together if len(group) > 1]
    if together:
        data.notes.append(f"{len(together):,} files have copies in the same class; copies are kept in one split")
    return together


def _some(names: list[str]) -> str:
    """A number of classes and the first of their names."""
    shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({shown})"


def _files(request: NewRequest, data: NewData) -> Mapping[str, bytes]:
    """Name of a file → its content."""
    name = config_name(request.folder)
    config: dict[str, object] = {"dataset": "ImageList", "root": str(data.root)}
    config |= {f"{split}_list": f"{split}.txt" for split in data.splits()}
    config |= {"classnames": "classnames.txt", "many_above": request.many_above, "few_below": request.few_below}
    groups = f", groups {request.groups}" if request.groups else ""
    counts = data.counts("train")
    header = (
        f"# {len(counts)} classes of {data.root.name}, {counts.min():,} … {counts.max():,} training images each; "
        f"made by data new, seed {request.seed}{groups}"
    )
    header = " ".join(header.split())
    text = {f"{name}.yaml": f"{header}\n{yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}"}
    for split in data.splits():
        positions = np.flatnonzero(data.split_of == split)
        text[f"{split}.txt"] = "".join(f"{data.paths[i]} {data.labels[i]}\n" for i in positions)
    text["classnames.txt"] = "".join(f"{each}\n" for each in data.class_names)
    if data.left_out:
        lines = (f"{' '.join(path.split())}\t{reason}\n" for path, reason in data.left_out.items())
        text["left_out.txt"] = "".join(lines)
    files = {file: content.encode(errors="backslashreplace") for file, content in text.items()}
    title = f"{name}: {int(counts.sum()):,} training images"
    return files | {"class_counts.png": class_curve(counts, request.many_above, request.few_below, title)}


def split_command(folder: Path | str) -> str:
    """The command that makes a data config of a folder of images, as text to copy."""
    return f"{program()} data new {shlex.quote(str(folder))}"


def config_name(folder: Path) -> str:
    """Name of the data config for a folder: its name, or that of the folder above `train`.

    Args:
        folder: the folder of the images.
    """
    path = Path(os.path.abspath(folder))
    return plain_name(path.parent.name if path.name in SPLITS else path.name)


def _write(output: Path, files: Mapping[str, bytes]) -> None:
    """Write the folder completely or not at all."""
    try:
        with atomic_folder(output) as folder:
            for name, content in files.items():
                with atomic_file(folder / name) as file:
                    file.write(content)
    except OSError as error:
        raise cannot_write(output, error) from error


def _summary(request: NewRequest, data: NewData) -> str:
    lines = [f"{request.output}: {len(data.class_names)} classes of {data.root}"]
    for split in data.splits():
        counts = data.counts(split)
        lines.append(f"  {split}: {counts.sum():,} images, {counts.min():,} … {counts.max():,} of each class")
    masks = shot_masks(data.counts("train"), request.many_above, request.few_below)
    numbers = [f"{int(mask.sum())} {LABELS[key]}" for key, mask in masks.items()]
    lines.append(f"  classes: {', '.join(numbers)}; the curve is in class_counts.png")
    lines += [f"  note: {note}" for note in data.notes]
    if data.left_out:
        lines.append(f"  left out: {len(data.left_out):,} images (left_out.txt)")
        lines += [f"    {path}: {reason}" for path, reason in list(data.left_out.items())[:SHOWN]]
    return "\n".join(lines)
