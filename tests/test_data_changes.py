"""Data that change between two commands: what a user is told, and which numbers are shown."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cli
from PIL import Image
from test_bad_input import one_line, signal_after
from yacs.config import CfgNode

from tailtune.datasets.build_data import build_data
from tailtune.datasets.long_tail import random_positions
from tailtune.datasets.splits.compare_records import compare_records
from tailtune.datasets.splits.split_records import Record, StoredSplits, parse_splits, split_files

TRAIN = "-d insects.yaml -m tiny_clip_peft pretrained none num_epochs 1 num_workers 0 output_dir run"
RUN = Path("output/run")


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def insects(tmp_path: Path) -> Path:
    """Class folders of 12, 10 and 8 images, of which 3 are held out."""
    for label, (name, count) in enumerate((("ant", 12), ("bee", 10), ("fly", 8))):
        for index in range(count):
            draw(tmp_path / "pics" / "train" / name / f"{index:03d}.png", 100 * label + index)
    (tmp_path / "insects.yaml").write_text("dataset: ImageFolder\nroot: pics\ntest_per_class: 3\n")
    return tmp_path / "pics"


@pytest.fixture
def listed(insects: Path) -> Path:
    """The same images in lists: 6 of each class for training, 2 for the test."""
    for split, first, last in (("train", 0, 6), ("test", 6, 8)):
        lines = [
            f"train/{name}/{index:03d}.png {label}\n"
            for label, name in enumerate(("ant", "bee", "fly"))
            for index in range(first, last)
        ]
        (insects.parent / f"{split}.txt").write_text("".join(lines))
    options = "dataset: ImageList\nroot: pics\ntrain_list: train.txt\ntest_list: test.txt\n"
    (insects.parent / "insects.yaml").write_text(options)
    return insects.parent


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder for all tests of this file, empty at first: a run knows the path of its data config."""
    folder = tmp_path_factory.getbasetemp() / "data_changes"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


TRAINED: dict[str, Path] = {}
"""YAML → a copy of what `TRAIN` leaves beside it."""


@pytest.fixture
def trained(launch: Cli, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], None]:
    """`trained()` leaves what `TRAIN` leaves, which runs once for each kind of data."""

    def call() -> None:
        kind, output = (tmp_path / "insects.yaml").read_text(), tmp_path / "output"
        if kind in TRAINED:
            shutil.copytree(TRAINED[kind], output)
        else:
            done(launch, TRAIN)
            TRAINED[kind] = Path(shutil.copytree(output, tmp_path_factory.mktemp("trained") / "output"))

    return call


def split(name: str, run: Path = RUN) -> list[str]:
    """Paths of a split that a run has written down."""
    return [line.rpartition(" ")[0] for line in (run / "splits" / f"{name}.txt").read_text().splitlines()]


def result(folder: Path = RUN) -> dict[str, Any]:
    return dict(json.loads((folder / "metrics.json").read_text()))


def accuracies(folder: Path = RUN) -> list[float]:
    """Of each class; what the stored logits answer differs by their rounding in the digits of the likelihood."""
    return list(result(folder)["test"]["per_class_acc"])


def done(launch: Cli, words: str, *parts: str) -> str:
    """What a command that succeeds says."""
    ended = launch(words)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    for part in parts:
        assert part in ended.stdout
    return ended.stdout


# --- hold-outs -------------------------------------------------------------------------------------------------------


