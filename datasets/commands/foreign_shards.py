"""`data shard FOLDER --index-only`: makes the index of tar files in WebDataset's format that are there already."""

import json
import re
import tarfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from tailtune.configs.errors import UserError, printable
from tailtune.datasets.commands.result_files import cannot_write
from tailtune.datasets.commands.shard import summary, write_indexes, yaml_name
from tailtune.datasets.images.image_files import EXTENSIONS, HEADER_BYTES, format_of
from tailtune.datasets.images.regular_files import NotARegularFile, file_size
from tailtune.datasets.sources.image_list import MAX_LABEL, classes_without_image
from tailtune.datasets.sources.path_list import PathList
from tailtune.datasets.sources.shard_index import Shard, ShardIndex, index_name

SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Word in the name of a tar file → its split."""
JSON_LABELS = ("label", "cls", "target")
"""Fields of a member `.json` that may hold the label."""
MAX_LABEL_BYTES = 1 << 20
"""Largest member that is read for its label."""


class _Image(NamedTuple):
    name: str
    offset: int
    size: int
    crc32: int


@dataclass
class _Sample:
    """The members of one key."""

    image: _Image | None = None
    label: int | None = None


def index_folder(folder: Path, values: Mapping[str, Any]) -> str:
    """Write an index for the tar files of a folder, and the YAML that trains from them. The tar files are only read.

    Args:
        folder: holds `train-….tar`, and perhaps `val-….tar` and `test-….tar`. Without `test`, `val` is the test split.
        values: further options for the YAML.

    Returns:
        What was written, for the terminal.

    Raises:
        UserError: there is no tar file, one is damaged or holds other things, or the index exists already.
    """
    by_split = _tar_files(folder)
    name = yaml_name(folder.resolve().name)
    for file in (*map(index_name, by_split), name):
        if (folder / file).exists():
            raise UserError(f"{folder / file} exists already: remove it, and the index is written anew")
    read = {split: _read_split(files) for split, files in by_split.items()}
    _check_names(read.values())
    num_classes = _number_of_classes(folder, {split: rows.labels for split, rows in read.items()})
    class_names = tuple(f"class {label}" for label in range(num_classes))
    indexes = [
        ShardIndex(split, rows.shards, tuple(read), class_names, PathList(rows.paths), rows.labels, *rows.columns)
        for split, rows in read.items()
    ]
    try:
        write_indexes(folder, indexes, name, {"dataset": "Shards", "root": ".", **values})
    except OSError as error:
        raise cannot_write(folder, error) from error
    return summary(folder, indexes)


def _tar_files(folder: Path) -> dict[str, list[Path]]:
    """The tar files of each split, by the words in their names."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; --index-only takes the folder of the tar files")
    files = sorted(path for path in folder.iterdir() if path.suffix == ".tar" and not path.name.startswith("."))
    if not files:
        raise UserError(f"{folder} holds no file *.tar; unpack compressed ones (.tar.gz) first")
    split_of = {path: _split_word(path.name) for path in files}
    if not any(split_of.values()):
        split_of = dict.fromkeys(files, "train")
    by_split: dict[str, list[Path]] = {}
    for path, split in split_of.items():
        if split is None:
            raise UserError(f"{path}: its name has none of the words train, val and test; rename it, or move it away")
        by_split.setdefault(split, []).append(path)
    if "val" in by_split and "test" not in by_split:
        by_split["test"] = by_split.pop("val")
    if "train" not in by_split:
        raise UserError(f"{folder} holds no tar file of training images; `train` must be in the names of theirs")
    return by_split


