"""`data verify`: what is missing, damaged, listed twice or of another release is found, named and counted."""

import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision
from conftest import Cli
from PIL import Image, ImageEnhance
from test_bad_input import one_line

from tailtune.datasets.commands import verify as verify_module
from tailtune.datasets.commands.copies import MAX_PAIRS, near_copies
from tailtune.datasets.commands.split_files import SplitFiles
from tailtune.datasets.sources.cifar import ARCHIVES
from tailtune.datasets.sources.image_sources import FileSource
from tailtune.datasets.sources.published_lists import PUBLISHED
from tailtune.datasets.splits.split_records import Split

CLASSES = ("ant", "bee", "wasp")


def picture(number: int, size: int = 48) -> Image.Image:
    """Random coarse blocks, which differ much from number to number, as photographs do."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 9, 6 and 3 training images and 2 test images each."""
    root, number = tmp_path / "insects", 0
    for label, name in enumerate(CLASSES):
        for split, count in (("train", 9 - 3 * label), ("test", 2)):
            for i in range(count):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(number := number + 1).save(path)
    return root


@pytest.fixture
def report(launch: Cli, tmp_path: Path) -> Callable[..., tuple[int, str, dict]]:
    """Runs `data verify` → exit code, what it printed, and its report."""

    def call(*words: object) -> tuple[int, str, dict]:
        done = launch("data verify", *words, "--report report.json")
        assert done.stderr == ""
        return done.returncode, done.stdout, json.loads((tmp_path / "report.json").read_text())

    return call


Report = Callable[..., tuple[int, str, dict]]


def write_list(file: Path, lines: list[str]) -> None:
    file.write_text("\n".join(lines) + "\n")


# --- what is right, and what is missing ---------------------------------------------------------------------------


def test_a_clean_folder(folder: Path, report: Report) -> None:
    code, text, found = report(folder, "--decode")
    assert code == 0 and text.endswith("no problem found\n")
    assert found["schema"] == 1 and found["ok"] and found["decoded"] and found["class_names"] == list(CLASSES)
    assert found["splits"]["train"]["counts"] == [9, 6, 3] and found["splits"]["test"]["counts"] == [2, 2, 2]
    assert found["groups"] == {"many": 0, "med": 0, "few": 3}
    assert "ant 9, bee 6, wasp 3" in text


def test_held_out_images_are_a_split(folder: Path, report: Report) -> None:
    shutil.rmtree(folder / "test")
    code, _, found = report(folder, "test_per_class 1 val_per_class 1 --lists")
    assert code == 0 and found["images_checked"] is False
    counts = {name: split["counts"] for name, split in found["splits"].items()}
    assert counts == {"train": [7, 4, 1], "val": [1, 1, 1], "test": [1, 1, 1]}


def test_missing_images_are_shown_ten_at_a_time(folder: Path, report: Report, tmp_path: Path) -> None:
    lines = [f"train/{name}/{i}.png {label}" for label, name in enumerate(CLASSES) for i in range(9)]
    write_list(tmp_path / "train.txt", lines)
    write_list(tmp_path / "test.txt", [f"test/{name}/0.png {label}" for label, name in enumerate(CLASSES)])
    yaml = tmp_path / "insects.yaml"
    yaml.write_text(f"dataset: ImageList\nroot: {folder}\ntrain_list: train.txt\ntest_list: test.txt\n")
    code, text, found = report(yaml)
    assert code == 1 and "9 of 27 train images are missing" in text
    assert len(found["splits"]["train"]["missing"]) == 9 and found["splits"]["train"]["missing"][0] == "train/bee/6.png"
    shutil.rmtree(folder / "train" / "ant")
    code, text, found = report(yaml)
    assert "missing in train: 18\n" in text and "… and 8 more" in text and text.count("    train/") == 10
    assert len(found["splits"]["train"]["missing"]) == 18
    assert "1 of the 3 folders of the missing images do not exist (first: train/ant)" in found["release"][0]


