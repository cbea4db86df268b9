"""Output folders that hold the user's own files under the names that a run writes: every byte of them survives."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random

import yaml

from tailtune.tests.fuzz.bench import SHORT, TINY, Bench
from tailtune.tests.fuzz.promises import PASSING, Finding, broken, lost, snapshot

RUN = [*TINY, *SHORT, "output_dir", "run"]
TWO_STAGES = ["-d", "fake_lt", "-m", "tiny_clip_h2t", *RUN[4:]]
OURS = (
    *(
        "config.yaml",
        "metrics.json",
        "logits.safetensors",
        "val_logits.safetensors",
        "expert_weights.json",
        "log.txt",
        ".lock",
        "tailtune.json",
    ),
    *("checkpoint.pth.tar", "checkpoint/facts.json", "checkpoint/tensors.safetensors", "checkpoint/mine.bin"),
    *("state/00000002/facts.json", "state/mine", "tensorboard/events.out.tfevents.1.mine", "tensorboard/mine/plot.png"),
    *(
        "analysis/figure.pdf",
        "export/model.onnx",
        "export/onnx/mine.txt",
        "tests/test_me.py",
        "tests/default/metrics.json",
    ),
    *("splits/train.txt", "splits/test.txt", "stage1/config.yaml", "stage1/checkpoint/w.bin", "stage1/notes.md"),
    *(".config.yaml.tmp", ".checkpoint.old.tmp/w.bin", ".checkpoint.new.tmp/w.bin", "bad_images.txt", "manifest.json"),
)
"""What a run calls its files, and what may lie in its folders."""
NAMES = (*OURS, "notes.md", "src/main.py", "results.csv", "0.png")
LATE = "a learning rate without numbers"
"""Refused in the first step, when a finished run has been moved aside if `resume False` asked for that."""
REFUSED: Mapping[str, list[str]] = {
    "an unknown option": ["lrr", "1"],
    "a value of another kind": ["lr", "fast"],
    "missing weights": ["pretrained", "nowhere.safetensors"],
    "missing images": ["dataset", "ImageFolder", "root", "nowhere"],
    "a broken image": ["dataset", "ImageFolder", "root", "images", "num_classes", "2"],
    "other options": ["lr", "0.123"],
    "nothing trained": ["test_only", "True", "model_dir", "nowhere"],
    "an export that does not fit": ["export", "peft"],
    LATE: ["lr", "1e30"],
}
ACCEPTED: Mapping[str, list[str]] = {
    "a good command": [],
    "two stages": [],
    "test_only": ["test_only", "True"],
    "a further evaluation": ["few_below", "9"],
    "an export": ["export", "lift"],
}


def cases(bench: Bench) -> Iterator[Finding | None]:
    """One case is one folder and one command: of the user alone, then a finished run with files of the user's in it."""
    ours = bench.folder / "ours"
    ours.mkdir()
    bench.sound(RUN, ours)
    while True:
        for like in (None, ours):
            with bench.fresh(like) as folder:
                yield _case(bench, folder, of_ours=like is not None)


def _case(bench: Bench, folder: Path, of_ours: bool) -> Finding | None:
    rng = bench.rng
    mine = put_files(folder / "output" / "run", rng, whole=not of_ours)
    _broken_image(folder / "images")
    what = rng.choice([*REFUSED, *ACCEPTED])
    base = TWO_STAGES if what == "two stages" else RUN
    words = [*base, *(REFUSED | ACCEPTED)[what], *rng.choice([[], ["resume", "False"]])]
    kind = "a finished run" if of_ours else "a folder of the user's"
    story = f"{kind} with {', '.join(mine)}, {what}"
    files = {name: digest for name, digest in snapshot(folder / "output" / "run").items() if name in mine}
    passing = PASSING if of_ours else ()
    before = snapshot(folder / "output" / "run", passing)
    outcome = bench.run(words, folder)
    command = f"{story}: {outcome.command}"
    found = broken(outcome, story) or moved_or_kept(files, folder / "output", command)
    if found or (what == LATE and of_ours):
        return found or moved_or_kept(before, folder / "output", command)
    if outcome.code == 2 and (changed := _difference(before, snapshot(folder / "output" / "run", passing))):
        return Finding("a", f"a refused command changes {kind}", command, str(changed[:10]))
    if outcome.code == 0 and not of_ours:
        return Finding("a", "runs in a folder that is the user's", command, outcome.stdout[-500:])
    return None


def put_files(run: Path, rng: Random, whole: bool) -> list[str]:
    """Files of the user's, of any content; where `whole` is not set, only such as the run there has not itself."""
    chosen = rng.sample(rng.choice((OURS, NAMES)), rng.randint(1, 4))
    if not whole:
        taken = {each.name for each in run.iterdir()} - {"tests", "tensorboard"} | {"log.txt", ".lock"}
        free = [name for name in chosen if name.partition("/")[0] not in taken and not (run / name).exists()]
        chosen = free or ["notes.md"]
    for name in chosen:
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_content(path, rng))
    return chosen


def moved_or_kept(files: Mapping[str, str], output: Path, command: str) -> Finding | None:
    """Promise a, where a run that starts over may have moved files aside: each keeps its place in some folder."""
    kept: dict[str, str] = {}
    for folder in sorted(output.glob("run*")):
        now = snapshot(folder)
        kept |= {name: now[name] for name in now.keys() & files.keys() if kept.get(name) != files[name]}
    return lost(files, kept, command)


def _content(path: Path, rng: Random) -> bytes:
    texts = [b"mine\n", b"{}", rng.randbytes(50), yaml.safe_dump({"lr": 0.1, "data": "mine"}).encode()]
    return rng.choice(texts)


def _difference(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _broken_image(root: Path) -> None:
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.png").write_bytes(b"no image")