def test_more_files_do_not_enter_a_split(launch: Cli, insects: Path, trained: Callable[[], None]) -> None:
    """Whether their names sort before those that were there, or behind."""
    trained()
    train, test = split("train"), split("test")
    assert len(train) == 21 and len(test) == 9 and not {*train} & {*test}
    first = result()
    for index in range(30):
        draw(insects / "train" / "ant" / f"{'000' if index % 2 else 'x'}{index:02d}.png", 900 + index)
    done(launch, TRAIN, "30 images are new since the run", "in none of them", "`resume False`", "finished before")
    for words in ("test_only True", "test_only True tte True", "test_only True model_dir run output_dir other"):
        done(launch, f"{TRAIN} {words}", "30 images are new")
    for home in (RUN / "tests/default", RUN / "tests/tte_True", *Path("output/other/tests").iterdir()):
        assert sum(result(home)["class_counts"]) == 21
        assert result(home)["evaluation"]["images"] == first["evaluation"]["images"]
    assert accuracies(RUN / "tests/default") == accuracies()
    done(launch, f"{TRAIN} resume False", "51 training images")
    assert len(split("train")) == 51 and len(split("train", Path("output/run.previous-1"))) == 21


def test_one_class_moves_no_other(insects: Path, config: Callable[..., CfgNode]) -> None:
    def held_out() -> list[str]:
        return list(build_data(config(str(insects.parent / "insects.yaml"), "tiny_clip_peft")).records["test"].paths)

    before = held_out()
    for index in range(30):
        draw(insects / "train" / "ant" / f"000{index:02d}.png", 900 + index)
    after = held_out()
    assert [path for path in after if "/ant/" not in path] == [path for path in before if "/ant/" not in path]
    assert after != before and len(before) == 9


def test_a_later_stage_keeps_the_hold_out(launch: Cli, insects: Path, trained: Callable[[], None]) -> None:
    trained()
    held = split("test")
    for index in range(30):
        draw(insects / "train" / "ant" / f"000{index:02d}.png", 900 + index)
    (Path("output/two")).mkdir()
    Path("output/run").rename("output/two/stage1")
    words = TRAIN.replace("output_dir run", "output_dir two")
    done(launch, f"{words} method crt after tiny_clip_peft after.num_epochs 1 after.pretrained none")
    assert split("test", Path("output/two")) == held


@pytest.mark.parametrize("own, before, counts", [(2, None, (6, 21)), (None, 2, (21, 6))])
def test_each_stage_has_its_own_subset(
    launch: Cli, insects: Path, own: int | None, before: int | None, counts: tuple[int, int]
) -> None:
    words = f"{TRAIN} method crt after tiny_clip_peft after.num_epochs 1 after.pretrained none"
    done(launch, f"{words} subset_cap {own} after.subset_cap {before}")
    stages = [RUN, RUN / "stage1"]
    assert tuple(len(split("train", run)) for run in stages) == counts
    assert split("test", stages[0]) == split("test", stages[1])
    assert not {*split("train", stages[0])} & {*split("test")}


def test_gone_test_images(launch: Cli, insects: Path, trained: Callable[[], None]) -> None:
    trained()
    for path in split("test")[:2]:
        (insects / path).unlink()
    said = "2 test images are gone (train/ant/"
    text = done(launch, f"{TRAIN} test_only True", said, "none of them was trained on", "7 test images")
    assert "using the logits" not in text and "finished before" not in text
    (home,) = (RUN / "tests").iterdir()
    assert home.name.startswith("default_test_")
    done(launch, f"{TRAIN} test_only True", said, f"finished before; the result of {home}")
    done(launch, TRAIN, said, f"finished before; the result of {home}")
    assert result()["evaluation"]["images"] != result(home)["evaluation"]["images"]


def test_gone_training_images(launch: Cli, insects: Path, trained: Callable[[], None]) -> None:
    trained()
    (insects / split("train")[0]).unlink()
    one_line(launch(TRAIN), "1 training image is gone (train/ant/", "`resume False`", "`test_only True`")
    done(launch, f"{TRAIN} test_only True", "1 training image is gone", "groups and class priors stay")
    assert accuracies(RUN / "tests/default") == accuracies()


def test_a_removed_class_makes_nothing_trained_on(launch: Cli, insects: Path, trained: Callable[[], None]) -> None:
    """The classes behind it have other numbers then, and names that files of the removed one had."""
    trained()
    for path in sorted((insects / "train" / "ant").iterdir()):
        path.unlink()
    (insects / "train" / "ant").rmdir()
    ended = launch(f"{TRAIN} test_only True")
    assert ended.returncode == 2 and "were trained on" not in ended.stdout + ended.stderr


