"""`data new`: a stratified split of one's own images, whose groups stay together, and lists that train."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import Cli
from PIL import Image
from test_data_verify import picture

from tailtune import main
from tailtune.datasets.commands.assign_splits import assign_splits, wanted_counts
from tailtune.datasets.commands.grouping import joined

COUNTS = {"ant": 30, "bee": 12, "wasp": 4, "moth": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four classes of 30, 12, 4 and 1 images; the names say that three images each are of one video."""
    number = 0
    for name, count in COUNTS.items():
        for i in range(count):
            path = tmp_path / "my insects" / name / f"video{i // 3}_{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(number := number + 1, 16).save(path)
    return tmp_path / "my insects"


def lists(output: Path) -> dict[str, list[str]]:
    """Split → its lines."""
    return {path.stem: path.read_text().splitlines() for path in output.glob("*.txt") if path.stem in SPLITS}


SPLITS = ("train", "val", "test")
New = Callable[..., tuple[int, str, str]]


@pytest.fixture
def new(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> New:
    """Runs `data new` on the folder, whose name has a blank → exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str, of: Path = folder) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main.main(["data", "new", str(of), *words])
        return code, *capsys.readouterr()

    return call


def test_the_split_is_stratified_and_complete(new: New, folder: Path, tmp_path: Path) -> None:
    code, text, error = new("--test", "0.25", "--val", "2")
    assert (code, error) == (0, "")
    made = lists(tmp_path / "my_insects_data")
    classes = {split: np.bincount([int(line[-1]) for line in lines], minlength=4) for split, lines in made.items()}
    assert (tmp_path / "my_insects_data" / "classnames.txt").read_text().split() == ["ant", "bee", "moth", "wasp"]
    assert classes["test"].tolist() == [8, 3, 0, 1] and classes["val"].tolist() == [2, 2, 0, 2]
    assert classes["train"].tolist() == [20, 7, 1, 1]
    paths = [line.rpartition(" ")[0] for lines in made.values() for line in lines]
    assert sorted(paths) == sorted(p.relative_to(folder).as_posix() for p in folder.glob("*/*"))
    assert "1 class (moth) without a test image" in text and "0 many-shot, 1 medium-shot, 3 few-shot" in text
    assert "-d my_insects_data/my_insects.yaml" in text
    with Image.open(tmp_path / "my_insects_data" / "class_counts.png") as curve:
        assert curve.format == "PNG" and len(curve.convert("RGB").getcolors(1 << 20)) > 3


def test_the_yaml_trains_and_verifies(new: New, launch: Cli, folder: Path) -> None:
    assert new("--output", "made", "--val", "1")[0] == 0
    done = launch("data verify made/my_insects.yaml --decode --report r.json")
    assert done.returncode == 0, done.stdout
    assert json.loads(Path("r.json").read_text())["splits"].keys() == {"train", "val", "test"}
    done = launch("-d made/my_insects.yaml -m tiny_clip_peft pretrained none max_steps 1 num_workers 0")
    assert done.returncode == 0, done.stderr
    (file,) = Path("output").glob("my_insects*/metrics.json")
    metrics = json.loads(file.read_text())
    assert sum(metrics["class_counts"]) == len(lists(Path("made"))["train"])


def test_the_seed_decides_and_classes_are_independent(new: New, folder: Path) -> None:
    new("--output", "a")
    new("--output", "b")
    new("--output", "c", "--seed", "1")
    assert lists(Path("a")) == lists(Path("b")) and lists(Path("a"))["test"] != lists(Path("c"))["test"]
    for number in range(20):
        picture(100 + number).save(folder / "wasp" / f"new{number}.png")
    new("--output", "d")
    of_ants = [[line for line in lists(Path(made))["test"] if line.startswith("ant/")] for made in "ad"]
    assert of_ants[0] == of_ants[1]


@pytest.mark.parametrize("kind", ["regex", "csv"])
def test_a_group_comes_into_one_split(new: New, folder: Path, kind: str) -> None:
    rule = r"^(\w+/video\d+)_"
    if kind == "csv":
        paths = [p.relative_to(folder).as_posix() for p in folder.glob("*/*")]
        rows = [f"{path},{path.partition('_')[0]},x" for path in paths]
        Path("groups.csv").write_text("\n".join(["file,group,other", *rows]))
        rule = "groups.csv"
    code, text, error = new("--output", "made", "--val", "0.2", "--groups", rule)
    assert (code, error) == (0, "")
    split_of: dict[str, set[str]] = {}
    for split, lines in lists(Path("made")).items():
        for line in lines:
            split_of.setdefault(line.partition("_")[0], set()).add(split)
    assert all(len(splits) == 1 for splits in split_of.values()) and len(split_of) == 10 + 4 + 2 + 1
    assert {next(iter(splits)) for splits in split_of.values()} == {"train", "val", "test"}


def test_groups_of_several_classes() -> None:
    random = np.random.default_rng(0)
    labels, patients = random.integers(0, 3, 600), random.integers(0, 60, 600)
    splits = assign_splits(labels, [f"patient {each}" for each in patients], {"test": 0.2, "val": 0.1}, 3, seed=0)
    for patient in range(60):
        assert len(set(splits[patients == patient])) == 1
    for label in range(3):
        total = (labels == label).sum()
        assert abs((splits[labels == label] == "test").sum() - 0.2 * total) < 0.05 * total
        assert abs((splits[labels == label] == "val").sum() - 0.1 * total) < 0.05 * total


def test_every_class_keeps_a_training_image() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 1])
    splits = assign_splits(labels, ["a", "a", "a", "b", "c", "c", "c"], {"test": 2}, 2, seed=0)
    assert splits[labels == 1].tolist() == ["train"] * 3, "its images are all in one group"
    assert set(splits[labels == 0]) == {"train", "test"}


def test_wanted_counts() -> None:
    counts = np.array([100, 10, 3, 2, 1, 0])
    assert wanted_counts(counts, 0.2).tolist() == [20, 2, 1, 1, 0, 0]
    assert wanted_counts(counts, 5).tolist() == [5, 5, 2, 1, 0, 0]


def test_joined_groups() -> None:
    assert joined(["a", "b", "c", "d"], [[1, 2], [2, 3]]) == ["a", "b", "b", "b"]
    assert joined(["a", "b"], []) == ["a", "b"]


def test_copies_stay_together_and_contradictions_are_left_out(new: New, folder: Path) -> None:
    for number in range(8):
        shutil.copy(folder / "ant" / "video0_0.png", folder / "ant" / f"copy{number}.png")
    shutil.copy(folder / "bee" / "video0_0.png", folder / "wasp" / "a bee.png")
    code, text, _ = new("--output", "made")
    holding = [
        s
        for s, lines in lists(Path("made")).items()
        if any("copy" in line or "video0_0.png 0" in line for line in lines)
    ]
    assert len(holding) == 1
    assert "9 files have copies" not in text and "1 files have copies in the same class" in text
    left_out = Path("made/left_out.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in left_out) == ["bee/video0_0.png", "wasp/a bee.png"]
    assert "the same file is in several classes" in left_out[0]


def test_what_cannot_be_used_is_left_out_with_its_reason(new: New, folder: Path) -> None:
    ants = folder / "ant"
    os.mkfifo(ants / "fifo.png")
    (ants / "loop.png").symlink_to("loop.png")
    (ants / "text.png").write_text("no image")
    picture(500).save(ants / "line\nbreak.png")
    os.rename(ants / "video0_0.png", os.fsencode(ants) + b"/\xff.png")
    whole = (ants / "video0_1.png").read_bytes()
    (ants / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty").mkdir()
    (folder / "ant" / "notes.md").touch()
    code, text, _ = new("--output", "made", "--decode")
    assert code == 0 and "left out: 6 images" in text and "1 class (empty) left out" in text
    assert "1 file of another kind (.md)" in text
    reasons = dict(line.split("\t") for line in Path("made/left_out.txt").read_text().splitlines())
    assert reasons["ant/line break.png"] == "its name holds a line break"
    assert reasons["ant/\\udcff.png"] == "its name is not UTF-8" and reasons["ant/fifo.png"] == "a FIFO, not a file"
    assert "ant/cut.png" in reasons and sum(map(len, lists(Path("made")).values())) == sum(COUNTS.values()) - 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "my insects/made"], "lies in the folder of the images"),
        (["--output", "there"], "there exists already: name another folder"),
        (["--test", "1.5"], "--test 1.5: give a share below 1, or a whole number"),
        (["--test", "0"], "needs test images"),
        (["--test", "inf"], "--test inf: give a share below 1, or a whole number"),
        (["--val", "nan"], "--val nan: give a share below 1, or a whole number"),
        (["--groups", "("], "is no regular expression"),
        (["--groups", "none.csv"], "cannot read none.csv: not found"),
        (["--groups", "wrong.csv"], "must name the columns file and group .found: a, b"),
        (["--groups", "few.csv"], "45 of 47 images have no group"),
        (["--groups", "two.csv"], "line 3: ant/video0_0.png has two groups, x and y"),
        (["--groups", "bee"], "have no group .first: ant/"),
    ],
)  # fmt: skip
def test_wrong_input_writes_nothing(new: New, words: list[str], message: str) -> None:
    Path("there").mkdir()
    Path("wrong.csv").write_text("a,b\n1,2\n")
    Path("few.csv").write_text("file,group\nant/video0_0.png,x\nant/video0_1.png,x\n")
    Path("two.csv").write_text("file,group\nant/video0_0.png,x\nant/video0_0.png,y\n")
    before = sorted(os.listdir())
    code, text, error = new(*words)
    assert (code, text) == (2, "") and len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert sorted(os.listdir()) == before and not list(Path("there").iterdir())


def test_folders_that_cannot_be_split(new: New, folder: Path, tmp_path: Path) -> None:
    assert "image folder not found" in new(of=tmp_path / "nowhere")[2]
    (tmp_path / "one" / "ant").mkdir(parents=True)
    picture(1).save(tmp_path / "one" / "ant" / "1.png")
    assert "has images of 1 classes; give at least two" in new(of=tmp_path / "one")[2]
    shutil.copytree(folder, tmp_path / "split" / "train")
    assert "is split already" in new(of=tmp_path / "split")[2]
    assert new("--output", "made", of=tmp_path / "split" / "train")[0] == 0 and Path("made/split.yaml").exists()


def test_a_full_disk_leaves_nothing_behind(new: New, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(os.listdir())
    monkeypatch.setattr("os.fsync", full)
    code, _, error = new("--output", "made")
    assert (
        code == 2
        and error == "error: cannot write made: No space left on device; free the space or choose another folder\n"
    )
    assert sorted(os.listdir()) == before


def test_the_yaml_is_plain(new: New, folder: Path) -> None:
    new("--output", "made")
    text = Path("made/my_insects.yaml").read_text()
    assert text.startswith("# 4 classes of my insects, 1 … 24 training images each; made by data new, seed 0\n")
    content = yaml.safe_load(text)
    assert content["dataset"] == "ImageList" and content["root"] == str(folder) and "val_list" not in content
