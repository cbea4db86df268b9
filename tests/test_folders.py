"""Class folders: what belongs to a class, what is left out and said so, and where links may lead."""

import logging
import os
from pathlib import Path

import pytest
import torchvision
from PIL import Image

from tailtune.configs.errors import UserError
from tailtune.datasets.images.image_files import EXTENSIONS, DecodeError, load_rgb
from tailtune.datasets.sources.image_folder import class_folders, read_folder


def save(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)


@pytest.fixture
def root(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Path:
    """train/{ant,bee,wasp}/{0,1}.png and test/ the same."""
    caplog.set_level(logging.INFO, "tailtune")
    for split in ("train", "test"):
        save(*(tmp_path / "data" / split / name / f"{i}.png" for name in ("ant", "bee", "wasp") for i in range(2)))
    return tmp_path / "data"


def found(root: Path, split: str = "train") -> dict[str, list[str]]:
    """Class → its images, without the class folder's path."""
    names = class_folders(root / "train")
    listing = read_folder(root, split, names)
    images: dict[str, list[str]] = {name: [] for name in names}
    for path, label in zip(listing.paths, listing.labels.tolist(), strict=True):
        images[names[label]].append(path.removeprefix(f"{split}/{names[label]}/"))
    return images


PLAIN = {name: ["0.png", "1.png"] for name in ("ant", "bee", "wasp")}


def test_ordinary_folders_are_read_in_torchvisions_order(root: Path) -> None:
    for name in (
        "a b/1.png",
        "a/2.png",
        "a-b/3.JPG",
        "a/b/4.png",
        "B/5.png",
        "a/B/6.jpeg",
        "Ä/7.bmp",
        "a.png",
        "10.png",
    ):
        save(root / "train" / "bee" / name)
    save(root / "train" / "Zebra" / "0.png")
    names = class_folders(root / "train")
    assert names == ["Zebra", "ant", "bee", "wasp"]
    listing = read_folder(root, "train", names)
    numbers = {name: label for label, name in enumerate(names)}
    expected = torchvision.datasets.folder.make_dataset(str(root / "train"), numbers, extensions=EXTENSIONS)
    assert [(str(root / path), label) for path, label in zip(listing.paths, listing.labels, strict=True)] == expected
    assert len(listing.paths) == 16


def test_all_formats_and_upper_case_extensions_are_found(root: Path) -> None:
    for number, end in enumerate(EXTENSIONS):
        (root / "train" / "bee" / f"x{number}{end.upper()}").touch()
    assert len(found(root)["bee"]) == 2 + len(EXTENSIONS)


# --- left out --------------------------------------------------------------------------------------------------------


def test_hidden_and_other_files_are_left_out_and_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    bee = root / "train" / "bee"
    save(bee / ".ipynb_checkpoints" / "0-checkpoint.png", bee / "._0.png", root / "train" / ".cache" / "1.png")
    for name in ("Thumbs.db", "a.mp4", "b.txt", "c.TXT", "README"):
        (bee / name).touch()
    save(root / "train" / "stray.png")
    assert found(root) == PLAIN
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"left out of {root / 'train'}: 4 hidden files or folders, 4 files of other kinds (.txt, .mp4, no extension), "
        "1 image outside the class folders"
    )


def test_nothing_is_said_where_nothing_is_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert found(root) == found(root, "test") == PLAIN
    assert not caplog.records


def test_class_folders_without_an_image_are_named(root: Path) -> None:
    (root / "train" / "moth").mkdir()
    (root / "train" / "bee" / "x.heic").touch()
    with pytest.raises(UserError, match=r"no image in the class folder .*train/moth: add one, or .*; .*\.heic"):
        found(root)
    (root / "train" / "__pycache__").mkdir()
    with pytest.raises(UserError, match=r"class folder .*train/__pycache__ \(and in 1 more\)"):
        found(root)
    with pytest.raises(UserError, match="no images in the class folders of .*test"):
        for path in (root / "test").rglob("*.png"):
            path.unlink()
        read_folder(root, "test", ["ant", "bee", "wasp"])


def test_a_class_may_be_missing_in_the_test_split(root: Path) -> None:
    for path in (root / "test" / "bee").iterdir():
        path.unlink()
    assert found(root, "test") == PLAIN | {"bee": []}
    (root / "test" / "bee").rmdir()
    assert found(root, "test") == PLAIN | {"bee": []}