def _split_word(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


@dataclass
class _Rows:
    """What the tar files of one split hold."""

    shards: list[Shard]
    paths: list[str]
    labels: np.ndarray
    columns: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    """Shard, offset, size and CRC-32 of each image."""


def _read_split(files: list[Path]) -> _Rows:
    """Read the tar files of one split."""
    shards, paths, labels, numbers = [], list[str](), list[int](), list[tuple[int, int, int, int]]()
    for number, path in enumerate(files):
        try:
            size = file_size(path)
            for image, label in _samples(path, size):
                paths.append(image.name)
                labels.append(label)
                numbers.append((number, image.offset, image.size, image.crc32))
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{path} is no tar file, or damaged ({error}): copy it again") from error
        except (NotARegularFile, OSError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        shards.append(Shard(path.name, size))
    if not paths:
        raise UserError(f"{files[0]} and the other tar files of its split hold no image")
    shard, offset, length, crc32 = np.array(numbers, dtype=np.int64).T
    return _Rows(shards, paths, np.array(labels, dtype=np.int64), (shard, offset, length, crc32))


def _samples(path: Path, size: int) -> Iterator[tuple[_Image, int]]:
    """The images of a tar file and their labels. The members of a key stand one after another."""
    current, sample, end = "", _Sample(), 0
    bar = tqdm(total=size, desc=path.name, delay=2, leave=False, unit="B", unit_scale=True, disable=None)
    with tarfile.open(path, "r:") as tar, bar:
        for member in tar:
            end = member.offset_data + (
                -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if member.isreg() else 0
            )
            bar.update(end - bar.n)
            if not member.isreg() or member.sparse is not None:
                continue
            key, extension = _key_and_extension(member.name)
            if key != current:
                if current:
                    yield _complete(path, current, sample)
                current, sample = key, _Sample()
            _add(path, tar, member, extension, sample)
            # tarfile keeps every member, which would take much memory.
            tar.members.clear()  # type: ignore[attr-defined]
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes half a header for the end
            raise tarfile.ReadError("it is cut short")
    if current:
        yield _complete(path, current, sample)


def _key_and_extension(name: str) -> tuple[str, str]:
    """WebDataset's key and extension of a member: the extension begins at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", f".{extension.lower()}"


def _add(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, sample: _Sample) -> None:
    """Add a member to its sample; members of other kinds are left out."""
    is_image = extension in EXTENSIONS
    if not is_image and (extension not in (".cls", ".json") or member.size > MAX_LABEL_BYTES):
        return
    file = tar.extractfile(member)
    assert file is not None, "it is a regular file"
    content, where = file.read(), f"{path}: {printable(member.name)}"
    if len(content) != member.size:
        raise tarfile.ReadError("it ends before its last member does")
    if not is_image:
        found = _label(content, extension)
        if None not in (found, sample.label) and found != sample.label:
            raise UserError(f"{where} has label {found}, but its key has label {sample.label} already; keep one")
        sample.label = found if found is not None else sample.label
        return
    if sample.image:
        raise UserError(f"{where} is a second image of the same key; keep one")
    if format_of(content[:HEADER_BYTES]) is None:
        raise UserError(f"{where} is no image: replace it, or take it out")
    sample.image = _Image(member.name, member.offset_data, member.size, zlib.crc32(content))


def _label(content: bytes, extension: str) -> int | None:
    """The label that a member `.cls` or `.json` holds; None if it holds none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if extension == ".json":
        value = next((value[name] for name in JSON_LABELS if name in value), None) if isinstance(value, dict) else None
    return value if type(value) is int and 0 <= value <= MAX_LABEL else None


def _complete(path: Path, key: str, sample: _Sample) -> tuple[_Image, int]:
    where = f"{path}: key {printable(key)}"
    if sample.image is None:
        raise UserError(f"{where} has no image ({' '.join(EXTENSIONS[:5])} …)")
    if sample.label is None:
        raise UserError(
            f"{where} has no label: a member .cls with a whole number from 0, or .json with one in the field label"
        )
    return sample.image, sample.label


def _check_names(splits: Collection[_Rows]) -> None:
    """Put the name of its tar file before the name of each image if two have the same, as where each file counts anew.

    A run knows an image again by its name.
    """
    names = [name for rows in splits for name in rows.paths]
    if len(set(names)) < len(names):
        for rows in splits:
            files = (rows.shards[number].name for number in rows.columns[0].tolist())
            rows.paths = [f"{file}/{name}" for file, name in zip(files, rows.paths, strict=True)]


def _number_of_classes(folder: Path, labels: Mapping[str, np.ndarray]) -> int:
    """One more than the largest label. Each class needs a training image: no mistyped label makes a million classes."""
    largest = max(int(each.max()) for each in labels.values())
    gap, missing = classes_without_image(labels["train"], largest)
    if not missing:
        return largest + 1
    raise UserError(
        f"{folder}: label {largest} makes {largest + 1} classes, {missing} of them without a "
        f"training image (first: label {gap}); labels must count from 0 without gaps"
    )