def test_an_unfinished_run_whose_classes_moved(launch: Cli, insects: Path) -> None:
    with signal_after(1):
        assert launch(f"{TRAIN} batch_size 8 save_every 1").returncode == 130
    (insects / "train" / "ant").rename(insects / "train" / "wasp")
    one_line(launch(f"{TRAIN} batch_size 8 save_every 1"), "put the images back", "`resume False`")


def test_an_unfinished_run_that_got_more_images(launch: Cli, listed: Path) -> None:
    with signal_after(1):
        assert launch(f"{TRAIN} batch_size 8 save_every 1").returncode == 130
    lines = (listed / "train.txt").read_text()
    (listed / "train.txt").write_text(lines + "train/ant/008.png 0\ntrain/ant/009.png 0\n")
    one_line(launch(f"{TRAIN} batch_size 8 save_every 1"), "was begun, 2 training images are new (train/ant/008.png, ")
    (listed / "train.txt").write_text(lines)
    done(launch, f"{TRAIN} batch_size 8 save_every 1", "resuming after step")


def test_a_line_that_stands_twice(launch: Cli, listed: Path) -> None:
    """It counts twice in training. Where images are held out, one could be evaluated and the other trained on."""
    with (listed / "train.txt").open("a") as file:
        file.write("train/ant/000.png 0\n")
    warning = f"warning: {listed / 'train.txt'}: 1 line repeats an image of an earlier line"
    shown = [done(launch, TRAIN, "19 training images"), (RUN / "log.txt").read_text()]
    done(launch, TRAIN, "finished before")
    shown += [done(launch, f"{TRAIN} test_only True many_above 6", "using the logits")]
    assert [text.count(warning) for text in shown] == [1, 1, 1], "lists are read several times"
    said = "val_per_class 2: train/ant/000.png is listed several times", "list each image once"
    one_line(launch(f"{TRAIN} val_per_class 2 output_dir other"), *said)


def test_a_name_that_no_list_can_hold(launch: Cli, insects: Path) -> None:
    draw(insects / "train" / "ant" / "a\nb.png", 5)
    for words in ("", "on_bad_image skip"):
        one_line(launch(f"{TRAIN} {words}"), "its name holds a line break", "rename it")


# --- lists -----------------------------------------------------------------------------------------------------------


def test_a_cut_test_list_is_evaluated_anew_and_back_again(
    launch: Cli, listed: Path, trained: Callable[[], None]
) -> None:
    trained()
    whole = (listed / "test.txt").read_text()
    (listed / "test.txt").write_text("".join(line + "\n" for line in whole.splitlines()[:3]))
    text = done(launch, f"{TRAIN} test_only True", "3 test images are gone", "3 test images\n")
    assert "using the logits" not in text
    (listed / "test.txt").write_text(whole)
    done(launch, f"{TRAIN} test_only True", "using the logits of output/run/logits.safetensors")
    assert accuracies(RUN / "tests/default") == accuracies()
    done(launch, TRAIN, "finished before; the result of output/run/metrics.json")


def test_a_cut_training_list_is_no_finished_run(launch: Cli, listed: Path, trained: Callable[[], None]) -> None:
    trained()
    lines = (listed / "train.txt").read_text().splitlines()
    (listed / "train.txt").write_text(
        "".join(f"{line}\n" for line in lines if line.endswith("0")) + "\n".join(lines[-8:])
    )
    one_line(launch(TRAIN), "was trained, 4 training images are gone (train/bee/", "`resume False`")
    text = done(launch, f"{TRAIN} test_only True many_above 5", "groups and class priors stay", "using the logits")
    assert "n/a" in text
    assert result(RUN / "tests/many_above_5")["test"]["many_acc"] == result()["test"]["accuracy"]


