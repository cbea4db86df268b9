"""`data shard`: what it writes, what it refuses, and indexes of tar files that others have written."""

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import Cli
from PIL import Image
from test_bad_input import one_line

from tailtune.datasets.commands import shard as shard_module
from tailtune.datasets.commands.shard import parse_size
from tailtune.datasets.sources.shards import open_shards

NAMES = ("a.b.c.png", "a_b.jpg", "a_b.png", "x y.png", "ü.png", ".hidden.png", "UPPER.JPEG", "../up.png")


def picture(number: int, kind: str = "png") -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lists of images of two classes with odd names, one of them absolute, one listed twice; their YAML."""
    monkeypatch.chdir(tmp_path)
    lines = []
    for number, name in enumerate(NAMES):
        path = tmp_path / "pics" / "sub.folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, "jpeg" if name.lower().endswith(("jpg", "jpeg")) else "png"))
        lines.append(f"sub.folder/{name} {number % 2}")
    lines += [f"{tmp_path}/pics/sub.folder/x y.png 1", lines[0]]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    (tmp_path / "test.txt").write_text("\n".join(lines[:3]))
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    (tmp_path / "odd.yaml").write_text(
        "dataset: ImageList\nroot: pics\ntrain_list: train.txt\ntest_list: test.txt\nclassnames: names.txt\n"
        "many_above: 3\nfew_below: 1\nimb_factor: 1\naugment: none\n"
    )
    return tmp_path / "odd.yaml"


def members(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def test_what_is_written(listed: Path, launch: Cli) -> None:
    done = launch("data shard odd.yaml --out out --max-size 1GB")
    assert (done.returncode, done.stderr) == (0, "")
    size = Path("out/train-00000.tar").stat().st_size
    assert f"  train: 10 images, {size:,} bytes, 1 shard\n  test: 3 images, " in done.stdout
    assert "train from them: python main.py -d out/odd.yaml -m" in done.stdout
    assert sorted(os.listdir("out")) == [
        *("odd.yaml", "test-00000.tar", "test.index.safetensors", "train-00000.tar", "train.index.safetensors")
    ]
    assert yaml.safe_load(Path("out/odd.yaml").read_text()) == {
        **{"dataset": "Shards", "root": ".", "many_above": 3, "few_below": 1, "imb_factor": 1.0, "augment": "none"}
    }
    names = members(Path("out/train-00000.tar"))
    assert len(names) == len(set(names)) == 2 * 9, "an image that is listed twice is there once"
    assert names[:6:2] == ["sub.folder/a_b_c.png", "sub.folder/a_b.jpg", "sub.folder/a_b_2.png"]
    assert names[1:6:2] == ["sub.folder/a_b_c.cls", "sub.folder/a_b.cls", "sub.folder/a_b_2.cls"]
    assert not any(name.startswith("/") or ".." in name for name in names)
    shards = open_shards(Path("out"))
    source = shards.by_split["train"]
    assert shards.class_names == ("dog", "cat") and len(source) == 10
    for index, path in enumerate(source.paths):
        assert source.encoded(index) == (Path("pics") / path).read_bytes()
    assert source.index.offset[0] == source.index.offset[9]


def test_other_programs_read_the_members(listed: Path, launch: Cli) -> None:
    """By the rules of WebDataset: the key ends at the first dot of the file name."""
    launch("data shard odd.yaml --out out")
    source = open_shards(Path("out")).by_split["train"]
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open("out/train-00000.tar") as tar:
        for member in tar:
            key, extension = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member.name).groups()  # type: ignore[union-attr]
            file = tar.extractfile(member)
            assert file is not None and (member.mtime, member.uid, member.mode) == (0, 0, 0o644)
            found.setdefault(key, {})[extension] = file.read()
    assert [set(sample) for sample in found.values()] == [
        {"png", "cls"},
        {"jpg", "cls"},
        *[{"png", "cls"}] * 4,
        {"jpg", "cls"},
        *[{"png", "cls"}] * 2,
    ]
    for index, sample in enumerate(found.values()):
        assert sample.get("png", sample.get("jpg")) == source.encoded(index)
        assert int(sample["cls"]) == source.labels[index]


def test_the_same_bytes_each_time(listed: Path, launch: Cli) -> None:
    launch("data shard odd.yaml --out one --max-size 5KB")
    os.utime("pics/sub.folder/a_b.png", (1, 1))
    launch("data shard odd.yaml --out two --max-size 5KB")
    one, two = ({path.name: path.read_bytes() for path in Path(name).iterdir()} for name in ("one", "two"))
    assert one == two and sum(name.endswith(".tar") for name in one) > 3
    for name, content in one.items():
        assert not name.endswith(".tar") or len(content) <= 5000 or len(members(Path("one") / name)) == 2


def test_shards_of_shards(listed: Path, launch: Cli) -> None:
    launch("data shard odd.yaml --out one")
    assert launch("data shard one/odd.yaml --out two --max-size 5KB").returncode == 0
    one, two = (open_shards(Path(name)).by_split["train"] for name in ("one", "two"))
    assert one.paths == two.paths and len(two.index.shards) > len(one.index.shards)
    assert [one.encoded(index) for index in range(10)] == [two.encoded(index) for index in range(10)]


def test_published_lists_stay_known(listed: Path, launch: Cli) -> None:
    """The subsets that lists name are taken from the test images, which are those of the list."""
    Path("lists").mkdir()
    Path("test.txt").rename("lists/test.txt")
    Path("train.txt").rename("lists/train.txt")
    Path("lists/odd_forward2.txt").write_text("".join(Path("lists/test.txt").read_text().splitlines(True)[:1]))
    text = listed.read_text().replace("imb_factor: 1\n", "shift_files: 'odd_{name}.txt'\nlists: lists\n")
    listed.write_text(text)
    done = launch("data shard odd.yaml --out out")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(Path("out/odd.yaml").read_text())
    assert config["lists"] == str(Path("lists").absolute()) and config["test_list"] == "test.txt"
    words = (
        "-m tiny_clip pretrained none zero_shot False init_head none max_steps 1 test_dists [forward2] num_workers 0"
    )
    for data, name in (("odd.yaml", "files"), ("out/odd.yaml", "shards")):
        done = launch("-d", data, words, "output_dir", name)
        assert done.returncode == 0, done.stderr
    found = [json.loads(Path(f"output/{name}/metrics.json").read_text()) for name in ("files", "shards")]
    assert found[0]["distributions"] == found[1]["distributions"]
    assert found[1]["distributions"]["forward2"]["origin"].startswith("list odd_forward2.txt")


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("odd.yaml --out pics", "--out pics exists already: name another folder"),
        ("odd.yaml --out s3://bucket/odd", "is an address: write the shards to a folder, and copy the folder there"),
        ("odd.yaml --out out --max-size much", "--max-size much: give a number of bytes such as 256MB"),
        ("odd.yaml --out out --max-size 0", "--max-size 0: give a number of bytes"),
        ("odd.yaml --out pics/sub.folder/a_b.png/out", "cannot write pics/sub.folder/a_b.png/out: Not a directory"),
        ("pics --index-only --max-size 1MB", "--index-only writes no shard; leave out --max-size"),
        ("odd.yaml", "one of the arguments --out --index-only is required"),
        ("digits_lt --out out", "the images of data 'digits_lt' come with a library and are no files"),
        ("nowhere.yaml --out out", "data config 'nowhere.yaml' does not exist"),
        ("odd.yaml --out out root elsewhere", "image folder not found"),
        ("odd.yaml --out out learning 3", "unknown option 'learning'"),
    ],
)
def test_refusals(listed: Path, launch: Cli, words: str, message: str) -> None:
    before = sorted(Path().rglob("*"))
    one_line(launch("data shard", words), message)
    assert sorted(Path().rglob("*")) == before


def test_unreadable_images(listed: Path, launch: Cli) -> None:
    Path("pics/sub.folder/a_b.png").write_bytes(b"no image")
    Path("pics/sub.folder/a_b.jpg").unlink()
    line = one_line(
        launch("data shard odd.yaml --out out"), "a_b.png (line 3 of", "begins with b'no image'", "not found"
    )
    assert line.endswith("replace them, or take them out of the lists or folders") and not Path("out").exists()


def test_an_image_that_changes_meanwhile(listed: Path, launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(*words: object) -> int:
        Path("pics/sub.folder/a_b.png").write_bytes(b"no image")
        return 0

    monkeypatch.setattr(shard_module, "_needed_bytes", spoilt)
    one_line(launch("data shard odd.yaml --out out"), "a_b.png (line 3 of", "has changed: it is no image any more")
    assert not [name for name in os.listdir() if "out" in name]


def test_a_full_disk_leaves_nothing(listed: Path, launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir())
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        one_line(launch("data shard odd.yaml --out out"), "cannot write out: No space left on device")
    space = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: space)
    one_line(launch("data shard odd.yaml --out out"), "the shards need ", " bytes, but ", " has 1,000 left")
    assert sorted(os.listdir()) == before


def test_an_interruption_leaves_nothing(listed: Path, launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        assert any(name.startswith(".out.") for name in os.listdir())
        raise KeyboardInterrupt

    before = sorted(os.listdir())
    monkeypatch.setattr(shard_module, "write_indexes", interrupted)
    assert launch("data shard odd.yaml --out out").returncode == 130
    assert sorted(os.listdir()) == before


def test_the_folder_of_the_images_is_no_place(launch: Cli, tmp_path: Path) -> None:
    for name in ("ant", "b\udce9e"):
        (tmp_path / "pics/train" / name).mkdir(parents=True)
        (tmp_path / "pics/train" / name / "1.png").write_bytes(picture(1))
        (tmp_path / "pics/train" / name / "2\udce9.png").write_bytes(picture(2))
    one_line(launch("data shard pics test_per_class 1 --out pics/train/out"), "lies in the folder of the images")
    assert launch("data shard pics test_per_class 1 --out pics/out").returncode == 0
    assert yaml.safe_load(Path("pics/out/pics.yaml").read_text())["test_per_class"] == 1
    assert open_shards(Path("pics/out")).class_names == ("ant", "b\udce9e")
    source = open_shards(Path("pics/out")).by_split["train"]
    assert list(source.paths)[1] == "train/ant/2\udce9.png" and source.encoded(1) == picture(2)


def test_sizes() -> None:
    assert [parse_size(text) for text in ("1", "2KB", "1.5 MB", "1GiB", "3kib")] == [1, 2000, 1500000, 1 << 30, 3 << 10]
    for text in ("", "MB", "-1", "0.1", "1e3", "5TB", "1 2"):
        with pytest.raises(ValueError):
            parse_size(text)


# --- tar files of others -------------------------------------------------------------------------------------------

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`write("x-train-0.tar", ("a.jpg", …), …)` writes a tar file with these members into the folder `wds`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wds").mkdir()

    def call(name: str, *content: tuple[str, bytes]) -> None:
        with tarfile.open(tmp_path / "wds" / name, "w") as tar:
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for member, data in content:
                info = tarfile.TarInfo(member)
                info.size, info.mtime = len(data), 7
                tar.addfile(info, io.BytesIO(data))

    return call


def sample(
    key: str, number: int, label: bytes = b"0", kind: str = "jpeg", extension: str = "cls"
) -> list[tuple[str, bytes]]:
    return [(f"{key}.{extension}", label), (f"{key}.{kind}", picture(number, kind)), (f"{key}.txt", b"a caption")]


def test_an_index_of_foreign_tars(write: Write, launch: Cli) -> None:
    write("my-train-000.tar", *sample("fol.der/07", 0), *sample("b" * 120, 1, b"1\n", "webp"))
    write("my-train-001.tar", *sample("c", 2, b'{"label": 1, "id": "x"}', "png", "json"), *sample("d", 3))
    write("my-val-000.tar", *sample("e", 4, b"1"), *sample("f", 5))
    Path("names.txt").write_text("dog\ncat\n")
    done = launch("data shard wds --index-only classnames", Path("names.txt").absolute(), "many_above 9")
    assert (done.returncode, done.stderr) == (0, "")
    assert "wds: 2 classes\n  train: 4 images, " in done.stdout and "\n  test: 2 images, " in done.stdout
    source = open_shards(Path("wds")).by_split["train"]
    assert list(source.paths) == ["fol.der/07.jpeg", f"{'b' * 120}.webp", "c.png", "d.jpeg"]
    assert source.labels.tolist() == [0, 1, 1, 0]
    kinds = ("jpeg", "webp", "png", "jpeg")
    assert [source.encoded(index) for index in range(4)] == [picture(i, kind) for i, kind in enumerate(kinds)]
    assert launch("data verify wds/wds.yaml --decode").returncode == 0
    done = launch("-d wds/wds.yaml -m tiny_clip_peft pretrained none max_steps 1 num_workers 0 output_dir run")
    assert done.returncode == 0, done.stderr
    assert "cat" in Path("output/run/checkpoint/facts.json").read_text()
    one_line(launch("data shard wds --index-only"), "train.index.safetensors exists already: remove it")


def test_tars_that_name_their_images_alike(write: Write, launch: Cli) -> None:
    """WebDataset asks for different names only within a tar file. A run knows its images again by their names."""
    for number, split in enumerate(("train-0", "train-1", "test-0")):
        write(f"{split}.tar", *sample("0", 2 * number), *sample("1", 2 * number + 1, b"1"))
    assert launch("data shard wds --index-only").returncode == 0
    by_split = open_shards(Path("wds")).by_split
    assert list(by_split["train"].paths) == [
        "train-0.tar/0.jpeg",
        "train-0.tar/1.jpeg",
        "train-1.tar/0.jpeg",
        "train-1.tar/1.jpeg",
    ]
    assert list(by_split["test"].paths) == ["test-0.tar/0.jpeg", "test-0.tar/1.jpeg"]
    words = "-d wds/wds.yaml -m tiny_clip_peft pretrained none max_steps 1 num_workers 0 output_dir run"
    done = launch(words)
    assert done.returncode == 0 and "were trained on" not in done.stdout, done.stderr
    assert "finished before" in launch(words).stdout


GOOD = [*sample("a", 0, b"0"), *sample("b", 1, b"1")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train-0.tar", [*GOOD, ("c.jpg", picture(1))], "train-0.tar: key c has no label: a member .cls with a whole"),
        ("train-0.tar", [*GOOD, *sample("c", 2, b"dog")], "train-0.tar: key c has no label"),
        (
            "train-0.tar",
            [*sample("c", 2, b"1"), ("c.json", b'{"label": 0}')],
            "c.json has label 0, but its key has label 1",
        ),
        ("train-0.tar", [*GOOD, *sample("c", 2, b"-1")], "train-0.tar: key c has no label"),
        ("train-0.tar", [*GOOD, *sample("c", 2, b'{"label": "dog"}', "jpeg", "json")], "key c has no label"),
        ("train-0.tar", [*GOOD, ("c.cls", b"0")], "train-0.tar: key c has no image (.jpg .jpeg"),
        ("train-0.tar", [*GOOD, ("c.cls", b"0"), ("c.jpg", b"<html>")], "train-0.tar: c.jpg is no image"),
        ("train-0.tar", [*sample("c", 0), ("c.png", picture(1))], "c.png is a second image of the same key"),
        ("train-0.tar", [*GOOD, *sample("c", 2, b"7")], "label 7 makes 8 classes, 5 of them without a training image"),
        ("train-0.tar", [], "hold no image"),
        ("test-0.tar", GOOD, "holds no tar file of training images"),
        ("train-0.tar.gz", GOOD, "holds no file *.tar; unpack compressed ones"),
    ],
)
def test_foreign_tars_that_do_not_fit(
    write: Write, launch: Cli, name: str, content: list[tuple[str, bytes]], said: str
) -> None:
    write(name, *content)
    one_line(launch("data shard wds --index-only"), said)
    assert os.listdir("wds") == [name]


def test_damaged_foreign_tars(write: Write, launch: Cli) -> None:
    write("train-0.tar", *GOOD)
    whole = Path("wds/train-0.tar").read_bytes()
    for content, said in ((whole[:2000], "damaged"), (b"no tar" * 999, "is no tar file"), (b"", "is no tar file")):
        Path("wds/train-0.tar").write_bytes(content)
        one_line(launch("data shard wds --index-only"), "train-0.tar", said)
    write("other.tar", *GOOD)
    one_line(launch("data shard wds --index-only"), "other.tar: its name has none of the words train, val and test")
    one_line(launch("data shard nowhere --index-only"), "nowhere is no folder")
