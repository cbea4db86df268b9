"""Reads list files (one `relative/path label` per line) and the files of class names and class counts."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tailtune.configs.errors import UserError, lookup, prefix_errors
from tailtune.datasets.images.regular_files import NotARegularFile, file_size
from tailtune.datasets.sources.known_layouts import scene_of
from tailtune.datasets.sources.listing import Listing
from tailtune.datasets.sources.named_source import MissingData
from tailtune.datasets.sources.path_list import PathList
from tailtune.datasets.sources.published_lists import PUBLISHED, blob_id, published_at
from tailtune.datasets.sources.text_files import numbered_lines, read_json

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

MAX_LABEL = 9_999_999
"""Largest label of a list file. A larger number is a mistake, and must not decide how much memory is allocated."""

log = logging.getLogger("tailtune")


def find_list(name: str, folders: Sequence[Path]) -> Path:
    """Find a list file.

    Args:
        name: path of the file in one of the folders.
        folders: where to look for it.

    Returns:
        The file in the first folder that contains it.

    Raises:
        MissingData: no folder contains it. The message says where a published list can be downloaded.
    """
    if file := first_file(name, folders):
        return file
    tried = ", ".join(_tried(folder / name) for folder in folders)
    message = f"list file not found: {tried} (set `lists` to the folder that holds it)"
    if source := published_at(Path(name).name):
        message += f"; it is {source}"
    raise MissingData(message)


def load_list(key: str, name: str, folders: Sequence[Path]) -> Listing:
    """Read the list file that an option names.

    Args:
        key: the option, which errors name.
        name: its value: path of the file in one of the folders.
        folders: where to look for it.

    Raises:
        UserError: as `find_list` and `read_list`.
    """
    with prefix_errors(key):
        return read_list(find_list(name, folders))


def first_file(name: str, folders: Sequence[Path]) -> Path | None:
    """Find a regular file.

    Args:
        name: path of the file in one of the folders.
        folders: where to look for it.

    Returns:
        The file in the first folder that contains it; None if no folder does.
    """
    return next((folder / name for folder in folders if not _problem(folder / name)), None)


def read_list(file: Path) -> Listing:
    """Read a list file. A line is a path (which may contain blanks), blanks or tabs, and a label.

    Empty lines are skipped. If a path occurs several times, each occurrence counts as an image, with a warning.

    Args:
        file: the file.

    Raises:
        UserError: the file is no text or has no image, a line has no label from 0 to `MAX_LABEL`, or an image has two
            labels.
    """
    paths: list[str] = []
    labels: list[int] = []
    lines: list[int] = []
    first_position: dict[str, int] = {}
    for number, line in numbered_lines(file):
        if not line:
            continue
        path, label = _parse(line, file, number)
        first = first_position.setdefault(path, len(paths))
        if first < len(paths) and labels[first] != label:
            raise UserError(
                f"{file} line {number}: {path} has label {label}, but label {labels[first]} in line {lines[first]}; "
                "remove one of the lines"
            )
        paths.append(path)
        labels.append(label)
        lines.append(number)
    if not paths:
        raise UserError(f"{file} lists no image: each line needs a path and a label")
    if repetitions := len(paths) - len(first_position):
        repeat = f"{repetitions} lines repeat" if repetitions > 1 else "1 line repeats"
        log.warning("warning: %s: %s an image of an earlier line; each line counts as an image", file, repeat)
    _warn_if_changed(file)
    return Listing(file, PathList(paths), np.array(labels, dtype=np.int64), np.array(lines, dtype=np.int32))


def number_of_classes(train: Listing, others: Sequence[Listing], wanted: int | None) -> int:
    """The number of classes of data that are given by list files.

    Args:
        train: the training images.
        others: the lists of the other splits.
        wanted: the option `num_classes`; None: one more than the largest label.

    Raises:
        UserError: some classes have no training image. So a mistyped label does not create a million classes.
    """
    if wanted is not None:
        if wanted > len(train.paths):
            raise UserError(
                f"num_classes {wanted}: {train.file} lists only {len(train.paths)} images; every class needs one"
            )
        return wanted
    last = max((train, *others), key=lambda listing: listing.labels.max())
    largest = int(last.labels.max())
    gap, missing = classes_without_image(train.labels, largest)
    if not missing:
        return largest + 1
    raise UserError(
        f"{last.file} line {last.lines[int(last.labels.argmax())]}: label {largest} makes {largest + 1} classes, "
        f"{missing} of them without an image in {train.file} (first: label {gap}); labels must "
        "count from 0 without gaps"
    )


def classes_without_image(labels: np.ndarray, largest: int) -> tuple[int, int]:
    """The first class from 0 to `largest` that has no training image, and the number of such classes.

    Args:
        labels: labels of the training images, int64 [N], from 0.
        largest: the largest label of any split.
    """
    present = np.unique(labels)
    gap = next(label for label in range(len(present) + 1) if label == len(present) or present[label] != label)
    return gap, largest + 1 - len(present)


def read_names(file: Path) -> tuple[str, ...]:
    """Read class names, one per line in the order of the labels. Empty lines are allowed at the end only.

    Args:
        file: the text file.

    Raises:
        UserError: the file is no text, holds no name, or has an empty line between names.
    """
    names: list[str] = []
    empty_line = 0
    for number, line in numbered_lines(file):
        if line and empty_line:
            raise UserError(f"{file} line {empty_line} is empty: give one class name per line, in the order of labels")
        empty_line = empty_line if line or empty_line else number
        names += [line] if line else []
    if not names:
        raise UserError(f"classnames: {file} holds no class name; give one per line, in the order of labels")
    return tuple(names)


def imagenet_names() -> tuple[str, ...]:
    """CLIP's curated names of the 1000 ImageNet classes. Only 998 are different: "missile" and "sunglasses" repeat."""
    from open_clip import IMAGENET_CLASSNAMES  # imported here because it takes seconds

    return tuple(IMAGENET_CLASSNAMES)