def test_a_cut_test_list_of_a_zero_shot_classifier(launch: Cli, listed: Path) -> None:
    """Nothing was trained, so no run has stored its splits."""
    words = "-d insects.yaml -m tiny_clip zero_shot True test_only True num_workers 0 output_dir run"
    done(launch, words, "6 test images")
    done(launch, words, "finished before")
    (listed / "test.txt").write_text("".join((listed / "test.txt").read_text().splitlines(keepends=True)[:5]))
    assert "finished before" not in done(launch, words, "5 test images")
    (listed / "pics").rename(listed / "moved")
    done(launch, words, "finished before", "the data are not there to be compared")


def test_other_class_names(launch: Cli, listed: Path) -> None:
    """The classifier starts from them; the one that is not trained is made of them."""
    trained = TRAIN.replace("pretrained none", "classnames names.txt max_steps 1")
    zero_shot = "-d insects.yaml -m tiny_clip zero_shot True num_workers 0 classnames names.txt output_dir zero"
    commands = (trained, zero_shot, f"{zero_shot}_test test_only True")
    (listed / "names.txt").write_text("ant\nbee\nfly\n")
    for words in commands:
        done(launch, words)
        done(launch, words, "finished before")
    (listed / "names.txt").write_text("ant\nbumble bee\nfly\n")
    for words in commands[:2]:
        one_line(launch(words), "class 1 is 'bumble bee' and not 'bee' any more", "`resume False`")
    done(launch, f"{trained} test_only True many_above 5", "class 1 is 'bumble bee' and not 'bee' any more")
    assert "finished before" not in done(launch, commands[2])
    assert "finished before" not in done(launch, f"{zero_shot} resume False")
    (listed / "names.txt").write_text("ant\nbee\nfly\n")
    done(launch, trained, "finished before")


def test_other_class_names_in_the_middle_of_a_run(launch: Cli, listed: Path) -> None:
    words = TRAIN.replace("pretrained none", "classnames names.txt") + " batch_size 8 save_every 1"
    (listed / "names.txt").write_text("ant\nbee\nfly\n")
    with signal_after(1):
        assert launch(words).returncode == 130
    (listed / "names.txt").write_text("ant\nbee\nmoth\n")
    one_line(launch(words), "was begun, class 2 is 'moth' and not 'fly' any more; undo that", "`resume False`")
    (listed / "names.txt").write_text("ant\nbee\nfly\n")
    done(launch, words, "resuming after step")


def test_another_subset_of_built_in_data(launch: Cli) -> None:
    """Its images have no fingerprint of their own, and a folder of evaluations alone has no options to compare."""
    words = "-d digits_lt -m tiny_clip_peft pretrained none max_steps 1 num_workers 0 output_dir"
    done(launch, f"{words} run")
    words += " tests test_only True model_dir run test_train True max_test_images 99 imb_factor"
    for imb_factor in (0.1, 0.5):
        assert "finished before" not in done(launch, f"{words} {imb_factor}")


def test_another_label(launch: Cli, listed: Path, trained: Callable[[], None]) -> None:
    trained()
    (listed / "test.txt").write_text((listed / "test.txt").read_text().replace("bee/006.png 1", "bee/006.png 0"))
    done(launch, f"{TRAIN} test_only True", "1 test image is of another class now (train/bee/006.png)")


def test_a_replaced_file(launch: Cli, listed: Path, trained: Callable[[], None]) -> None:
    trained()
    Image.new("RGB", (32, 32)).save(listed / "pics/train/fly/007.png")
    done(launch, f"{TRAIN} test_only True", "1 test image is other files now")


def test_a_replaced_file_of_the_same_size(launch: Cli, listed: Path) -> None:
    """Its size tells nothing; with `data_fingerprint content` the run has read what is in it."""
    for path in (listed / "pics/train/fly").iterdir():
        path.rename(path.with_suffix(".bmp"))
        Image.new("RGB", (32, 32)).save(path.with_suffix(".bmp"))
    for name in ("train", "test"):
        text = (listed / f"{name}.txt").read_text().splitlines()
        (listed / f"{name}.txt").write_text("\n".join(x.replace(".png", ".bmp") if "fly" in x else x for x in text))
    done(launch, f"{TRAIN} data_fingerprint content")
    Image.new("RGB", (32, 32), (9, 9, 9)).save(listed / "pics/train/fly/007.bmp")
    done(launch, f"{TRAIN} test_only True", "the files of the test images have other content")


