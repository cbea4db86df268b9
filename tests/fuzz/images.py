"""Damaged pictures in a small folder of images, `on_bad_image` raise and skip: one line, or the rest is used."""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path

from PIL import Image

from tailtune.tests.fuzz.bench import Bench, words
from tailtune.tests.fuzz.pictures import damaged
from tailtune.tests.fuzz.promises import Finding, broken, lost, snapshot

DATA = "dataset: ImageFolder\nroot: images\naugment: none\nmany_above: 3\nfew_below: 1\n"
RUN = words("-d my.yaml -m tiny_clip_peft batch_size 8 max_steps 2 num_epochs 1 output_dir run")
GROUP = 8
"""Damaged images in one folder."""
Picture = tuple[str, bytes]


def cases(bench: Bench) -> Iterator[Finding | None]:
    """One case is one folder with `GROUP` damaged images; a broken promise is traced to one of them."""
    pictures = (each for batch in count() for each in damaged(bench.rng.randrange(2**32) + batch, 10 * GROUP))
    while True:
        group = list(islice(pictures, GROUP))
        extra = ["on_bad_image", bench.rng.choice(["raise", "skip"]), "num_workers", bench.rng.choice("0002")]
        found = _case(bench, group, extra)
        alone = (_case(bench, [each], extra) for each in group) if found else ()
        yield next((each for each in alone if each and found and each.what == found.what), found)


def _case(bench: Bench, group: Sequence[Picture], extra: list[str]) -> Finding | None:
    with bench.fresh() as folder:
        names = make(folder, group, bench)
        before = snapshot(folder)
        outcome = bench.run([*RUN, *extra], folder)
        story = f"{', '.join(names)} in a folder of good images"
        after = {name: each for name, each in snapshot(folder).items() if not name.startswith("output/")}
        found = broken(outcome, story) or lost(before, after, f"{story}: {outcome.command}")
        if found or outcome.code == 0 or "skip" not in extra:
            return found
        return Finding("d", "stops for an image that is to be skipped", f"{story}: {outcome.command}", outcome.stderr)


def make(folder: Path, group: Sequence[Picture], bench: Bench) -> list[str]:
    """Two classes with three good images in each split, and the damaged ones anywhere; returns the names of those."""
    for split in ("train", "test"):
        for shade, kind in enumerate(("ant", "bee")):
            (folder / "images" / split / kind).mkdir(parents=True)
            for number in range(3):
                path = folder / "images" / split / kind / f"good{number}.png"
                Image.new("RGB", (40, 36), (80 * number, 200 * shade, 90)).save(path)
    names = []
    for number, (name, content) in enumerate(group):
        place = folder / "images" / bench.rng.choice(("train", "test")) / bench.rng.choice(("ant", "bee"))
        path = place / f"{number:02d}-{Path(name).name}"
        path.write_bytes(content)
        names.append(path.relative_to(folder).as_posix())
    (folder / "my.yaml").write_text(DATA)
    return names
