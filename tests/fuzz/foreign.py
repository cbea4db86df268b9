"""Output folders that hold the user's own files under the names that a run writes: every byte of them survives."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random

import yaml

from tests.fuzz.bench import SHORT, TINY, Bench
from tests.fuzz.promises import PASSING, Finding, broken, lost, snapshot

RUN = [*TINY, *SHORT, "output_dir", "run"]
OURS = (
    *(
        "config.yaml",
        "metrics.json",
        "logits.safetensors",
        "val_logits.safetensors",
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
REFUSED: Mapping[str, list[str]] = {
    "an unknown option": ["lrr", "1"],
    "a value of another kind": ["lr", "fast"],
    "missing weights": ["pretrained", "nowhere.safetensors"],
    "missing images": ["dataset", "ImageFolder", "root", "nowhere"],
    "a broken image": ["dataset", "ImageFolder", "root", "images", "num_classes", "2"],
    "other options": ["lr", "0.123"],
    "nothing trained": ["test_only", "True", "model_dir", "nowhere"],
    "an export that does not fit": ["export", "peft"],
    "a learning rate without numbers": ["lr", "1e30"],
}
ACCEPTED: Mapping[str, list[str]] = {
    "a good command": [],
    "two stages": ["-m", "tiny_clip_h2t"],
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
    words = [*RUN, *(REFUSED | ACCEPTED)[what], *rng.choice([[], ["resume", "False"]])]
    if "-m" in words[4:]:
        words = ["-d", "fake_lt", *words[-2 - ("resume" in words) * 2 :], *TINY[4:], *SHORT, "output_dir", "run"]
    kind = "a finished run" if of_ours else "a folder of the user's"
    story = f"{kind} with {', '.join(mine)}, {what}"
    files = {name: digest for name, digest in snapshot(folder / "output" / "run").items() if name in mine}
    before = snapshot(folder, PASSING if of_ours else ())
    outcome = bench.run(words, folder)
    found = broken(outcome, story) or moved_or_kept(files, folder / "output", f"{story}: {outcome.command}")
    if found:
        return found
    if outcome.code == 2 and (changed := _difference(before, snapshot(folder, PASSING if of_ours else ()))):
        return Finding("a", f"a refused command changes {kind}", f"{story}: {outcome.command}", str(changed[:10]))
    if outcome.code == 0 and not of_ours:
        return Finding("a", "runs in a folder that is the user's", f"{story}: {outcome.command}", outcome.stdout[-500:])
    return None


def put_files(run: Path, rng: Random, whole: bool) -> list[str]:
    """Files of the user's, of any content; where `whole` is not set, only such as the run there has not itself."""
    taken = {each.name for each in run.iterdir()} if run.exists() else set()
    own = {"log.txt", ".lock", "tailtune.json"} | {name for name in NAMES if (run / name).exists()}
    chosen = [name for name in rng.sample(rng.choice((OURS, NAMES)), rng.randint(1, 4)) if whole or name not in own]
    if not whole:
        chosen = [name for name in chosen if name.partition("/")[0] not in taken - {"tests", "tensorboard"}] or [
            "notes.md"
        ]
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