def folder_names(listing: Listing, num_classes: int) -> tuple[str, ...] | None:
    """Class names from the folders of the images.

    For Places-LT these names are better than the file of names that LIFT ships: there six scenes have the names of
    others, because sorting swapped `desert_road` with `desert-sand`, `field_road` with `field-wild`, and others.

    Args:
        listing: the training images.
        num_classes: number of classes C.

    Returns:
        C names; None unless the images of each class are in one folder of their own.
    """
    folders: dict[int, set[str]] = {}
    for path, label in zip(listing.paths, listing.labels.tolist(), strict=True):
        folders.setdefault(label, set()).add(_folder_of(path))
    by_label = [folders.get(label, set()) for label in range(num_classes)]
    names = tuple(name for class_folders in by_label for name in class_folders)
    one_per_class = all(len(class_folders) == 1 for class_folders in by_label)
    return names if one_per_class and len(set(names)) == num_classes else None


def read_counts(file: Path, label_field: str) -> list[int]:
    """Read the numbers of training images from a JSON file: a list, or an object with one list per label field.

    Args:
        file: the JSON file.
        label_field: the option; it selects the list of an object.

    Returns:
        Images per class, [C].

    Raises:
        UserError: the file has other content.
    """
    content = read_json(file, "class_counts")
    counts = lookup(content, label_field, "label_field") if isinstance(content, dict) else content
    is_list = isinstance(counts, list) and 0 < len(counts) <= MAX_LABEL
    if not is_list or any(type(count) is not int or not 0 <= count < 2**31 for count in counts):
        raise UserError(f"class_counts: {file} must hold a list of whole numbers, the training images of each class")
    return counts


def _parse(line: str, file: Path, number: int) -> tuple[str, int]:
    """Path and label of a line of a list file."""
    path, _, label = line.replace("\t", " ").rpartition(" ")
    path = line[: len(path)].strip()
    if not path or not (label.isascii() and label.isdecimal()):
        start = line if len(line) < 200 else f"{line[:200]} …"
        expected = "expected 'relative/path label' with a label from 0"
        raise UserError(f"{file} line {number}: {expected}, got '{start}'")
    if len(label) > len(str(MAX_LABEL)) or int(label) > MAX_LABEL:
        too_large = f"label {label[:40]} is above {MAX_LABEL}"
        raise UserError(f"{file} line {number}: {too_large}; labels must count from 0 without gaps")
    return path, int(label)


def _problem(path: Path) -> str:
    """Why there is no regular file at a path; an empty text if there is one."""
    try:
        file_size(path)
    except NotARegularFile as reason:
        return str(reason)
    return ""


def _tried(path: Path) -> str:
    """A path for the message that no file is there, with a reason other than "not found"."""
    problem = _problem(path)
    return f"{path.absolute()} ({problem})" if problem != "not found" else str(path.absolute())


def _warn_if_changed(file: Path) -> None:
    """Warn if a file has the name of a published list, but other content."""
    blob_ids = PUBLISHED.get(file.name, ())
    if blob_ids and (blob := blob_id(file.read_bytes())) not in blob_ids:
        log.warning("warning: %s is not the published list: git blob %s instead of %s", file, blob, blob_ids[0])


def _folder_of(path: str) -> str:
    """Name of an image's folder; in the archives of Places365 its scene."""
    parts = path.split("/")
    return scene_of(path) or (parts[-2] if len(parts) > 1 else "")