def test_lists_of_test_images_without_a_test_list(launch: Cli, listed: Path) -> None:
    """As where a shipped data config, which names such lists, is used with other data: images are drawn at random."""
    (listed / "insects.yaml").write_text(
        "dataset: ImageList\nroot: pics\ntrain_list: train.txt\ntest_per_class: 2\ndirichlet_list: test.txt\n"
        "shift_files: test.txt.{name}\ntest_dists: [uniform, dirichlet]\nshift_max: 1\n"
    )
    done(launch, TRAIN)
    origins = {each["origin"] for each in result()["distributions"].values()}
    assert origins == {"drawn with seed 0", "drawn with seed 0, without the list test.txt"}


def test_images_that_were_trained_on_are_named(launch: Cli, listed: Path) -> None:
    """By their path, and moved or copied under another one."""
    with (listed / "test.txt").open("a") as file:
        file.write("train/ant/000.png 0\ncopies/001.png 0\ncopies/other.png 0\n")
    draw(listed / "pics/copies/other.png", 77)
    (listed / "pics/copies/001.png").write_bytes((listed / "pics/train/ant/001.png").read_bytes())
    done(launch, TRAIN, "2 of 9 test images were trained on (copies/001.png, train/ant/000.png)")
    assert any("were trained on" in note for note in result()["notes"])


def test_validation_images_that_are_test_images(launch: Cli, listed: Path) -> None:
    (listed / "val.txt").write_text("".join((listed / "test.txt").read_text().splitlines(keepends=True)[:2]))
    said = "2 of 2 validation images are test images, too"
    done(launch, f"{TRAIN} val_list val.txt val_every 1 keep best:mean_acc", said)
    assert any(note.startswith(said) for note in result()["notes"])
    done(launch, f"{TRAIN} val_list val.txt val_every 1 keep best:mean_acc", "finished before")


def test_equal_names_are_noted_where_texts_are_used(launch: Cli, listed: Path) -> None:
    (listed / "names.txt").write_text("small bee\nant\nSmall_bee\n")
    words = TRAIN.replace("pretrained none", "classnames names.txt")
    said = "classes 0 'small bee' and 2 'Small_bee' have the same name"
    done(launch, words, said)
    assert any(note.startswith(said) for note in result()["notes"])
    assert said not in done(launch, f"{words} init_head class_mean output_dir other")


def test_copies_are_found_where_root_is_relative_to_the_yaml(launch: Cli, listed: Path) -> None:
    own = listed / "own"
    own.mkdir()
    for name in ("pics", "train.txt", "test.txt", "insects.yaml"):
        (listed / name).rename(own / name)
    with (own / "test.txt").open("a") as file:
        file.write("copies/001.png 0\n")
    (own / "pics/copies").mkdir()
    (own / "pics/copies/001.png").write_bytes((own / "pics/train/ant/001.png").read_bytes())
    words = TRAIN.replace("insects.yaml", "own/insects.yaml")
    done(launch, words, "1 of 7 test images were trained on (copies/001.png)")


def test_data_that_are_not_there(launch: Cli, listed: Path, trained: Callable[[], None]) -> None:
    """What is stored is shown, and that it was not compared; what needs images says that they are missing."""
    trained()
    (listed / "pics").rename(listed / "moved")
    done(launch, TRAIN, "the data are not there to be compared", "finished before")
    done(launch, f"{TRAIN} test_only True many_above 5", "not there to be compared", "using the logits")
    one_line(launch(f"{TRAIN} test_only True tte True"), "pics")
    done(launch, f"{TRAIN} test_only True tte True root moved")


