"""Compares the records of splits: what has changed since a run stored them, and which images were trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tailtune.datasets.splits.split_records import ChosenSplits, Record


@dataclass(frozen=True)
class RecordChanges:
    """The differences between two records of a split, as paths."""

    new: tuple[str, ...]
    gone: tuple[str, ...]
    relabelled: tuple[str, ...]
    resized: tuple[str, ...]

    def describe(self, kind: str) -> str:
        """The differences as text: `12 test images are new (a/1.png, …), 3 are gone (…)`.

        Args:
            kind: "training", "validation" or "test".
        """
        changes = (
            (self.new, "new"),
            (self.gone, "gone"),
            (self.relabelled, "of another class now"),
            (self.resized, "other files now (their sizes differ)"),
        )
        parts = [
            f"{len(paths):,} {'is' if len(paths) == 1 else 'are'} {change} ({first_few(paths)})"
            for paths, change in changes
            if paths
        ]
        if not parts:
            return f"the files of the {kind} images have other content"
        count, _, rest = parts[0].partition(" ")
        noun = "image" if count == "1" else "images"
        return ", ".join([f"{count} {kind} {noun} {rest}", *parts[1:]])


def compare_records(before: Record, now: Record) -> RecordChanges:
    """The differences between two records of a split of files.

    Args:
        before: the earlier record.
        now: the later one.
    """
    old, new = before.labels_and_sizes(), now.labels_and_sizes()
    both = [path for path in before.paths if path in new]
    return RecordChanges(
        new=tuple(path for path in now.paths if path not in old),
        gone=tuple(path for path in before.paths if path not in new),
        relabelled=tuple(path for path in both if old[path][0] != new[path][0]),
        resized=tuple(path for path in both if old[path][0] == new[path][0] and old[path][1] != new[path][1]),
    )


def first_few(paths: Sequence[str], count: int = 3) -> str:
    """The first paths, separated by commas, and `…` if there are more.

    Args:
        paths: the paths.
        count: how many are shown.
    """
    return ", ".join([*paths[:count], *(["…"] if len(paths) > count else [])])


def seen_in_training(
    evaluated: Record, trained: Record, images: ChosenSplits, not_trained: Record | None = None
) -> list[str]:
    """Paths of evaluated images that were trained on, under the same path or as a copy under another one.

    A copy has the file name, class, size and content of a training image. If the training image itself is gone while
    others are there, a file of the same name, class and size counts as this image, moved to another folder.

    Args:
        evaluated: the evaluated images.
        trained: the training images.
        images: where the images are read.
        not_trained: images that were certainly not trained on: the test images that the run has stored.

    Returns:
        Paths among those of `evaluated`.
    """
    excluded = {} if not_trained is None else dict(not_trained.path_sizes())
    training_images = trained.labels_and_sizes()
    candidates: dict[tuple[str, int, int], list[str]] = {}
    """(file name, label, size) → training images."""
    if any(images.has(path) for path in trained.paths[:: max(1, len(trained.paths) // 16)]):
        for path, (label, size) in training_images.items():
            candidates.setdefault((Path(path).name, label, size), []).append(path)
    return [
        path
        for path, (label, size) in evaluated.labels_and_sizes().items()
        if excluded.get(path) != size
        and (
            training_images.get(path, (label, None))[1] == size
            or any(_is_copy(images, path, original) for original in candidates.get((Path(path).name, label, size), ()))
        )
    ]


def _is_copy(images: ChosenSplits, path: str, original: str) -> bool:
    """Whether a file has the content of another one, or the other one is gone and may have been moved here."""
    try:
        return path != original and images.read(path) == images.read(original)
    except FileNotFoundError:
        return True
    except OSError:
        return False
