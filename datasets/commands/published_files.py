"""What `data prepare` downloads: the files of each published data set, their addresses and their checksums.

The addresses of lists contain a commit, so that their content cannot change. Checksums of lists are git blob ids, those
of archives are the MD5 sums that their authors publish. The members of iNaturalist's archives have no published
checksum; they are covered by that of the archive.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tailtune.datasets.commands.checksums import Kind
from tailtune.datasets.sources.cifar import ARCHIVES
from tailtune.datasets.sources.image_folder import SPLITS
from tailtune.datasets.sources.published_lists import PUBLISHED

DECOUPLING = (
    "https://raw.githubusercontent.com/facebookresearch/classifier-balancing/f162adef63fdf592d0b8a0f6e52bc481fc08785f"
)
SADE = "https://raw.githubusercontent.com/Vanint/SADE-AgnosticLT/cba11b8b0fb91711eeffd5e45311f321f8a88680"
LIFT = "https://raw.githubusercontent.com/shijxcs/LIFT/661ead9b78368f05ba79abe4672d63154467f823"
INAT = "https://ml-inat-competition-datasets.s3.amazonaws.com/2018"


@dataclass(frozen=True)
class PublishedFile:
    """A file that may be downloaded."""

    name: str
    """Its name in the root of the data set."""
    url: str
    kind: Kind
    """What the checksums are."""
    checksums: tuple[str, ...]
    """Any of them is right."""
    other_names: tuple[str, ...] = ()
    """Names that copies of the file have elsewhere, for `--from`."""
    members: Mapping[str, str] | None = None
    """For an archive: the members that are unpacked → their MD5, or an empty text if none is published."""


def _list(folder: str, name: str) -> PublishedFile:
    return PublishedFile(name, f"{folder}/{name}", "git blob", PUBLISHED[name])


def _shifted(prefix: str, folder: str, *ratios: int) -> tuple[PublishedFile, ...]:
    """The lists of test sets with other class frequencies, as SADE publishes them."""
    kinds = [f"{direction}{ratio}" for ratio in ratios for direction in ("forward", "backward")]
    return tuple(_list(f"{SADE}/data_txt/{folder}", f"{prefix}_{kind}.txt") for kind in [*kinds, "uniform"])


def _cifar(name: str) -> tuple[PublishedFile, ...]:
    archive = ARCHIVES[name]
    members = MappingProxyType({f"{archive.folder}/{file}": md5 for file, md5 in archive.files.items()})
    return (PublishedFile(archive.url.rpartition("/")[2], archive.url, "md5", (archive.md5,), (), members),)


def _annotations(split: str, md5: str) -> PublishedFile:
    name = f"{split}2018.json"
    return PublishedFile(f"{name}.tar.gz", f"{INAT}/{name}.tar.gz", "md5", (md5,), (), MappingProxyType({name: ""}))


PUBLISHED_SETS: Mapping[str, tuple[PublishedFile, ...]] = MappingProxyType(
    {
        "cifar10": _cifar("CIFAR10"),
        "cifar100": _cifar("CIFAR100"),
        "imagenet_lt": (
            *(_list(f"{DECOUPLING}/data/ImageNet_LT", f"ImageNet_LT_{split}.txt") for split in SPLITS),
            *_shifted("ImageNet_LT", "ImageNet_LT", 2, 5, 10, 25, 50),
            PublishedFile(
                "ImageNet_LT_classnames.txt",
                f"{LIFT}/datasets/ImageNet_LT/classnames.txt",
                "git blob",
                ("91710b143a9ea19996f66d1b92af859f99e96e8e",),
            ),
            PublishedFile(
                "descriptors_imagenet.json",
                f"{LIFT}/utils/descriptors_imagenet.json",
                "git blob",
                ("245a5e079ecc7b0eb2854b4d6bb2383f94176315",),
            ),
        ),
        "places_lt": (
            *(_list(f"{DECOUPLING}/data/Places_LT", f"Places_LT_{split}.txt") for split in SPLITS),
            *_shifted("Places_LT", "Places_LT_v2", 2, 5, 10, 25, 50),
            PublishedFile(
                "Places_LT_classnames.txt",
                f"{LIFT}/datasets/Places_LT/classnames.txt",
                "git blob",
                ("f2d229cdfdab6b888fcbc0f1ecbd78a06ee5fd27",),
            ),
        ),
        "inat2018": (
            *(_list(f"{DECOUPLING}/data/iNaturalist18", f"iNaturalist18_{split}.txt") for split in ("train", "val")),
            *_shifted("iNaturalist18", "iNaturalist18", 2, 3),
            PublishedFile(
                "categories.json",
                f"{LIFT}/datasets/iNaturalist18/categories.json",
                "git blob",
                # The second one ends with a line break, and is the same file otherwise.
                ("5804f413dc401661710ea810d7bcd3abf4c632e2", "08ce9ae35c3486f65595413576622a2e57ae83ad"),
                ("iNaturalist18_categories.json",),
            ),
            _annotations("train", "bfa29d89d629cbf04d826a720c0a68b0"),
            _annotations("val", "f2ed8bfe3e9901cdefceb4e53cd3775d"),
        ),
    }
)
"""Name of a data config → the files that may be downloaded."""