def test_the_root_is_another_folder_of_other_files(launch: Cli, listed: Path, trained: Callable[[], None]) -> None:
    trained()
    for path in sorted((listed / "pics").rglob("*.png")):
        other = listed / "blank" / path.relative_to(listed / "pics")
        other.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(other)
    one_line(launch(f"{TRAIN} root blank"), "18 training images are other files now")


# --- records ---------------------------------------------------------------------------------------------------------


def test_what_is_written_down_is_read_back() -> None:
    odd = "a b/\udce9 ü\t.png"
    records = {
        "train": Record("size:1", (odd, "b.png"), (0, 1), (5, 6)),
        "test": Record.built_in("Digits"),
    }
    names = ("a\nb", "\udce9")
    kept = parse_splits(split_files(records, ["c.png"], {"d.png": "not found"}, names))
    assert kept.records.keys() == records.keys()
    for name, record in records.items():
        read = kept.records[name]
        assert read.fingerprint == record.fingerprint
        assert ([*read.paths], [*read.labels], [*read.sizes]) == (
            [*record.paths],
            [*record.labels],
            [*record.sizes],
        )
    assert (kept.unused, kept.unreadable, kept.class_names) == (("c.png",), {"d.png": "not found"}, names)


def test_changes_are_counted_and_named() -> None:
    before = Record("size:1", ("a", "b", "c", "d"), (0, 0, 1, 1), (1, 1, 1, 1))
    now = Record("size:2", ("b", "c", "d", "e", "f", "g", "h"), (1, 1, 1, 0, 0, 0, 0), (1, 2, 1, 1, 1, 1, 1))
    found = compare_records(before, now)
    assert (found.new, found.gone, found.relabelled, found.resized) == (("e", "f", "g", "h"), ("a",), ("b",), ("c",))
    assert found.describe("test") == (
        "4 test images are new (e, f, g, …), 1 is gone (a), 1 is of another class now (b), 1 is other files now "
        "(their sizes differ) (c)"
    )


def test_the_order_of_a_training_list_is_that_of_the_beginning(launch: Cli, listed: Path) -> None:
    """A run that goes on with the same images in another order trains what it would have trained."""
    words = f"{TRAIN} batch_size 8 save_every 1"
    done(launch, words.replace("output_dir run", "output_dir whole"))
    with signal_after(1):
        assert launch(words).returncode == 130
    lines = (listed / "train.txt").read_text().splitlines()
    (listed / "train.txt").write_text("\n".join(lines[::-1]))
    done(launch, words, "resuming after step")
    whole, other = (Path("output") / name / "checkpoint/tensors.safetensors" for name in ("whole", "run"))
    assert whole.read_bytes() == other.read_bytes()


def test_the_order_of_a_test_list_is_that_of_the_run(listed: Path, config: Callable[..., CfgNode]) -> None:
    """Stored logits name images by their positions, and so do test sets that a list gives."""
    lines = (listed / "test.txt").read_text().splitlines()
    (listed / "uniform.txt").write_text("\n".join(line for line in lines if "7.png" in line))
    shifts = ("shift_files", "{name}.txt", "test_dists", "uniform", "shift_max", 1)
    cfg = config(str(listed / "insects.yaml"), "tiny_clip_peft", "num_workers", 0, *shifts)
    first = build_data(cfg)
    stored = StoredSplits(first.records, (), {})
    (listed / "test.txt").write_text("\n".join([*lines[1::2], *lines[::2]]))  # 7.png before 6.png in each class
    again = build_data(cfg, stored)
    for data in (first, again):
        assert [
            f"{path} {label}" for path, label in zip(data.records["test"].paths, data.test.labels, strict=True)
        ] == lines
        assert data.test_distributions[0].positions.tolist() == [1, 3, 5]
    cut = build_data(config(str(listed / "insects.yaml"), "tiny_clip_peft", "max_test_images", 4, *shifts), stored)
    kept = random_positions(6, 4)
    assert [kept[place] for place in cut.test_distributions[0].positions] == [
        place for place in (1, 3, 5) if place in kept
    ]
