"""Images as lists and folders name them: paths and labels, before any image is looked at."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailtune.configs.errors import UserError
from tailtune.datasets.sources.image_sources import FileSource


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


def _small_places(path: str) -> str:
    """train/<scene>/x.jpg in Places365's small-image layout (any other path stays)."""
    parts = path.split("/")
    if len(parts) != 3 or parts[0] not in ("train", "val"):
        return path
    split, scene, name = parts
    return f"val_256/{name}" if split == "val" else f"data_256/{scene[0]}/{scene.replace('-', '/')}/{name}"
