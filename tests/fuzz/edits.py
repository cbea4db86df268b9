"""Small folders of images, as users have them, and what becomes of them between two commands: EDITS."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

from PIL import Image

CLASSES = {"ant": 12, "bee": 9, "cow": 7}
"""Name → training images."""
FOLDER = "dataset: ImageFolder\nroot: images\naugment: none\nmany_above: 9\nfew_below: 5\n"
LISTS = "dataset: ImageList\nroot: images\ntrain_list: train.txt\ntest_list: test.txt\naugment: none\nnum_classes: 3\n"
LAYOUTS: Mapping[str, str] = {
    "held out": FOLDER + "test_per_class: 3\n",
    "test folder": FOLDER,
    "validation held out": FOLDER + "val_per_class: 2\n",
    "lists": LISTS,
}


def make(folder: Path, rng: Random, layout: str) -> None:
    """Images of three classes and `my.yaml`, in one of the `LAYOUTS`."""
    for kind, number in CLASSES.items():
        for each in range(number):
            image(folder / "images" / "train" / kind / f"p{each}.png", rng)
        for each in range(0 if layout == "held out" else 4):
            image(folder / "images" / "test" / kind / f"q{each}.png", rng)
    (folder / "my.yaml").write_text(LAYOUTS[layout])
    if layout == "lists":
        (folder / "train.txt").touch()
        relist(folder)


def add(folder: Path, rng: Random) -> str:
    """Images that sort first or last, in one class, on every list."""
    kind, prefix = rng.choice(classes(folder, "train")), rng.choice(("000", "zzz"))
    number = rng.choice((1, 3, 20))
    for each in range(number):
        image(folder / "images" / "train" / kind / f"{prefix}{each}.png", rng)
    relist(folder)
    return f"{number} images {prefix}*.png added to train/{kind}"


def add_test(folder: Path, rng: Random) -> str:
    kind = rng.choice(classes(folder, "test"))
    image(folder / "images" / "test" / kind / "aaa.png", rng)
    relist(folder)
    return f"an image added to test/{kind}"


def remove(folder: Path, rng: Random) -> str:
    split = rng.choice(("train", "test"))
    kind = rng.choice(classes(folder, split))
    files = sorted((folder / "images" / split / kind).iterdir())
    for path in (chosen := rng.sample(files, rng.choice((1, 2)))):
        path.unlink()
    relist(folder)
    return f"{', '.join(str(each.relative_to(folder)) for each in chosen)} removed"


def rename(folder: Path, rng: Random) -> str:
    """A class gets a name that sorts elsewhere, which moves the labels."""
    kind = rng.choice(classes(folder, "train"))
    for split in ("train", "test"):
        if (folder / "images" / split / kind).is_dir():
            (folder / "images" / split / kind).rename(folder / "images" / split / "zebra")
    relist(folder)
    return f"class {kind} renamed to zebra"


def drop_class(folder: Path, rng: Random) -> str:
    kind = rng.choice(classes(folder, "train"))
    for split in ("train", "test"):
        shutil.rmtree(folder / "images" / split / kind, ignore_errors=True)
    relist(folder)
    return f"class {kind} removed"


def moreclasses(folder: Path, rng: Random) -> str:
    for split in ("train", "test"):
        if (folder / "images" / split).is_dir():
            for number in range(6):
                image(folder / "images" / split / "boa" / f"{number}.png", rng)
    relist(folder)
    return "a class boa added"


def replace(folder: Path, rng: Random) -> str:
    """Other pixels, and another size of the file, under the old name."""
    files = sorted((folder / "images").rglob("*.png"))
    for path in (chosen := rng.sample(files, 3)):
        image(path, rng, side=60)
    return f"{', '.join(str(each.relative_to(folder)) for each in chosen)} hold other pictures"


def label(folder: Path, rng: Random) -> str:
    """A line of a list says another class; without lists an image moves to another class."""
    if not (folder / "test.txt").exists():
        path = rng.choice(sorted((folder / "images").rglob("*.png")))
        other = rng.choice([each for each in classes(folder, path.parts[-3]) if each != path.parent.name])
        path.rename(path.parent.parent / other / f"moved-{path.name}")
        return f"{path.relative_to(folder)} moved to class {other}"
    path = folder / rng.choice(("train.txt", "test.txt"))
    lines = path.read_text().splitlines()
    where = rng.randrange(len(lines))
    name, old = lines[where].split()
    lines[where] = f"{name} {(int(old) + 1) % 3}"
    path.write_text("\n".join(lines) + "\n")
    return f"line {where + 1} of {path.name} changed to {lines[where]}"


def trained_into_test(folder: Path, rng: Random) -> str:
    """A training image is put among the test images as well."""
    if (folder / "test.txt").exists():
        line = rng.choice((folder / "train.txt").read_text().splitlines())
        with (folder / "test.txt").open("a") as file:
            file.write(line + "\n")
        return f"line {line} of train.txt added to test.txt"
    return add(folder, rng)


def nothing(folder: Path, rng: Random) -> str:
    """What is no change: times, files that are no images, another place for the whole."""
    what = rng.choice(("touched", "hidden", "readme"))
    if what == "touched":
        for path in (folder / "images").rglob("*.png"):
            os.utime(path, (1, 1))
    else:
        place = folder / "images" / "train" / classes(folder, "train")[0]
        (place / {"hidden": ".DS_Store", "readme": "README.txt"}[what]).write_text("no image")
    return f"nothing changed ({what})"


EDITS: tuple[Callable[[Path, Random], str], ...] = (
    *(add, add_test, remove, rename, drop_class, moreclasses, replace, label, trained_into_test, nothing),
)


def relist(folder: Path) -> None:
    """Lists of what is there now, where there are lists."""
    if not (folder / "train.txt").exists():
        return
    for split in ("train", "test"):
        found = sorted((folder / "images" / split).rglob("*.png"))
        order = sorted({each.parent.name for each in found})
        lines = [f"{each.relative_to(folder / 'images').as_posix()} {order.index(each.parent.name)}" for each in found]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


def classes(folder: Path, split: str) -> list[str]:
    found = folder / "images" / split
    return sorted(each.name for each in (found if found.is_dir() else folder / "images" / "train").iterdir())


def image(path: Path, rng: Random, side: int = 36) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side)).save(path)
