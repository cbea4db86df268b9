"""Splits of a run and their records, by which a run stores which images it used.

The record of a split has the relative path, label and file size of each image, and a digest of those as fingerprint.
Data that come with a library have no files that could change; their record is only a name.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from tailtune.configs.errors import prefix_errors
from tailtune.datasets.sources.image_sources import Source
from tailtune.datasets.sources.named_source import NamedSource
from tailtune.datasets.sources.path_list import PathList

SIZE, CONTENT = "size", "content"
"""Kinds of fingerprints, values of the option `data_fingerprint`: besides paths and labels they cover the sizes of the
files, or their sizes and contents."""
CLASS_NAMES = "class_names.json"
"""File of a run's folder `splits/`."""
THREADS = 16
"""Threads that read files for fingerprints."""


@dataclass(frozen=True)
class Record:
    """The images of a split, in its order."""

    fingerprint: str
    """`size:<digest>`, `content:<digest>`, or `built-in:<name>`."""
    paths: Sequence[str] = ()
    """Relative paths, [N]; empty for built-in data, as are labels and sizes."""
    labels: Sequence[int] = ()
    """[N]."""
    sizes: Sequence[int] = ()
    """Sizes of the files in bytes, [N]."""

    @classmethod
    def built_in(cls, name: str) -> "Record":
        """The record of data that come with a library.

        Args:
            name: the option `dataset`.
        """
        return cls(f"built-in:{name}")

    @classmethod
    def of(cls, source: NamedSource, indices: np.ndarray, sizes: np.ndarray, kind: str = SIZE) -> "Record":
        """The record of some images of a source.

        Args:
            source: the images.
            indices: positions in the source, [N].
            sizes: sizes of these images in bytes, [N].
            kind: `size` or `content`; for `content` every image is read.

        Raises:
            UserError: an image cannot be read.
        """
        paths, labels = source.paths.at(indices), source.labels[indices]
        contents = [""] * len(paths)
        if kind == CONTENT:
            with ThreadPoolExecutor(THREADS) as pool, prefix_errors("data_fingerprint content"):
                contents = list(pool.map(source.sha256, indices.tolist()))
        fingerprint = _fingerprint(kind, paths, labels.tolist(), sizes.tolist(), contents)
        return cls(fingerprint, paths, _compact(labels), _compact(sizes))

    @property
    def kind(self) -> str:
        """Kind of the fingerprint: `size`, `content` or `built-in`."""
        return self.fingerprint.partition(":")[0]

    def path_sizes(self) -> Iterator[tuple[str, int]]:
        """Pairs of path and size."""
        return zip(self.paths, self.sizes, strict=True)

    def labels_and_sizes(self) -> dict[str, tuple[int, int]]:
        """Path → label and size."""
        return dict(zip(self.paths, zip(self.labels, self.sizes, strict=True), strict=True))


def _compact(numbers: np.ndarray) -> Sequence[int]:
    """Whole numbers [N] in 8 bytes each. Unlike an array of NumPy it can be compared by `==`."""
    return array("q", numbers.astype(np.int64).tobytes())


def _fingerprint(
    kind: str, paths: Sequence[str], labels: Sequence[int], sizes: Sequence[int], contents: Sequence[str]
) -> str:
    """A fingerprint that does not depend on the order of the images."""
    digest = hashlib.sha256()
    for line in sorted(zip(paths, labels, sizes, contents, strict=True)):
        digest.update(json.dumps(line).encode())
    return f"{kind}:{digest.hexdigest()[:32]}"


@dataclass(frozen=True)
class Split:
    """Some images of a source."""

    source: Source
    indices: np.ndarray
    """Positions in the source, int64 [N]."""
    sizes: np.ndarray | None = None
    """Sizes of the files in bytes, int64 [N]; None before they are inspected, and for built-in data."""

    def take(self, positions: np.ndarray) -> "Split":
        """The images at the given positions of the split.

        Args:
            positions: int64 [n].
        """
        sizes = None if self.sizes is None else self.sizes[positions]
        return Split(self.source, self.indices[positions], sizes)

    def paths(self) -> Sequence[str]:
        """Relative paths of the images, [N]; empty for built-in data."""
        return self.source.paths.at(self.indices) if isinstance(self.source, NamedSource) else ()


