"""Which images a split is made of: written down beside a trained model, and compared with what is found later.

A record is a list of relative paths and labels with the sizes of the files; its fingerprint is a digest of those. Data
that come with a library have no files of the user's and cannot change; their record is a name.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tailtune.configs.errors import UserError
from tailtune.datasets.sources.image_sources import FileSource, Source

SIZE, CONTENT = "size", "content"
"""What of a file a fingerprint is made of, besides its path and label: entries of option `data_fingerprint`."""
THREADS = 16


@dataclass(frozen=True)
class Record:
    """The images of a split, in its order."""

    fingerprint: str
    """`size:…`, `content:…`, or `built-in:<name>`."""
    paths: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    """Bytes."""

    @classmethod
    def built_in(cls, name: str) -> "Record":
        return cls(f"built-in:{name}")

    @classmethod
    def of(cls, source: FileSource, indices: np.ndarray, sizes: np.ndarray, kind: str = SIZE) -> "Record":
        """The record of some images of a source.

        Args:
            indices: positions in the source [N].
            sizes: of these images, in bytes [N].
            kind: `size` or `content`; the second reads every file.
        """
        paths = tuple(source.paths[i] for i in indices)
        labels, lengths = source.labels[indices].tolist(), sizes.tolist()
        files = [source.root / path for path in paths] if kind == CONTENT else []
        return cls(_fingerprint(kind, paths, labels, lengths, files), paths, tuple(labels), tuple(lengths))

    @property
    def kind(self) -> str:
        return self.fingerprint.partition(":")[0]

    def lengths(self) -> Iterator[tuple[str, int]]:
        """Paths with their sizes."""
        return zip(self.paths, self.sizes, strict=True)

    def about(self) -> dict[str, tuple[int, int]]:
        """Path → label and size."""
        return dict(zip(self.paths, zip(self.labels, self.sizes, strict=True), strict=True))


def _fingerprint(
    kind: str, paths: Sequence[str], labels: Sequence[int], sizes: Sequence[int], files: Sequence[Path]
) -> str:
    """The same for every order of the images."""
    contents: Sequence[str] = [""] * len(paths)
    if files:
        with ThreadPoolExecutor(THREADS) as pool:
            contents = list(pool.map(_content, files))
    digest = hashlib.sha256()
    for line in sorted(zip(paths, labels, sizes, contents, strict=True)):
        digest.update(json.dumps(line).encode())
    return f"{kind}:{digest.hexdigest()[:32]}"


def _content(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Split:
    """Some images of a source."""

    source: Source
    indices: np.ndarray
    """Positions in the source, int64 [N]."""
    sizes: np.ndarray | None = None
    """Bytes of the files [N]; None before a look at them, and for built-in data."""

    def take(self, chosen: np.ndarray) -> "Split":
        sizes = None if self.sizes is None else self.sizes[chosen]
        return Split(self.source, self.indices[chosen], sizes)

    def paths(self) -> tuple[str, ...]:
        return tuple(self.source.paths[i] for i in self.indices) if isinstance(self.source, FileSource) else ()


@dataclass(frozen=True)
class ChosenSplits:
    """The splits of a run, by name: `train`, `test`, and `val` where there is one."""

    splits: dict[str, Split]
    unused: tuple[str, ...]
    """Paths of images that were there for training when the run began, and that no split took."""
    new: tuple[str, ...]
    """Paths of images that were not there then."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Path of an image that was left out → why."""
    left_out: int = 0
    """How many images training is without for that."""

    @property
    def root(self) -> Path:
        """Folder that the paths of the training images start from; the working directory for built-in data."""
        source = self.splits["train"].source
        return source.root if isinstance(source, FileSource) else Path()


@dataclass(frozen=True)
class Changes:
    """What two records of a split differ by, as paths."""

    new: tuple[str, ...]
    gone: tuple[str, ...]
    relabelled: tuple[str, ...]
    resized: tuple[str, ...]

    def describe(self, what: str) -> str:
        """`12 test images are new (a/1.png, …), 3 are gone (…)`."""
        kinds = (
            (self.new, "new"),
            (self.gone, "gone"),
            (self.relabelled, "of another class now"),
            (self.resized, "other files now (their sizes differ)"),
        )
        parts = [
            f"{len(paths):,} {'is' if len(paths) == 1 else 'are'} {kind} ({some(paths)})"
            for paths, kind in kinds
            if paths
        ]
        if not parts:
            return f"the files of the {what} images have other content"
        count, _, rest = parts[0].partition(" ")
        noun = "image" if count == "1" else "images"
        return ", ".join([f"{count} {what} {noun} {rest}", *parts[1:]])