def test_a_folder_that_cannot_be_listed_is_not_silently_empty(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "train" / "bee" / "locked").mkdir()
    scan = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # file modes do not hold for root
    with pytest.raises(UserError, match="cannot read the folder .*bee/locked: Permission denied"):
        found(root)


# --- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "../ant", "sub", "sub/..", "../../test/bee", "/"])
def test_a_link_back_into_the_data_adds_nothing(root: Path, caplog: pytest.LogCaptureFixture, target: str) -> None:
    save(root / "train" / "bee" / "sub" / "2.png")
    (root / "train" / "bee" / "again").symlink_to(target)
    assert found(root) == PLAIN | {"bee": ["0.png", "1.png", "sub/2.png"]}
    assert "1 folder that is read elsewhere (train/bee/again)" in caplog.text


def test_links_to_other_folders_are_followed_once(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "disk" / "more" / "7.png", tmp_path / "disk" / "more" / "deep" / "8.png")
    (tmp_path / "disk" / "more" / "loop").symlink_to("..")
    (root / "train" / "bee" / "more").symlink_to(tmp_path / "disk" / "more")
    (root / "train" / "bee" / "most").symlink_to(tmp_path / "disk" / "more" / "deep")
    (root / "train" / "wasp" / "more").symlink_to(tmp_path / "disk" / "more")
    images = found(root)
    assert images["bee"] == ["0.png", "1.png", "more/7.png", "most/8.png"]
    assert images["wasp"] == PLAIN["wasp"]
    assert "folders that are read elsewhere" in caplog.text


def test_splits_and_class_folders_may_lie_elsewhere(root: Path, tmp_path: Path) -> None:
    (root / "train" / "bee").rename(tmp_path / "bees")
    (root / "train" / "bee").symlink_to(tmp_path / "bees")
    (tmp_path / "bees" / "again").symlink_to(".")
    (tmp_path / "bees" / "up").symlink_to(root / "train")
    (root / "test").rename(tmp_path / "tests")
    (root / "test").symlink_to(tmp_path / "tests")
    (tmp_path / "tests" / "ant" / "train").symlink_to(root / "train" / "ant")
    (tmp_path / "tests" / "ant" / "bees").symlink_to(tmp_path / "bees")
    assert found(root) == found(root, "test") == PLAIN


def test_images_that_are_links_are_read(root: Path, tmp_path: Path) -> None:
    save(tmp_path / "pool" / "x.png")
    (root / "train" / "bee" / "2.png").symlink_to(tmp_path / "pool" / "x.png")
    assert found(root)["bee"] == ["0.png", "1.png", "2.png"]


def test_two_classes_in_one_folder_are_refused(root: Path) -> None:
    (root / "train" / "hornet").symlink_to("wasp")
    with pytest.raises(UserError, match="train/wasp is the same folder as .*train/hornet: remove one"):
        found(root)
    (root / "train" / "hornet").unlink()
    save(root / "train" / "wasp" / "large" / "0.png")
    (root / "train" / "hornet").symlink_to("wasp/large")
    with pytest.raises(UserError, match="train/hornet lies in the folder of another class, 'wasp'"):
        found(root)


def test_training_folders_in_another_split_are_warned_of(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in (root / "test" / "ant").iterdir():
        path.unlink()
    (root / "test" / "ant").rmdir()
    (root / "test" / "ant").symlink_to("../train/ant")
    assert found(root, "test") == PLAIN
    assert "1 of its class folders also belong to train (ant" in caplog.text


def test_broken_links_are_not_silently_gone(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "train" / "bee" / "2.png").symlink_to("/nowhere/2.png")
    (root / "train" / "bee" / "more").symlink_to("/nowhere")
    (root / "train" / "bee" / "self").symlink_to("self")
    assert found(root)["bee"] == ["0.png", "1.png", "2.png"]
    assert "2 broken links" in caplog.text
    with pytest.raises(DecodeError, match="not found: a link to /nowhere/2.png"):
        load_rgb(root / "train" / "bee" / "2.png")
    (root / "train" / "cicada").symlink_to("/nowhere/cicada")  # else every later class would get another label
    with pytest.raises(UserError, match="train/cicada is a broken link to /nowhere/cicada"):
        found(root)


def test_a_fifo_in_a_class_folder_is_listed_and_bad(root: Path) -> None:
    os.mkfifo(root / "train" / "bee" / "2.png")
    assert found(root)["bee"] == ["0.png", "1.png", "2.png"]
    with pytest.raises(DecodeError, match="a FIFO"):
        load_rgb(root / "train" / "bee" / "2.png")