@dataclass(frozen=True)
class ChosenSplits:
    """The splits of a run, and the images that are in none of them."""

    by_name: dict[str, Split]
    """`train`, `test`, and `val` if there is one → the images."""
    unused: tuple[str, ...]
    """Paths of training images that existed when the run stored its splits, and that no split took."""
    new: tuple[str, ...]
    """Paths of training images that were added after that."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Path of an image that cannot be read → the reason."""
    left_out: int = 0
    """Number of unreadable images that are left out of training."""
    class_names: tuple[str, ...] = ()
    """C names in the order of the labels."""

    def has(self, path: str) -> bool:
        """Whether the image of a path is there, also if it is in no split; false for built-in data.

        Args:
            path: as the lists of a run name it.
        """
        return any(source.has(path) for source in self._sources())

    def read(self, path: str) -> bytes:
        """The encoded image of a path.

        Args:
            path: as for `has`.

        Raises:
            OSError: it is not there or cannot be read.
        """
        for source in self._sources():
            if source.has(path):
                return source.read(path)
        raise FileNotFoundError(path)

    def _sources(self) -> Iterator[NamedSource]:
        return (split.source for split in self.by_name.values() if isinstance(split.source, NamedSource))


@dataclass(frozen=True)
class StoredSplits:
    """The splits that a run was trained and evaluated with, as it stored them in its folder."""

    records: Mapping[str, Record]
    """`train`, `test`, and `val` if there is one → its images."""
    unused: tuple[str, ...]
    """Paths of images that no split took."""
    unreadable: Mapping[str, str]
    """Path of an image that was left out → the reason."""
    class_names: tuple[str, ...] = ()
    """C names in the order of the labels; empty if the run has not stored them, as runs of earlier versions."""
    of_earlier: bool = False
    """Whether an earlier stage has stored them: its held-out images stay held out, and this run chooses the others."""


def split_files(
    records: Mapping[str, Record], unused: Sequence[str], unreadable: Mapping[str, str], class_names: Sequence[str]
) -> dict[str, bytes]:
    """The files of a run's folder `splits/`: lists with lines of `path label`, `splits.json` and `class_names.json`.

    Args:
        records: name of a split → its record.
        unused: paths of images that no split took.
        unreadable: path of an image that was left out → the reason.
        class_names: C names in the order of the labels.

    Returns:
        Name of a file → its content.
    """
    lists = {
        f"{name}.txt": [f"{path} {label}" for path, label in zip(record.paths, record.labels, strict=True)]
        for name, record in records.items()
        if record.paths
    }
    lists |= {"unused.txt": [path for path in unused if "\n" not in path]} if unused else {}
    lists |= {"unreadable.txt": [f"{path}\t{reason}" for path, reason in unreadable.items()]} if unreadable else {}
    facts = {name: {"fingerprint": record.fingerprint, "sizes": list(record.sizes)} for name, record in records.items()}
    files = {name: "".join(f"{line}\n" for line in lines) for name, lines in lists.items()}
    files["splits.json"] = json.dumps(facts) + "\n"
    files[CLASS_NAMES] = json.dumps(list(class_names), indent=1) + "\n"
    return {name: text.encode(errors="surrogateescape") for name, text in files.items()}


def parse_splits(files: Mapping[str, bytes]) -> StoredSplits:
    """Read the files that `split_files` made.

    Args:
        files: name of a file → its content.

    Raises:
        ValueError: a file has other content.
        KeyError: `splits.json` is missing or incomplete.
    """

    def lines(name: str) -> Iterator[str]:
        return iter(files.get(name, b"").decode(errors="surrogateescape").split("\n")[:-1])

    records = {}
    for name, facts in json.loads(files["splits.json"]).items():
        pairs = [line.rpartition(" ")[::2] for line in lines(f"{name}.txt")]
        paths, labels = PathList(path for path, _ in pairs), array("q", (int(label) for _, label in pairs))
        records[name] = Record(facts["fingerprint"], paths, labels, array("q", facts["sizes"]))
    unreadable = [line.rpartition("\t")[::2] for line in lines("unreadable.txt")]
    names = json.loads(files.get(CLASS_NAMES, b"[]"))
    return StoredSplits(records, tuple(lines("unused.txt")), dict(unreadable), tuple(names))


def positions_in_source(paths: Sequence[str], source: Source) -> np.ndarray:
    """The positions of paths in a source. If a path is there several times, each time stands for another position.

    Args:
        paths: N relative paths.
        source: a source of images with paths.

    Returns:
        int64 [N], without repetitions; −1 for a path that the source does not have, or not so often.
    """
    assert isinstance(source, NamedSource), "built-in data have no lists"
    position_of: dict[str, int] = {}
    repeated: dict[str, list[int]] = {}
    for position, path in enumerate(source.paths):
        if position_of.setdefault(path, position) != position:
            repeated.setdefault(path, []).append(position)

    def taken(path: str) -> int:
        position = position_of.pop(path, -1)
        if later := repeated.get(path):
            position_of[path] = later.pop(0)
        return position

    return np.array([taken(path) for path in paths], dtype=np.int64)
