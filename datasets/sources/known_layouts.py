"""The layouts that ImageNet and Places365 have on disk. The paths of a list are converted to the one that is there."""

import os
from collections.abc import Sequence
from glob import iglob
from pathlib import Path

TRAIN_FOLDERS = ("train", "data_256", "data_large")
VAL_FOLDERS = ("val", "val_256", "val_large")
"""Folders of the training and validation images of Places365, in each of its releases."""


def paths_on_disk(root: Path, paths: Sequence[str]) -> Sequence[str]:
    """Convert the paths of a list to the layout that the images have on disk.

    A list may name the images of Places365 by any of its releases: with class folders (`train/bazaar-indoor/1.jpg`,
    `val/bazaar-indoor/2.jpg`), or as the archives of small or of large images have them
    (`data_256/b/bazaar/indoor/1.jpg`, `val_256/2.jpg`). ImageNet's validation images may lie in one folder.

    Args:
        root: the folder that the paths start from.
        paths: N paths.

    Returns:
        N paths. A path is unchanged if its first folder exists, or if the image is in none of these layouts.
    """
    first = _flat_imagenet_path(paths[0])
    if first != paths[0] and os.path.isfile(root / first):  # `Path.is_file` fails for a name that is too long
        return [_flat_imagenet_path(path) for path in paths]
    there = {name for name in (*TRAIN_FOLDERS, *VAL_FOLDERS) if (root / name).is_dir()}
    folders = {
        name: next((other for other in (name, *release) if other in there), name)
        for release in (TRAIN_FOLDERS, VAL_FOLDERS)
        for name in release
    }
    ends = (path.partition("/")[0] for path in (paths[0], paths[-1]))
    if all(folders.get(top, top) == top for top in ends):
        return paths
    scenes = _scenes_of_val(root) if folders[VAL_FOLDERS[1]] == "val" else {}
    return [_places_path(path, folders, scenes) for path in paths]


def archived_places_path(path: str) -> str:
    """The path that an image of Places365 has in the archives of small images, by which lists can be compared.

    Args:
        path: a path in any of the layouts of Places365; other paths are returned as they are.
    """
    return _places_path(path, {"train": "data_256", "val": "val_256"}, {})


def scene_of(path: str) -> str | None:
    """The scene of a training image in the archives of Places365: data_256/b/bazaar/indoor/1.jpg → bazaar-indoor.

    Args:
        path: a path of a list.

    Returns:
        The scene; None for a path of another layout.
    """
    parts = path.split("/")
    return "-".join(parts[2:-1]) if parts[0] in TRAIN_FOLDERS[1:] and len(parts) > 3 else None


def _places_path(path: str, folders: dict[str, str], scenes: dict[str, str]) -> str:
    """A path of Places365 in another layout.

    Args:
        path: a path; one that is not of Places365 is returned as it is.
        folders: first folder of a path → the first folder of the result.
        scenes: name of a validation image → its scene, which the archives do not tell.
    """
    parts = path.split("/")
    folder, name = folders.get(parts[0], parts[0]), parts[-1]
    scene = parts[1] if parts[0] in ("train", "val") and len(parts) == 3 else scene_of(path)
    if parts[0] in VAL_FOLDERS[1:] and len(parts) == 2:
        scene = scenes.get(name, "")
    if folder == parts[0] or scene is None:
        return path
    if folder in VAL_FOLDERS[1:]:
        return f"{folder}/{name}"
    if folder in TRAIN_FOLDERS[1:]:
        return f"{folder}/{scene[0]}/{scene.replace('-', '/')}/{name}" if scene else path
    return f"{folder}/{scene}/{name}" if scene else path


def _scenes_of_val(root: Path) -> dict[str, str]:
    """Name of a validation image of Places365 → the class folder that it lies in."""
    images = (path.split(os.sep) for path in iglob("val/*/Places365_val_*", root_dir=root))
    return {name: scene for _, scene, name in images}


def _flat_imagenet_path(path: str) -> str:
    """Convert val/<wnid>/ILSVRC2012_val_….JPEG to the layout of ImageNet's archive, val/ILSVRC2012_val_….JPEG."""
    parts = path.split("/")
    is_val = len(parts) == 3 and parts[0] == "val" and parts[2].startswith("ILSVRC2012_val_")
    return f"val/{parts[2]}" if is_val else path
