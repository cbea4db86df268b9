"""Says what was probably given instead of a published data set: another release, another layout, or another list."""

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from tailtune.datasets.commands.checksums import checksum
from tailtune.datasets.commands.split_files import SplitFiles
from tailtune.datasets.sources.published_lists import PUBLISHED

SIGNS: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        "ImageNet_LT": (
            ("wnids.txt", "this is Tiny-ImageNet-200 (wnids.txt); the lists need ILSVRC2012"),
            ("val/ILSVRC2010_val_00000001.JPEG", "this is ILSVRC2010, which has other classes; get ILSVRC2012"),
            ("train_data_batch_1", "this is the downsampled ImageNet; the lists need the images of ILSVRC2012"),
            ("ILSVRC2012_img_train.tar", "the archive ILSVRC2012_img_train.tar is not unpacked; unpack it into train/"),
            ("ILSVRC2012_img_val.tar", "the archive ILSVRC2012_img_val.tar is not unpacked; unpack it into val/"),
            ("train/n01440764.tar", "the archives in train/ are not unpacked; unpack each into its folder"),
        ),
        "Places_LT": (
            ("images256", "this is Places205 (images256/); the lists need Places365-Standard"),
            ("train/apartment_building/outdoor", "the scenes in train/ are nested; rename apartment_building/outdoor "
             "to apartment_building-outdoor, and so on"),
            ("train_256_places365standard.tar", "the archive train_256_places365standard.tar is not unpacked"),
            ("val_256.tar", "the archive val_256.tar is not unpacked"),
            ("places365standard_easyformat.tar", "the archive places365standard_easyformat.tar is not unpacked"),
        ),
        "iNaturalist18": (
            ("train_val_images", "this is iNaturalist 2017 (train_val_images/); the lists need iNaturalist 2018"),
            ("train_val2019", "this is iNaturalist 2019 (train_val2019/); the lists need iNaturalist 2018"),
            ("train_mini", "this is iNaturalist 2021 (train_mini/); the lists need iNaturalist 2018"),
            ("test2018", "test2018/ has the images of the competition's test; the lists need train_val2018/"),
            ("train_val2018.tar.gz", "the archive train_val2018.tar.gz is not unpacked"),
        ),
    }
)  # fmt: skip
"""Beginning of a list's name → pairs of a file or folder below the root, and what it shows."""
MAX_FOLDERS = 100
"""Most folders beside and below the root that are tried."""
SAMPLE = 16
"""Files by which another root is recognised."""


def prefix_of(list_name: str) -> str | None:
    """The published data set that a list belongs to.

    Args:
        list_name: name of the list file.

    Returns:
        A key of `SIGNS`, or None.
    """
    return next((prefix for prefix in SIGNS if list_name.startswith(f"{prefix}_")), None)


def list_status(file: Path) -> str:
    """Compare a list file with the published ones.

    Args:
        file: an existing list file.

    Returns:
        `published`, `published (small images)` for the second version of Places-LT's lists, `own list` if no published
        list has this name; otherwise what the file is instead.
    """
    if file.name not in PUBLISHED:
        return "own list"
    blob, versions = checksum(file, "git blob"), PUBLISHED[file.name]
    if blob in versions:
        return "published" if blob == versions[0] else "published (small images)"
    others = [name for name, blobs in PUBLISHED.items() if blob in blobs]
    if others:
        return f"has the content of {others[0]}"
    return f"is not the published list: git blob {blob} instead of {' or '.join(versions)}"


def probable_release(prefix: str | None, root: Path, missing: SplitFiles) -> list[str]:
    """Say why images of a data set are probably missing.

    Args:
        prefix: the published data set, a key of `SIGNS`; None for other data.
        root: the folder that the paths start from.
        missing: the missing files.

    Returns:
        Sentences; none if nothing is known.
    """
    found = [says for marker, says in SIGNS.get(prefix or "", ()) if os.path.exists(root / marker)]
    step = max(1, len(missing) // SAMPLE)
    sample = [missing.relative(index) for index in range(0, len(missing), step)][:SAMPLE]
    if other_root := next((folder for folder in _other_roots(root) if _holds(folder, sample)), None):
        found.append(f"{other_root} holds the missing images; set root {other_root}")
    elif other_name := next(filter(None, (_other_extension(root / path) for path in sample)), None):
        found.append(f"there is {other_name} instead: the files have another extension than in the list")
    elif not found:
        found += _missing_folders(root, missing)
    return found


def _other_roots(root: Path) -> Iterator[Path]:
    """Folders that may be meant instead of the root: those that contain it, and folders below it."""
    real = Path(os.path.abspath(root))
    yield from real.parents[:2]
    yield from (real / each for each in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC"))
    below = (real / name for name in sorted(os.listdir(real)))
    yield from islice((path for path in below if os.path.isdir(path)), MAX_FOLDERS)


def _holds(folder: Path, sample: list[str]) -> bool:
    return any(os.path.isfile(folder / path) for path in sample)


def _other_extension(path: Path) -> str | None:
    """Name of a file that differs from a missing one only in its extension; None if there is none."""
    spellings = (path.with_suffix(extension) for extension in (".JPEG", ".jpg", ".jpeg", ".png", ".JPG", ".webp"))
    return next((str(other) for other in spellings if os.path.isfile(other)), None)


def _missing_folders(root: Path, missing: SplitFiles) -> list[str]:
    """Say how many of the folders of the missing images do not exist at all."""
    folders = sorted({os.path.dirname(missing.relative(index)) for index in range(len(missing))})
    gone = [folder for folder in folders if not os.path.isdir(root / folder)]
    if not gone:
        return []
    count = f"{len(gone):,} of the {len(folders):,} folders of the missing images do not exist"
    return [f"{count} (first: {gone[0]}); the data set may be a part of the published one or not fully unpacked"]
