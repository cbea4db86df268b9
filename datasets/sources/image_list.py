"""Images listed in text files (`relative/path label` a line), and the other files that users write about data."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tailtune.configs.errors import UserError, lookup, naming
from tailtune.datasets.images.regular_files import NoFile, size_of
from tailtune.datasets.sources.image_sources import MissingData
from tailtune.datasets.sources.listing import Listing
from tailtune.datasets.sources.published_lists import PUBLISHED, blob_id, published_at
from tailtune.datasets.sources.text_files import numbered_lines, read_json

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INAT_MEAN, INAT_STD = (0.466, 0.471, 0.380), (0.195, 0.194, 0.192)

TAXA = ("name", "genus", "family", "order", "class", "phylum", "kingdom")
CATEGORIES = "categories.json"
MAX_LABEL = 9_999_999
"""What a list file may hold; a larger number is a mistake, and nothing is allocated by it."""

log = logging.getLogger("tailtune")


def find_list(name: str, folders: Sequence[Path]) -> Path:
    """The file in the first folder that has it.

    Raises:
        UserError: in none; a published list is named with its checksum and source.
    """
    if found := first_file(name, folders):
        return found
    tried = ", ".join(_tried(folder / name) for folder in folders)
    message = f"list file not found: {tried} (set `lists` to the folder that holds it)"
    if place := published_at(Path(name).name):
        message += f"; it is {place}"
    raise MissingData(message)


def load_list(key: str, name: str, folders: Sequence[Path]) -> Listing:
    """The list file that an option names. Raises `UserError` as `find_list` and `read_list`, with the option's name."""
    with naming(key):
        return read_list(find_list(name, folders))


def first_file(name: str, folders: Sequence[Path]) -> Path | None:
    """The file in the first folder that has it."""
    return next((folder / name for folder in folders if not _problem(folder / name)), None)


def read_list(file: Path) -> Listing:
    """Parse a list file: a path, blanks or tabs, a label. Empty lines are skipped; paths may hold blanks.

    An image that is listed again counts again, and is warned of; with two labels it is refused.

    Raises:
        UserError: not text, no line at all, a line without a label from 0 to `MAX_LABEL`, or an image with two labels.
    """
    paths: list[str] = []
    labels: list[int] = []
    lines: list[int] = []
    first: dict[str, int] = {}
    for number, line in numbered_lines(file):
        if not line:
            continue
        path, label = _parse(line, file, number)
        at = first.setdefault(path, len(paths))
        if at < len(paths) and labels[at] != label:
            raise UserError(f"{file} line {number}: {path} has label {label}, and {labels[at]} in line {lines[at]}")
        paths.append(path)
        labels.append(label)
        lines.append(number)
    if not paths:
        raise UserError(f"{file} lists no image")
    if again := len(paths) - len(first):
        log.warning("%s: %d lines list an image that an earlier line lists; each counts as an image", file, again)
    _check_blob(file)
    return Listing(file, paths, np.array(labels, dtype=np.int64), lines)


def number_of_classes(train: Listing, others: Sequence[Listing], wanted: int | None) -> int:
    """The number of classes: `wanted`, or as many as the labels need.

    Raises:
        UserError: some of these would have no training image, so that one mistyped label makes no million classes.
    """
    if wanted is not None:
        if wanted > len(train.paths):
            raise UserError(f"num_classes {wanted}: {train.file} lists only {len(train.paths)} images")
        return wanted
    last = max((train, *others), key=lambda each: each.labels.max())
    largest, present = int(last.labels.max()), np.unique(train.labels)
    if largest < len(present):
        return largest + 1
    gap = next(label for label in range(len(present) + 1) if label == len(present) or present[label] != label)
    raise UserError(
        f"{last.file} line {last.lines[int(last.labels.argmax())]}: label {largest} makes {largest + 1} classes, and "
        f"{largest + 1 - len(present)} of them have no image in {train.file}, the first one label {gap}; labels count "
        "from 0 without gaps"
    )


def read_names(file: Path) -> tuple[str, ...]:
    """Class names, one a line, in label order; empty lines may only follow the last one.

    Raises:
        UserError: not a text file, or an empty line between names, where the label of what follows is uncertain.
    """
    names: list[str] = []
    empty = 0
    for number, line in numbered_lines(file):
        if line and empty:
            raise UserError(f"{file} line {empty} is empty: one class name a line, in the order of the labels")
        empty = empty if line or empty else number
        names += [line] if line else []
    if not names:
        raise UserError(f"classnames: {file} holds no name of a class")
    return tuple(names)


