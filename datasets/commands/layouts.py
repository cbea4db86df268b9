"""The folders that each published data set needs, and what of them is there. The images are got by hand."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True)
class Layout:
    """How the images of a data set are stored."""

    tree: str
    """A picture of the folders."""
    by_hand: str
    """What the user has to do, because the images need an account or an agreement, or are too large to be fetched."""
    found: tuple[tuple[str, str], ...]
    """Pairs of a file or folder in the root, and what it shows. The first that exists for each part is reported."""
    parts: tuple[str, ...]
    """Folders of which one of a kind must be there, as alternatives separated by `|`."""


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "imagenet_lt": Layout(
            """\
ROOT/
  ImageNet_LT_train.txt  ImageNet_LT_test.txt  …
  train/n01440764/n01440764_10026.JPEG         1,000 folders, from ILSVRC2012_img_train.tar
  val/n01440764/ILSVRC2012_val_00000293.JPEG   1,000 folders; or
  val/ILSVRC2012_val_00000293.JPEG             one folder, as in ILSVRC2012_img_val.tar""",
            "The images need an account at https://image-net.org/ (ILSVRC2012, task 1 and 2). Download "
            "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar. Unpack the first into train/, each archive in it "
            "into a folder of its name, and the second into val/.",
            (
                ("train/n01440764", "train/ has class folders"),
                ("train/n01440764.tar", "the archives in train/ are still packed"),
                ("val/n01440764", "val/ has class folders"),
                ("val/ILSVRC2012_val_00000001.JPEG", "val/ is one folder, which is used as it is"),
            ),
            ("train", "val"),
        ),
        "places_lt": Layout(
            """\
ROOT/
  Places_LT_train.txt  Places_LT_test.txt  …
  train/bazaar-indoor/00000001.jpg   365 folders, from places365standard_easyformat.tar
  val/bazaar-indoor/Places365_val_00000001.jpg
or
  data_256/b/bazaar/indoor/00000001.jpg   from train_256_places365standard.tar (data_large: train_large_…)
  val_256/Places365_val_00000001.jpg      from val_256.tar (val_large: val_large.tar)""",
            "The images need your agreement to the terms at http://places2.csail.mit.edu/download.html "
            "(Places365-Standard). Download places365standard_easyformat.tar, and move the folders train and val of "
            "places365_standard here; or unpack the two archives of small or of large images here.",
            (
                ("train", "train/ has class folders"),
                ("train/apartment_building/outdoor", "scenes in train/ are nested; rename them, as in bazaar-indoor"),
                ("data_256", "data_256/ has the small images"),
                ("data_large", "data_large/ has the large images"),
                ("places365_standard", "places365_standard/ is the root; give it as --root"),
            ),
            ("train|data_256|data_large", "val|val_256|val_large"),
        ),
        "inat2018": Layout(
            """\
ROOT/
  iNaturalist18_train.txt  iNaturalist18_val.txt  categories.json  …
  train_val2018/Plantae/7477/3b60c9486db1d2ee875f11a669fbde4a.jpg   from train_val2018.tar.gz""",
            "The images have 120 GB. Read the terms at https://github.com/visipedia/inat_comp/tree/master/2018, "
            "download https://ml-inat-competition-datasets.s3.amazonaws.com/2018/train_val2018.tar.gz (MD5 "
            "b1c6952ce38f31868cc50ea72d066cc3), and unpack it here.",
            (("train_val2018", "train_val2018/ is there"), ("train_val2018.tar.gz", "train_val2018.tar.gz is packed")),
            ("train_val2018",),
        ),
    }
)
"""Name of a data config → its layout. CIFAR is complete after the download."""


def what_remains(name: str, root: Path) -> str:
    """What is there of the images, and what has to be done by hand.

    Args:
        name: a key of `PUBLISHED_SETS`.
        root: the folder of the data set.

    Returns:
        Text for the terminal; empty if everything was downloaded.
    """
    if (layout := LAYOUTS.get(name)) is None:
        return ""
    lines = [f"found: {shows}" for marker, shows in layout.found if os.path.exists(root / marker)]
    gone = [part for part in layout.parts if not any(os.path.isdir(root / each) for each in part.split("|"))]
    if not gone:
        return "\n".join(lines)
    names = ", ".join(f"{part.replace('|', '/ or ')}/" for part in gone)
    tree = layout.tree.replace("ROOT", str(root), 1)
    return "\n".join([*lines, f"by hand: {names} of the images is missing. {layout.by_hand}", "", tree])