def changes(before: Record, now: Record) -> Changes:
    """What has changed between two records of a split that have files."""
    old, new = before.about(), now.about()
    both = [path for path in before.paths if path in new]
    return Changes(
        new=tuple(path for path in now.paths if path not in old),
        gone=tuple(path for path in before.paths if path not in new),
        relabelled=tuple(path for path in both if old[path][0] != new[path][0]),
        resized=tuple(path for path in both if old[path][0] == new[path][0] and old[path][1] != new[path][1]),
    )


def some(paths: Sequence[str], most: int = 3) -> str:
    """The first few, and that there are more."""
    return ", ".join([*paths[:most], *(["…"] if len(paths) > most else [])])


def seen_in_training(tested: Record, trained: Record, root: Path, apart: Record | None = None) -> list[str]:
    """Paths of evaluated images that were trained on: the same path, or a copy under another folder.

    A copy has the file name, class and size of a training image, and its bytes where that is still there; where it is
    gone from among the others it has been moved.

    Args:
        root: of the images.
        apart: images that were not trained on for certain: those that the run had for its test.
    """
    sure = {} if apart is None else dict(apart.lengths())
    known = trained.about()
    copies: dict[tuple[str, int, int], list[str]] = {}
    if any((root / path).exists() for path in trained.paths[:: max(1, len(trained.paths) // 16)]):
        for path, (label, size) in known.items():
            copies.setdefault((Path(path).name, label, size), []).append(path)
    return [
        path
        for path, (label, size) in tested.about().items()
        if sure.get(path) != size
        and (
            known.get(path, (label, None))[1] == size
            or any(_is_copy(root, path, other) for other in copies.get((Path(path).name, label, size), ()))
        )
    ]


def _is_copy(root: Path, path: str, trained: str) -> bool:
    """A training image that is gone has been moved here; one that is there is compared."""
    try:
        return path != trained and (root / path).read_bytes() == (root / trained).read_bytes()
    except FileNotFoundError:
        return True
    except OSError:
        return False


@dataclass(frozen=True)
class StoredSplits:
    """The splits that a run was trained and evaluated with, as it wrote them down."""

    records: Mapping[str, Record]
    """`train`, `test`, and `val` where there is one."""
    unused: tuple[str, ...]
    """Images that no split took."""
    unreadable: Mapping[str, str]
    """Path of an image that was left out → why."""


def split_files(
    records: Mapping[str, Record], unused: Sequence[str], unreadable: Mapping[str, str]
) -> dict[str, bytes]:
    """Name → content of the files of a run's folder `splits/`: lists of `path label` lines, and `splits.json`."""
    lists = {
        f"{name}.txt": [f"{path} {label}" for path, label in zip(each.paths, each.labels, strict=True)]
        for name, each in records.items()
        if each.paths
    }
    lists |= {"unused.txt": [path for path in unused if "\n" not in path]} if unused else {}
    lists |= {"unreadable.txt": [f"{path}\t{why}" for path, why in unreadable.items()]} if unreadable else {}
    facts = {name: {"fingerprint": each.fingerprint, "sizes": each.sizes} for name, each in records.items()}
    files = {name: "".join(f"{line}\n" for line in lines) for name, lines in lists.items()}
    files["splits.json"] = json.dumps(facts) + "\n"
    return {name: text.encode(errors="surrogateescape") for name, text in files.items()}


def parse_splits(files: Mapping[str, bytes]) -> StoredSplits:
    """What `split_files` made. Raises ValueError or KeyError for anything else."""

    def lines(name: str) -> Iterator[str]:
        return iter(files.get(name, b"").decode(errors="surrogateescape").split("\n")[:-1])

    records = {}
    for name, each in json.loads(files["splits.json"]).items():
        pairs = [line.rpartition(" ")[::2] for line in lines(f"{name}.txt")]
        paths, labels = tuple(path for path, _ in pairs), tuple(int(label) for _, label in pairs)
        records[name] = Record(each["fingerprint"], paths, labels, tuple(each["sizes"]))
    pairs = [line.rpartition("\t")[::2] for line in lines("unreadable.txt")]
    return StoredSplits(records, tuple(lines("unused.txt")), dict(pairs))


def positions_of(paths: Sequence[str], source: Source) -> np.ndarray:
    """Where in a source of files these paths are; −1 for one that is not there. int64 [N]."""
    assert isinstance(source, FileSource), "built-in data have no lists"
    where = {path: index for index, path in enumerate(source.paths)}
    return np.array([where.get(path, -1) for path in paths], dtype=np.int64)