def imagenet_names() -> tuple[str, ...]:
    """CLIP's curated names of the 1000 ImageNet classes; 998 are distinct ("missile", "sunglasses" occur twice)."""
    from open_clip import IMAGENET_CLASSNAMES  # takes seconds to import, and only these data need it

    return tuple(IMAGENET_CLASSNAMES)


def folder_names(listing: Listing, num_classes: int) -> tuple[str, ...] | None:
    """The folder that holds all images of a class, for every class; None unless the data are laid out like that.

    For Places-LT this is better than the list of names that LIFT ships, where six scenes stand at others' labels
    (sorting swapped `desert_road` with `desert-sand`, `field_road` with `field-wild`, …).
    """
    names: dict[int, set[str]] = {}
    for path, label in zip(listing.paths, listing.labels.tolist(), strict=True):
        names.setdefault(label, set()).add(_scene(path))
    found = [names.get(label, set()) for label in range(num_classes)]
    flat = tuple(name for each in found for name in each)
    return flat if all(len(each) == 1 for each in found) and len(set(flat)) == num_classes else None


def taxon_labels(categories: Path, label_field: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """iNaturalist 2018: category id → label, and the class names.

    `id` keeps the ids, named by species. A taxon's label is the rank of its string among the sorted unique strings
    (LIFT, field `name`): homonyms merge, "NA" is a taxon.

    Args:
        categories: categories.json of the data set, a list of records.
        label_field: `id` or an entry of `TAXA`.

    Returns:
        int64 [ids], names [C].

    Raises:
        UserError: unknown field, or another kind of file.
    """
    field = "name" if label_field == "id" else lookup({taxon: taxon for taxon in TAXA}, label_field, "label_field")
    try:
        records = sorted(read_json(categories, "label_field"), key=lambda record: record["id"])
        values = [str(record[field]) for record in records]
        ids = [record["id"] for record in records]
    except (TypeError, KeyError) as error:
        raise UserError(f"{categories}: expected iNaturalist's list of records with 'id' and '{field}'") from error
    if not records:
        raise UserError(f"{categories} lists no category")
    if ids != list(range(len(ids))):
        raise UserError(f"{categories}: the ids are not 0 … {len(ids) - 1}")
    if label_field == "id":
        return np.arange(len(ids)), tuple(values)
    names = sorted(set(values))
    rank = {name: label for label, name in enumerate(names)}
    return np.array([rank[value] for value in values], dtype=np.int64), tuple(names)


def read_counts(file: Path, label_field: str) -> list[int]:
    """Images per class from a JSON file: a list of numbers, or one such list for each label field.

    Raises:
        UserError: another kind of file.
    """
    content = read_json(file, "class_counts")
    counts = lookup(content, label_field, "label_field") if isinstance(content, dict) else content
    known = isinstance(counts, list) and 0 < len(counts) <= MAX_LABEL
    if not known or any(type(count) is not int or not 0 <= count < 2**31 for count in counts):
        raise UserError(f"class_counts: {file} must hold a list of whole numbers, the training images of each class")
    return counts


def _parse(line: str, file: Path, number: int) -> tuple[str, int]:
    """(path, label) of a line of a list file."""
    path, _, label = line.replace("\t", " ").rpartition(" ")
    path = line[: len(path)].strip()
    if not path or not (label.isascii() and label.isdecimal()):
        shown = line if len(line) < 200 else f"{line[:200]} …"
        expected = "expected 'relative/path label' with a label from 0"
        raise UserError(f"{file} line {number}: {expected}, got '{shown}'")
    if len(label) > len(str(MAX_LABEL)) or int(label) > MAX_LABEL:
        large = f"label {label[:40]} is above {MAX_LABEL}"
        raise UserError(f"{file} line {number}: {large}; labels count from 0 without gaps")
    return path, int(label)


def _problem(path: Path) -> str:
    """Why there is no regular file at a path; an empty text where there is one."""
    try:
        size_of(path)
    except NoFile as reason:
        return str(reason)
    return ""


def _tried(path: Path) -> str:
    """A path where no file is, with what is there instead."""
    problem = _problem(path)
    return f"{path.absolute()} ({problem})" if problem != "not found" else str(path.absolute())


def _check_blob(file: Path) -> None:
    """Warn if a file has a published name and another content."""
    known = PUBLISHED.get(file.name, ())
    if known and (blob := blob_id(file.read_bytes())) not in known:
        log.warning("%s is not the published list: git blob %s instead of %s", file, blob, known[0])


def _scene(path: str) -> str:
    """Folder of an image; in Places365's small-image layout data_256/b/bazaar/indoor/x.jpg → bazaar-indoor."""
    parts = path.split("/")
    if parts[0] == "data_256":
        return "-".join(parts[2:-1])
    return parts[-2] if len(parts) > 1 else ""