def test_two_classes_of_one_name(folder: Path, report: Report, tmp_path: Path) -> None:
    """In a prompt `_` is a space, and CLIP reads capital letters as small ones."""
    (folder / "train" / "bee").rename(folder / "train" / "great_ant")
    (folder / "train" / "wasp").rename(folder / "train" / "Great ant")
    shutil.rmtree(folder / "test")
    code, text, found = report(folder, "test_per_class 1")
    said = "classes 0 'Great ant' and 2 'great_ant' have the same name, so a text encoder cannot tell them apart"
    assert code == 1 and said in text and found["problems"] == [f"{said}: give each class a name of its own"]
    (tmp_path / "names.txt").write_text("ant\nant\nant\n")
    code, text, _ = report(folder, "test_per_class 1 classnames", tmp_path / "names.txt")
    assert code == 1 and "classes 0 'ant' and 1 'ant' (and 1 more) have the same name" in text


def test_names_that_begin_with_the_folder(folder: Path, report: Report, tmp_path: Path) -> None:
    """As the files that LIFT publishes, of which its code takes the second word on."""
    for names, count in (("ant tiny ant", "bee a bee", "wasp wasp"), 1), (("ant tiny ant", "bee a bee", "hornet"), 0):
        (tmp_path / "names.txt").write_text("\n".join(names))
        code, _, found = report(folder, "classnames", tmp_path / "names.txt")
        assert (
            code == 0 and sum("begins with the folder of its class, as 'ant tiny" in n for n in found["notes"]) == count
        )


def test_what_a_folder_leaves_out_is_a_note(folder: Path, report: Report) -> None:
    (folder / "train" / "ant" / "notes.txt").touch()
    assert "1 file of another kind (.txt)" in report(folder)[2]["notes"][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere.yaml", "does not exist"),
        ("cifar11", "unknown data config 'cifar11'; did you mean 'cifar10'"),
        ("insects --lists --decode", "--lists looks for no image"),
        ("insects --split test", "--split is for data with list files"),
        (
            "inat2018 lists insects --split val",
            r"have lists of train \(iNaturalist18_train.txt\), test \(iNaturalist18_val.txt\) only",
        ),
        ("insects/train", "holds no folder train; `.* data new insects/train` makes splits of it"),
        ("insects lr fast", "lr must be a number"),
        ("insects --report insects/train/ant/0.png/r.json", "cannot write .*r.json"),
        ("insects root elsewhere", "image folder not found"),
        ("places_lt lists insects", "list file not found: .*Places_LT_train.txt.*6392252f8ae867bc"),
    ],
)
def test_wrong_input_is_one_line(folder: Path, launch: Cli, words: str, message: str) -> None:
    done = launch("data verify", words)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr), done.stderr


def test_the_overview_and_unknown_commands(launch: Cli) -> None:
    assert "data verify NAME|YAML|FOLDER" in launch("data").stdout == launch("data --help").stdout
    assert launch("data verfy x").stderr.startswith("error: unknown data command 'verfy'; did you mean 'verify'?")


# --- damaged files --------------------------------------------------------------------------------------------------


