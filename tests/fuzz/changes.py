"""Data that change between commands: a stored number is never shown for other data without a word, and no image that
was trained on is evaluated as a held-out one."""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random

from PIL import Image

from tests.fuzz.bench import Bench
from tests.fuzz.files import alike
from tests.fuzz.promises import Finding, broken, lost, snapshot, table_of
from tests.fuzz.runner import Outcome

RUN = [
    "-m",
    "tiny_clip_peft",
    "num_workers",
    "0",
    "batch_size",
    "16",
    "max_steps",
    "6",
    "num_epochs",
    "2",
    "output_dir",
    "run",
]
CLASSES = ("ant", "bee", "cow")
FOLDER = "dataset: ImageFolder\nroot: images\naugment: none\nmany_above: 9\nfew_below: 5\n"
LISTS = "dataset: ImageList\nroot: images\ntrain_list: train.txt\ntest_list: test.txt\naugment: none\nnum_classes: 3\n"
LAYOUTS: Mapping[str, str] = {
    "held out": FOLDER + "test_per_class: 3\n",
    "test folder": FOLDER,
    "validation held out": FOLDER + "val_per_class: 2\n",
    "lists": LISTS,
}
WORD = re.compile(
    r"chang|\bnew\b|gone|differ|other |edited|moved|renam|missing|added|removed|no longer|anew|again", re.I
)
"""What tells a user that the data are not those of before."""


def add(folder: Path, rng: Random) -> str:
    """Images that sort first or last, in one class, on every list."""
    kind, prefix = rng.choice(_classes(folder, "train")), rng.choice(("000", "zzz"))
    number = rng.choice((1, 3, 20))
    for each in range(number):
        _image(folder / "images" / "train" / kind / f"{prefix}{each}.png", rng)
    _relist(folder)
    return f"{number} images {prefix}*.png added to train/{kind}"


def add_test(folder: Path, rng: Random) -> str:
    kind = rng.choice(_classes(folder, "test"))
    _image(folder / "images" / "test" / kind / "aaa.png", rng)
    _relist(folder)
    return f"an image added to test/{kind}"


def remove(folder: Path, rng: Random) -> str:
    split = rng.choice(("train", "test"))
    kind = rng.choice(_classes(folder, split))
    files = sorted((folder / "images" / split / kind).iterdir())
    for path in (chosen := rng.sample(files, rng.choice((1, 2)))):
        path.unlink()
    _relist(folder)
    return f"{', '.join(str(each.relative_to(folder)) for each in chosen)} removed"


def rename(folder: Path, rng: Random) -> str:
    """A class gets a name that sorts elsewhere, which moves the labels."""
    kind = rng.choice(_classes(folder, "train"))
    for split in ("train", "test"):
        if (folder / "images" / split / kind).is_dir():
            (folder / "images" / split / kind).rename(folder / "images" / split / "zebra")
    _relist(folder)
    return f"class {kind} renamed to zebra"


def drop_class(folder: Path, rng: Random) -> str:
    kind = rng.choice(_classes(folder, "train"))
    for split in ("train", "test"):
        shutil.rmtree(folder / "images" / split / kind, ignore_errors=True)
    _relist(folder)
    return f"class {kind} removed"


def more_classes(folder: Path, rng: Random) -> str:
    for split in ("train", "test"):
        if (folder / "images" / split).is_dir():
            for number in range(6):
                _image(folder / "images" / split / "boa" / f"{number}.png", rng)
    _relist(folder)
    return "a class boa added"


def replace(folder: Path, rng: Random) -> str:
    """Other pixels, and another size of the file, under the old name."""
    files = sorted((folder / "images").rglob("*.png"))
    for path in (chosen := rng.sample(files, 3)):
        _image(path, rng, side=60)
    return f"{', '.join(str(each.relative_to(folder)) for each in chosen)} hold other pictures"


def label(folder: Path, rng: Random) -> str:
    """A line of a list says another class; without lists an image moves to another class."""
    if not (folder / "test.txt").exists():
        path = rng.choice(sorted((folder / "images").rglob("*.png")))
        other = rng.choice([each for each in _classes(folder, path.parts[-3]) if each != path.parent.name])
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
        place = folder / "images" / "train" / _classes(folder, "train")[0]
        (place / {"hidden": ".DS_Store", "readme": "README.txt"}[what]).write_text("no image")
    return f"nothing changed ({what})"


EDITS: tuple[Callable[[Path, Random], str], ...] = (
    *(add, add_test, remove, rename, drop_class, more_classes, replace, label, trained_into_test, nothing),
)
COMMANDS: tuple[list[str], ...] = (
    [],
    ["test_only", "True"],
    ["test_only", "True", "few_below", "4"],
    ["test_only", "True", "tte", "True"],
)


