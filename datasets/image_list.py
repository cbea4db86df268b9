"""Images listed in text files (`relative/path label` a line) or laid out in class folders."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torchvision

from configs.errors import UserError, lookup, naming
from datasets.published import PUBLISHED, blob_id, published_at
from datasets.sources import FileSource

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INAT_MEAN, INAT_STD = (0.466, 0.471, 0.380), (0.195, 0.194, 0.192)

TAXA = ("name", "genus", "family", "order", "class", "phylum", "kingdom")
CATEGORIES = "categories.json"

log = logging.getLogger("tailtune")


@dataclass(frozen=True)
class Listing:
    """A list file: N paths relative to the image folder, their labels, and their lines."""

    file: Path | None
    paths: list[str]
    labels: np.ndarray
    lines: list[int]

    def source(self, root: Path) -> FileSource:
        """Its images below `root`, whichever of Places365's two layouts that holds. Raises `UserError` for none."""
        paths = [_small_places(path) for path in self.paths] if (root / "data_256").is_dir() else self.paths
        source = FileSource(root, paths, self.labels, self.file, self.lines)
        source.check_root()
        return source

    def take(self, positions: np.ndarray) -> "Listing":
        """The images at these positions."""
        lines = [self.lines[i] for i in positions] if self.lines else []
        return Listing(self.file, [self.paths[i] for i in positions], self.labels[positions], lines)

    def positions_in(self, whole: "Listing") -> np.ndarray:
        """Where in another list its images are, whichever of Places365's two layouts either one names; int64 [N].

        Raises:
            UserError: an image that is not there, or is here twice.
        """
        known = {image: position for position, image in enumerate(whole._images())}
        found: dict[int, None] = {}
        for number, image in enumerate(self._images()):
            position = known.get(image)
            if position is None or position in found:
                reason = "is listed twice" if position in found else f"with this label is not in {whole.file}"
                raise UserError(f"{self.file} line {self.lines[number]}: {self.paths[number]} {reason}")
            found[position] = None
        return np.array([*found], dtype=np.int64)

    def _images(self) -> list[tuple[str, int]]:
        return [(_small_places(path), label) for path, label in zip(self.paths, self.labels.tolist(), strict=True)]

    def relabel(self, new_label: np.ndarray) -> "Listing":
        """Labels replaced by `new_label[label]`. Raises `UserError` for a label outside the table."""
        self.check_labels(len(new_label))
        return Listing(self.file, self.paths, new_label[self.labels], self.lines)

    def check_labels(self, num_classes: int) -> None:
        """Raise a `UserError` with file and line for the first label outside 0 … num_classes − 1."""
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= num_classes))
        if len(wrong):
            first = wrong[0]
            line = f"{self.file} line {self.lines[first]}"
            raise UserError(f"{line}: label {self.labels[first]} is not in 0 … {num_classes - 1} (`num_classes`)")


def find_list(name: str, folders: Sequence[Path]) -> Path:
    """The file in the first folder that has it.

    Raises:
        UserError: in none; a published list is named with its checksum and source.
    """
    if found := first_file(name, folders):
        return found
    tried = ", ".join(str((folder / name).absolute()) for folder in folders)
    message = f"list file not found: {tried} (set `lists` to the folder that holds it)"
    if place := published_at(Path(name).name):
        message += f"; it is {place}"
    raise UserError(message)


def load_list(key: str, name: str, folders: Sequence[Path]) -> Listing:
    """The list file that an option names. Raises `UserError` as `find_list` and `read_list`, with the option's name."""
    with naming(key):
        return read_list(find_list(name, folders))


def first_file(name: str, folders: Sequence[Path]) -> Path | None:
    """The file in the first folder that has it."""
    # `Path.is_file` raises where a name is too long to be one
    return next((folder / name for folder in folders if os.path.isfile(folder / name)), None)


def read_list(file: Path) -> Listing:
    """Parse a list file; empty lines are skipped.

    Raises:
        UserError: not text, no line at all, or a line without an integer label.
    """
    data = file.read_bytes()
    _check_blob(file, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a text file in UTF-8") from None
    paths, labels, lines = [], [], []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        path, _, label = line.strip().replace("\t", " ").rpartition(" ")
        if not path or not label.isdecimal():
            raise UserError(f"{file} line {number}: expected 'relative/path label' with a label from 0, got '{line}'")
        paths.append(path.strip())
        labels.append(int(label))
        lines.append(number)
    if not paths:
        raise UserError(f"{file} lists no image")
    return Listing(file, paths, np.array(labels, dtype=np.int64), lines)


def read_folder(root: Path, split: str, class_names: Sequence[str]) -> Listing:
    """`root/<split>/<class>/**`: all images below the class folders, sorted.

    Raises:
        UserError: a class folder that is not among `class_names`, or no image at all.
    """
    folder = root / split
    for name in class_folders(folder):
        if name not in class_names:
            raise UserError(f"{folder / name}: '{name}' is no class, since {root / 'train'} has no such folder")
    found = torchvision.datasets.folder.make_dataset(
        str(folder),
        {name: index for index, name in enumerate(class_names)},
        extensions=torchvision.datasets.folder.IMG_EXTENSIONS,
        allow_empty=True,
    )
    if not found:
        raise UserError(f"no images in the class folders of {folder.absolute()}")
    paths = [Path(path).relative_to(root).as_posix() for path, _ in found]
    return Listing(None, paths, np.array([label for _, label in found], dtype=np.int64), [])


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders, sorted. Raises `UserError` when there is no folder, or none in it."""
    if not folder.is_dir():
        raise UserError(f"image folder not found: {folder.absolute()} (`root` must hold train/<class>/…)")
    names = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    if not names:
        raise UserError(f"no class folders in {folder.absolute()} (`root` must hold train/<class>/…)")
    return names


def read_names(file: Path) -> tuple[str, ...]:
    """Class names, one a line, in label order. Raises `UserError` for a file that is not text."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a text file in UTF-8") from None
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names:
        raise UserError(f"{file} holds no name of a class")
    return names


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
        records = sorted(json.loads(categories.read_text(encoding="utf-8")), key=lambda record: record["id"])
        values = [str(record[field]) for record in records]
        ids = [record["id"] for record in records]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{categories}: expected iNaturalist's list of records with 'id' and '{field}'") from error
    if ids != list(range(len(ids))):
        raise UserError(f"{categories}: the ids are not 0 … {len(ids) - 1}")
    if label_field == "id":
        return np.arange(len(ids)), tuple(values)
    names = sorted(set(values))
    rank = {name: label for label, name in enumerate(names)}
    return np.array([rank[value] for value in values], dtype=np.int64), tuple(names)


def _check_blob(file: Path, data: bytes) -> None:
    """Warn if a file has a published name and another content."""
    known = PUBLISHED.get(file.name, ())
    blob = blob_id(data)
    if known and blob not in known:
        log.warning("%s is not the published list: git blob %s instead of %s", file, blob, known[0])


def _scene(path: str) -> str:
    """Folder of an image; in Places365's small-image layout data_256/b/bazaar/indoor/x.jpg → bazaar-indoor."""
    parts = path.split("/")
    if parts[0] == "data_256":
        return "-".join(parts[2:-1])
    return parts[-2] if len(parts) > 1 else ""


def _small_places(path: str) -> str:
    """train/<scene>/x.jpg in Places365's small-image layout (any other path stays)."""
    parts = path.split("/")
    if len(parts) != 3 or parts[0] not in ("train", "val"):
        return path
    split, scene, name = parts
    return f"val_256/{name}" if split == "val" else f"data_256/{scene[0]}/{scene.replace('-', '/')}/{name}"