def test_files_that_are_no_images_are_named_with_their_reason(folder: Path, report: Report) -> None:
    ants = folder / "train" / "ant"
    os.mkfifo(ants / "fifo.png")
    (ants / "loop.png").symlink_to("loop.png")
    (ants / "broken.png").symlink_to("nothing.png")
    (ants / "empty.png").touch()
    (ants / "text.png").write_text("no image at all")
    picture(0).save(ants / "bomb.bmp")
    with (ants / "bomb.bmp").open("r+b") as file:
        file.seek(18)
        file.write(struct.pack("<ii", 20_000, 20_000))
    whole = (ants / "0.png").read_bytes()
    (ants / "cut.png").write_bytes(whole[: len(whole) // 2])
    (ants / "again").symlink_to("..")
    code, text, found = report(folder, "--decode")
    assert code == 1 and found["splits"]["train"]["missing"] == ["train/ant/broken.png"]
    problems = found["splits"]["train"]["unreadable"]
    assert {Path(path).stem for path in problems} == {"fifo", "loop", "empty", "text", "bomb", "cut"}
    assert problems["train/ant/fifo.png"] == "a FIFO, not a file" and "pixels" in problems["train/ant/bomb.bmp"]
    assert "train/ant/cut.png: " in text and "6 of 25 train images are unreadable" in text
    code, _, found = report(folder)
    assert code == 1 and "train/ant/cut.png" not in found["splits"]["train"]["unreadable"], "found by decoding only"


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_images_are_decoded_or_reported(folder: Path, report: Report, count: int) -> None:
    draw = random.Random(0)
    target = folder / "train" / "bee"
    for number in range(count):
        data = bytearray((folder / "train" / "ant" / f"{number % 9}.png").read_bytes())
        for _ in range(draw.randrange(1, 20)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (target / f"damaged{number:04}.png").write_bytes(data[: draw.randrange(len(data))] if number % 3 == 0 else data)
    code, _, found = report(folder, "--decode")
    assert code == 1 and 0 < len(found["splits"]["train"]["unreadable"]) <= count
    assert found["splits"]["train"]["missing"] == [] and found["splits"]["test"]["unreadable"] == {}


# --- copies -------------------------------------------------------------------------------------------------------


def test_the_same_file_in_two_splits(folder: Path, report: Report) -> None:
    shutil.copy(folder / "train" / "ant" / "3.png", folder / "test" / "bee" / "other.png")
    shutil.copy(folder / "train" / "ant" / "3.png", folder / "train" / "ant" / "3 again.png")
    shutil.copy(folder / "train" / "ant" / "4.png", folder / "train" / "ant" / "twice.png")
    size = (folder / "train" / "ant" / "5.png").stat().st_size
    same_size = bytearray((folder / "train" / "ant" / "5.png").read_bytes())
    same_size[-1] ^= 1
    (folder / "test" / "ant" / "size.png").write_bytes(same_size)
    assert (folder / "test" / "ant" / "size.png").stat().st_size == size
    code, text, found = report(folder)
    assert code == 1 and "1 image is in several splits" in text
    (group,) = found["duplicates"]["exact"]
    assert [tuple(entry.values()) for entry in group] == [
        ("train", "train/ant/3 again.png"),
        ("train", "train/ant/3.png"),
        ("test", "test/bee/other.png"),
    ]
    assert "    train: train/ant/3 again.png = test: test/bee/other.png (and 1 more)\n" in text
    assert found["duplicates"]["near"] is None


def test_nearly_the_same_image_in_two_splits(folder: Path, report: Report) -> None:
    original = Image.open(folder / "train" / "ant" / "3.png")
    changed = ImageEnhance.Brightness(original.resize((80, 80))).enhance(0.9)
    changed.save(folder / "test" / "bee" / "other.jpg", quality=60)
    shutil.copy(folder / "train" / "ant" / "4.png", folder / "test" / "ant" / "copy.png")
    code, text, found = report(folder, "--near")
    (pair,) = found["duplicates"]["near"]
    assert (pair["a"], pair["b"]) == ("train: train/ant/3.png", "test: test/bee/other.jpg") and pair["bits"] <= 4
    assert len(found["duplicates"]["exact"]) == 1, "an exact copy is not shown again"
    assert "nearly the same image in several splits: 1\n" in text
    (folder / "test" / "ant" / "copy.png").unlink()
    assert report(folder, "--near")[0] == 0, "similar images are no error by themselves"


def test_a_path_in_two_lists(folder: Path, report: Report, tmp_path: Path) -> None:
    for split, lines in (
        ("train", ["ant/0.png 0", "ant/1.png 0", "bee/0.png 1"]),
        ("test", ["bee/0.png 1", "ant/0.png 0"]),
    ):
        write_list(tmp_path / f"{split}.txt", [f"train/{line}" for line in lines])
    (tmp_path / "own.yaml").write_text(
        "dataset: ImageList\nroot: nowhere\ntrain_list: train.txt\ntest_list: test.txt\n"
    )
    code, text, found = report("own.yaml --lists")
    assert code == 1 and "train: train/ant/0.png = test: train/ant/0.png" in text
    assert found["problems"] == ["2 images are in several splits"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("imb_factor 0.001", "class 'bee' (label 1) has no training image: add one, or raise imb_factor"),
        ("val_per_class 3", "val_per_class 3: class 'wasp' has only 3 images"),
    ],
)
def test_what_training_refuses_is_refused(folder: Path, launch: Cli, words: str, said: str) -> None:
    for command in (f"data verify {folder}", f"-d {folder}.yaml -m tiny_clip --dry-run"):
        folder.with_suffix(".yaml").write_text(f"dataset: ImageFolder\nroot: {folder}\n")
        one_line(launch(f"{command} {words}"), said)


def test_very_many_similar_images_are_counted(tmp_path: Path) -> None:
    source = FileSource(tmp_path, [f"{i}.png" for i in range(1000)], np.zeros(1000))
    files = SplitFiles({"train": Split(source, np.arange(800)), "test": Split(source, np.arange(800, 1000))})
    found = near_copies(files, np.arange(1000), np.zeros(1000, dtype=np.uint64))
    assert found.total == 800 * 200 and len(found.pairs) == MAX_PAIRS


def test_distances_of_hashes(tmp_path: Path) -> None:
    source = FileSource(tmp_path, list("abcd"), np.zeros(4))
    files = SplitFiles({"train": Split(source, np.arange(2)), "test": Split(source, np.arange(2, 4))})
    hashes = np.array([0, 2**64 - 1, 0b1111 << 60, 0b11111], dtype=np.uint64)
    assert near_copies(files, np.arange(4), hashes).pairs == [(0, 2, 4)]


# --- published data sets ---------------------------------------------------------------------------------------------


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Two classes in ImageNet's layout, and lists with the published names and other content."""
    root = tmp_path / "imagenet"
    train = [f"train/n0144076{k}/n0144076{k}_{i}.JPEG {k}" for k in (0, 1) for i in range(3)]
    test = [f"val/n0144076{k}/ILSVRC2012_val_0000000{i}.JPEG {k}" for k in (0, 1) for i in (2 * k, 2 * k + 1)]
    for number, line in enumerate(train + test):
        path = root / line.split()[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    write_list(root / "ImageNet_LT_train.txt", train)
    write_list(root / "ImageNet_LT_test.txt", test)
    return root


OPTIONS = "imagenet_lt num_classes 2 class_counts none root"


def test_another_content_of_a_published_list(imagenet: Path, report: Report) -> None:
    code, text, found = report(OPTIONS, imagenet)
    assert code == 1 and found["splits"]["test"]["missing"] == [] and found["class_names"] == ["n01440760", "n01440761"]
    status = found["lists"][str(imagenet / "ImageNet_LT_train.txt")]
    assert "is not the published list: git blob" in status and PUBLISHED["ImageNet_LT_train.txt"][0] in status
    assert len(found["problems"]) == 2 and status in text


def test_a_list_under_the_name_of_another(imagenet: Path, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    from tailtune.datasets.commands import releases
    from tailtune.datasets.sources.published_lists import blob_id

    blob = blob_id((imagenet / "ImageNet_LT_train.txt").read_bytes())
    table = {"ImageNet_LT_train.txt": ("0" * 40,), "ImageNet_LT_val.txt": (blob,)}
    monkeypatch.setattr(releases, "PUBLISHED", table)
    status = report(OPTIONS, imagenet)[2]["lists"][str(imagenet / "ImageNet_LT_train.txt")]
    assert status == "has the content of ImageNet_LT_val.txt"
    monkeypatch.setattr(releases, "PUBLISHED", {"ImageNet_LT_train.txt": (blob,)})
    assert report(OPTIONS, imagenet)[2]["lists"][str(imagenet / "ImageNet_LT_train.txt")] == "published"


def test_validation_images_of_imagenet_may_lie_in_one_folder(imagenet: Path, report: Report) -> None:
    for path in list(imagenet.glob("val/*/*")):
        path.rename(imagenet / "val" / path.name)
    assert report(OPTIONS, imagenet)[2]["splits"]["test"]["missing"] == []


@pytest.mark.slow
def test_a_run_on_such_a_folder(imagenet: Path, launch: Cli) -> None:
    for path in list(imagenet.glob("val/*/*")):
        path.rename(imagenet / "val" / path.name)
    words = "-m tiny_clip_peft pretrained none classnames none max_steps 1 num_workers 0 test_dists none"
    done = launch(f"-d {OPTIONS.removesuffix(' root')}", words, "root", imagenet)
    assert done.returncode == 0, done.stderr
    (metrics,) = Path("output").glob("*/metrics.json")
    assert json.loads(metrics.read_text())["class_counts"] == [3, 3]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda root: (root / "wnids.txt").touch(), "this is Tiny-ImageNet-200"),
        (lambda root: (root / "ILSVRC2012_img_val.tar").touch(), "is not unpacked"),
        (lambda root: (root / "train" / "n01440764.tar").touch(), "the archives in train/ are not unpacked"),
        (lambda root: shutil.copytree(root / "moved", root / "ILSVRC/Data/CLS-LOC/val"), "set root .*Data/CLS-LOC"),
        (lambda root: shutil.copytree(root / "moved", root / "inner" / "val"), "set root .*inner"),
        (lambda root: shutil.copytree(root / "moved", root.parent / "val"), "holds the missing images; set root"),
        (lambda root: None, "2 of the 2 folders of the missing images do not exist .first: val/n01440760."),
    ],
)
def test_another_release_or_layout_is_recognised(
    imagenet: Path, report: Report, change: Callable[[Path], object], says: str
) -> None:
    (imagenet / "val").rename(imagenet / "moved")
    (imagenet / "loop").symlink_to("loop")
    change(imagenet)
    code, text, found = report(OPTIONS, imagenet)
    assert code == 1 and len(found["splits"]["test"]["missing"]) == 4
    assert re.search(says, " ".join(found["release"])), found["release"]
    assert "probably: " in text


def test_another_extension_is_recognised(imagenet: Path, report: Report) -> None:
    for path in list(imagenet.glob("train/*/*")):
        path.rename(path.with_suffix(".jpg"))
    assert "another extension" in report(OPTIONS, imagenet)[2]["release"][0]


@pytest.mark.parametrize("size", ["256", "large"])
def test_the_archives_of_places(tmp_path: Path, report: Report, size: str) -> None:
    train = ["train/abbey/1.jpg 0", "train/bazaar-indoor/1.jpg 1"]
    test = ["val/abbey/Places365_val_1.jpg 0", "val/bazaar-indoor/Places365_val_2.jpg 1"]
    real = [f"data_{size}/a/abbey/1.jpg", f"data_{size}/b/bazaar/indoor/1.jpg"]
    for number, path in enumerate([*real, f"val_{size}/Places365_val_1.jpg", f"val_{size}/Places365_val_2.jpg"]):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / path)
    write_list(tmp_path / "Places_LT_train.txt", train)
    write_list(tmp_path / "Places_LT_test.txt", test)
    found = report("places_lt num_classes 2 class_counts none root", tmp_path)[2]
    assert [split["missing"] for split in found["splits"].values()] == [[], []]
    assert found["class_names"] == ["abbey", "bazaar-indoor"]


