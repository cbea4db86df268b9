"""Damaged and hostile pictures through `data verify --decode` and through the loader: both find the same ones bad."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from random import Random

from PIL import Image

from tailtune.tests.fuzz.bench import Bench
from tailtune.tests.fuzz.hard_pictures import HARD, Make
from tailtune.tests.fuzz.pictures import EXTENSION, damaged
from tailtune.tests.fuzz.promises import Finding, broken
from tailtune.tests.fuzz.runner import MAIN, Limits, Outcome, Running

DECODERS: Sequence[Sequence[str]] = (["image_backend", "torchvision"], ["image_backend", "pil"])
"""Options that choose a decoder. The folders are read with each in turn."""
DATA = "dataset: ImageList\nroot: images\ntrain_list: train.txt\ntest_list: test.txt\naugment: none\nmany_above: 3\n"
LOOK = str(Path(__file__).with_name("look.py"))
GROUP = 20
"""Pictures in one folder; half of them are of `HARD`."""
IN_TRAIN = 0.25
"""Share of the pictures that are training images; the others are test images."""

Run = Callable[[str, Sequence[str], Path], Outcome]
"""A script, its words and the working directory → what became of it."""


def cases(bench: Bench) -> Iterator[Finding | None]:
    """One case is one folder with `GROUP` pictures; a broken promise is traced to one of them."""
    order = _kinds(bench.rng)
    for decoder in cycle(DECODERS):
        seed, kinds = bench.rng.randrange(2**32), list(islice(order, GROUP // 2))
        options = [*decoder, "num_workers", bench.rng.choice("0002")]
        pictures = group(seed, kinds, GROUP - len(kinds))
        found = _fresh_case(bench, pictures, options, seed)
        alone = (_fresh_case(bench, {name: make}, options, seed) for name, make in pictures.items()) if found else ()
        yield next((each for each in alone if each and found and each.what == found.what), found)


def _kinds(draw: Random) -> Iterator[str]:
    """The entries of `HARD` again and again, in a new order each time."""
    while True:
        yield from draw.sample([*HARD], len(HARD))


def group(seed: int, kinds: Sequence[str], count: int) -> dict[str, Make]:
    """Name of a picture → the function that makes it: some of `HARD`, and damaged files.

    Args:
        seed: of every choice.
        kinds: entries of `HARD`.
        count: damaged files.
    """
    draw = Random(seed)
    names = [f"{number:02}_{kind}.{draw.choice([*EXTENSION.values()])}" for number, kind in enumerate(kinds)]
    hard = {name: HARD[kind] for name, kind in zip(names, kinds, strict=True)}
    return hard | {name: partial(_written, content=content) for name, content in damaged(seed, count)}


def _written(path: Path, draw: Random, content: bytes) -> None:
    path.write_bytes(content)


def _fresh_case(bench: Bench, pictures: Mapping[str, Make], options: Sequence[str], seed: int) -> Finding | None:
    def forked(script: str, argv: Sequence[str], cwd: Path) -> Outcome:
        return Running(argv, cwd, bench.limits, script=script).wait()

    with bench.fresh() as folder:
        return case(folder, pictures, options, seed, forked, bench.limits)


def case(
    folder: Path, pictures: Mapping[str, Make], options: Sequence[str], seed: int, run: Run, limits: Limits
) -> Finding | None:
    """Make the pictures, read them in both ways, and compare.

    Args:
        folder: an empty folder.
        pictures: name → the function that makes it.
        options: pairs of the command line, for both.
        seed: of what the functions draw.
    """
    expected = _make(folder, pictures, Random(seed))
    story = f"seed {seed}, {', '.join(pictures)}"
    verified = run(MAIN[0], ["data", "verify", "my.yaml", *options, "--decode", "--report", "report.json"], folder)
    if found := broken(verified, story, codes=(0, 1), limits=limits):
        return found
    looked = run(LOOK, options, folder)
    if found := broken(looked, story, codes=(0,), limits=limits):
        return found
    report, seen = json.loads((folder / "report.json").read_text()), json.loads(looked.stdout.splitlines()[-1])
    difference = _difference(report["splits"], seen, expected)
    if difference is None:
        return None
    return Finding("d", difference[0], f"{story}: {looked.command}", difference[1])


def _make(folder: Path, pictures: Mapping[str, Make], draw: Random) -> dict[str, bool | None]:
    """The pictures among good ones, the lists and the YAML. Returns path → whether it can be decoded, where known."""
    lines: dict[str, list[str]] = {"train": [], "test": []}
    expected: dict[str, bool | None] = {}
    for split in lines:
        (folder / "images" / split).mkdir(parents=True)
        for number in range(4):
            path = f"{split}/good{number}.png"
            Image.new("RGB", (40, 36), (60 * number, 90, len(split))).save(folder / "images" / path)
            lines[split].append(f"{path} {number % 2}\n")
            expected[path] = True
    for name, make in pictures.items():
        split = "train" if draw.random() < IN_TRAIN else "test"
        expected[f"{split}/{name}"] = make(folder / "images" / split / name, draw)
        lines[split].append(f"{split}/{name} {draw.randrange(2)}\n")
    for split in lines:
        (folder / f"{split}.txt").write_text("".join(lines[split]))
    (folder / "my.yaml").write_text(DATA)
    return expected


def _difference(splits: dict, seen: dict, expected: Mapping[str, bool | None]) -> tuple[str, str] | None:
    """What is wrong, and an example; None if nothing is."""
    bad = {split: {*found["missing"], *found["unreadable"]} for split, found in splits.items()}
    every = bad["train"] | bad["test"]
    checks = {
        "verify accepts what cannot be decoded": {path for path, good in expected.items() if good is False} - every,
        "verify refuses what can be decoded": {path for path, good in expected.items() if good} & every,
        "verify and the images that are left out differ": bad["train"] ^ {*seen["train"]},
        "verify and `on_bad_image skip` differ": bad["test"] ^ {*seen["skipped"]},
        "verify and `on_bad_image raise` differ": bad["test"] ^ seen["raised"].keys(),
        "a message does not name the path": {path for path, text in seen["raised"].items() if path not in text},
    }
    wrong = next(((what, f"{sorted(paths)[:5]}") for what, paths in checks.items() if paths), None)
    if wrong or any(path in seen["stopped"] for path in bad["test"]) or not (bad["test"] or seen["stopped"]):
        return wrong
    return "the loader does not stop at a bad image, or does not name it", seen["stopped"]