def cases(bench: Bench) -> Iterator[Finding | None]:
    """One case: a finished run (sometimes with evaluations), an edit of its data, a command."""
    sound: dict[tuple[str, int], Outcome] = {}
    homes: dict[str, Path] = {}
    while True:
        for layout in LAYOUTS:
            if layout not in homes:
                homes[layout] = prepare(bench, layout)
            which, edit = bench.rng.randrange(len(COMMANDS)), bench.rng.choice(EDITS)
            words = ["-d", "my.yaml", *RUN, *COMMANDS[which]]
            if (layout, which) not in sound:
                with bench.fresh(homes[layout]) as folder:
                    sound[layout, which] = bench.run(words, folder)
            with bench.fresh(homes[layout]) as folder:
                has_test = (folder / "images" / "test").is_dir()
                if edit is add_test and not has_test:
                    continue
                yield _case(bench, folder, f"{layout}: ", edit, words, sound[layout, which])


def _case(
    bench: Bench, folder: Path, layout: str, edit: Callable[[Path, Random], str], words: list[str], sound: Outcome
) -> Finding | None:
    old = evaluated(folder)
    story = layout + edit(folder, bench.rng)
    concerned = "test_only" not in words or evaluated(folder) != old
    before = snapshot(folder / "images")
    outcome = bench.run(words, folder)
    command = f"{story}: {outcome.command}"
    found = broken(outcome, story) or lost(before, snapshot(folder / "images"), command)
    if found or outcome.code:
        refused = found is None and edit is nothing
        return Finding("b", "refuses data that did not change", command, outcome.stderr) if refused else found
    lists = list((folder / "output" / "run").rglob("splits/*.txt"))
    if found := leaked(lists, command):
        return found
    told = new_words(outcome.stdout + outcome.stderr, sound.stdout)
    same = alike(table_of(outcome.stdout), table_of(sound.stdout))
    if edit is nothing:
        return (
            None if same else Finding("b", "other numbers, although the data did not change", command, outcome.stdout)
        )
    if not told and (concerned or not same):
        shown = "the stored numbers" if same else "other numbers"
        return Finding("b", f"{shown} without a word, {edit.__name__}", command, outcome.stdout)
    if "held out" in layout and not lists:
        return Finding("b", "no splits/*.txt says what was held out", command)
    return None


def evaluated(folder: Path) -> dict[str, str]:
    """What an evaluation reads, as far as can be told from outside: test images and their list, else all images."""
    split = folder / "images" / "test"
    files = snapshot(split if split.is_dir() else folder / "images", passing={".DS_Store", "README.txt"})
    return {**files, "list": (folder / "test.txt").read_text() if (folder / "test.txt").exists() else ""}


def leaked(lists: list[Path], command: str) -> Finding | None:
    """Whether a list of evaluated images, lines `relative/path label`, holds one that was trained on."""
    named = {path: {line.rpartition(" ")[0] for line in path.read_text().splitlines()} for path in lists}
    trained = set().union(*(each for path, each in named.items() if "train" in path.name))
    for path, each in named.items():
        if "train" not in path.name and (both := each & trained):
            return Finding("b", "evaluates images that were trained on", command, f"{path.name}: {sorted(both)[:9]}")
    return None


def new_words(printed: str, usual: str) -> list[str]:
    """Lines that a command on the old data does not print, and that speak of a change."""
    known = {re.sub(r"\d+", "0", line) for line in usual.splitlines()}
    return [line for line in printed.splitlines() if re.sub(r"\d+", "0", line) not in known and WORD.search(line)]


def prepare(bench: Bench, layout: str) -> Path:
    """A finished run on images of three classes, with one evaluation."""
    home = bench.folder / layout.replace(" ", "-")
    with bench.fresh() as folder:
        _make(folder, bench.rng, layout)
        for words in ([], COMMANDS[-1]):
            outcome = bench.run(["-d", "my.yaml", *RUN, *words], folder)
            assert outcome.code == 0, outcome
        return folder.rename(home)


def _make(folder: Path, rng: Random, layout: str) -> None:
    for kind, number in zip(CLASSES, (12, 9, 7), strict=True):
        for each in range(number):
            _image(folder / "images" / "train" / kind / f"p{each}.png", rng)
        for each in range(0 if layout == "held out" else 4):
            _image(folder / "images" / "test" / kind / f"q{each}.png", rng)
    (folder / "my.yaml").write_text(LAYOUTS[layout])
    if layout == "lists":
        (folder / "train.txt").touch()
        _relist(folder)


def _relist(folder: Path) -> None:
    """Lists of what is there now, where there are lists."""
    if not (folder / "train.txt").exists():
        return
    for split in ("train", "test"):
        found = sorted((folder / "images" / split).rglob("*.png"))
        order = sorted({each.parent.name for each in found})
        lines = [f"{each.relative_to(folder / 'images').as_posix()} {order.index(each.parent.name)}" for each in found]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


def _classes(folder: Path, split: str) -> list[str]:
    found = folder / "images" / split
    return sorted(each.name for each in (found if found.is_dir() else folder / "images" / "train").iterdir())


def _image(path: Path, rng: Random, side: int = 36) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side)).save(path)