def test_one_list_can_be_verified_without_the_others(imagenet: Path, report: Report) -> None:
    (imagenet / "ImageNet_LT_train.txt").unlink()
    found = report(OPTIONS, imagenet, "--split test --lists")[2]
    assert found["splits"].keys() == {"test"} and found["splits"]["test"]["counts"] == [2, 2] and found["groups"] == {}


def test_the_files_of_cifar(tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    code, text, found = report("cifar10_ir100 root", tmp_path)
    assert code == 1 and found["files"]["data_batch_1"] == "not found"
    assert found["splits"]["train"]["counts"] == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    small = type(ARCHIVES["CIFAR10"])("", "", "folder", {"a": "900150983cd24fb0d6963f7d28e17f72", "b": "0" * 32})
    monkeypatch.setattr(verify_module, "ARCHIVES", {"CIFAR10": small})
    (tmp_path / "folder").mkdir()
    for name in "ab":
        (tmp_path / "folder" / name).write_text("abc")
    code, text, found = report("cifar10 root", tmp_path)
    assert code == 1 and found["files"]["a"] == "" and "is damaged: its MD5 is 9001" in found["files"]["b"]


def test_the_archives_of_cifar_are_torchvisions() -> None:
    for name, archive in ARCHIVES.items():
        dataset = getattr(torchvision.datasets, name)
        files = dict(dataset.train_list + dataset.test_list) | {dataset.meta["filename"]: dataset.meta["md5"]}
        assert (archive.url, archive.md5, archive.folder) == (dataset.url, dataset.tgz_md5, dataset.base_folder)
        assert dict(archive.files) == files


def test_data_of_a_library_have_nothing_to_verify(report: Report) -> None:
    code, _, found = report("digits_lt")
    assert code == 0 and "no files to check" in found["notes"][0]
