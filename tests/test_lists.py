"""List files, class names and JSON that users write: odd spellings are read, mistakes are named, nothing takes long."""

import json
import os
import pickle
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_info
from tailtune.datasets.sources.image_list import (
    MAX_LABEL,
    find_list,
    number_of_classes,
    read_counts,
    read_list,
    read_names,
)
from tailtune.datasets.sources.image_sources import FileSource
from tailtune.datasets.sources.inaturalist import taxon_labels
from tailtune.datasets.sources.path_list import PathList
from tailtune.datasets.sources.text_files import MAX_JSON, MAX_LINE
from tailtune.datasets.splits.split_records import Record

Read = Callable[[Path], object]
READERS: dict[str, Read] = {
    "list": read_list,
    "names": read_names,
    "taxa": lambda file: taxon_labels(file, "name"),
    "counts": lambda file: read_counts(file, ""),
}
each_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@contextmanager
def cheap() -> Iterator[None]:
    """Five seconds and 200 MB at most; the memory is the process's peak, so it may miss something, never accuse."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - began < 5
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 200e6


def written(folder: Path, text: str | bytes, name: str = "list.txt") -> Path:
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


# --- spelling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_blanks_and_tabs(tmp_path: Path, end: str, mark: str) -> None:
    lines = ["a.png 0", "", "my cats/one 1.png 1", "  b.png\t0  ", "c\td.png \t 1", "e\u2028f.png 0", "g.png 01"]
    listing = read_list(written(tmp_path, mark + end.join(lines)))
    assert listing.paths == ["a.png", "my cats/one 1.png", "b.png", "c\td.png", "e\u2028f.png", "g.png"]
    assert listing.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert [*listing.lines] == [1, 3, 4, 5, 6, 7]


def test_absolute_paths_and_paths_to_other_folders_are_kept(tmp_path: Path) -> None:
    listing = read_list(written(tmp_path, "/data/a.png 0\n../other/b.png 1\n./c.png 0\n"))
    assert listing.paths == ["/data/a.png", "../other/b.png", "./c.png"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("b.png,0", "line 2: expected 'relative/path label'.* got 'b.png,0'"),
        ("b.png", "line 2: expected"),
        ("7", "line 2: expected"),
        ("b.png 1.0", "line 2: expected"),
        ("b.png -1", "line 2: expected"),
        ("b.png ٣", "line 2: expected"),
        ("b.png ²", "line 2: expected"),
        ("x" * 1000, r"line 2: expected .*x …'$"),
        ("b\0.png 0", "line 2 holds a NUL character"),
        ("b.png 10000000", f"line 2: label 10000000 is above {MAX_LABEL}"),
        (f"b.png {2**63}", f"line 2: label {2**63} is above"),
        (f"b.png {'9' * 5000}", r"line 2: label 9{40} is above"),
        ("a.png 1", "line 2: a.png has label 1, but label 0 in line 1"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_list(written(tmp_path, f"a.png 0\n{line}\n"))
    assert str(tmp_path / "list.txt") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_that_are_listed_again_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listing = read_list(written(tmp_path, "a.png 0\nb.png 1\na.png 0\na.png 0\n"))
    assert listing.labels.tolist() == [0, 1, 0, 0]
    assert "list.txt: 2 lines repeat an image of an earlier line" in caplog.text


# --- labels ----------------------------------------------------------------------------------------------------------


def lists(folder: Path, config: Callable[..., CfgNode]) -> CfgNode:
    yaml = written(folder, "dataset: ImageList\nroot: .\ntrain_list: train.txt\ntest_list: test.txt\n", "my.yaml")
    return config(str(yaml), "tiny_clip_peft")


def test_one_mistyped_label_makes_no_million_classes(tmp_path: Path, config: Callable[..., CfgNode]) -> None:
    written(tmp_path, "a.png 0\nb.png 1\nc.png 9999999\n", "train.txt")
    written(tmp_path, "d.png 0\n", "test.txt")
    with cheap(), pytest.raises(UserError, match="train.txt line 3: label 9999999 makes 10000000 classes"):
        build_info(lists(tmp_path, config))
    written(tmp_path, "a.png 0\nb.png 1000000000\n", "train.txt")
    with cheap(), pytest.raises(UserError, match="train.txt line 2: label 1000000000 is above"):
        build_info(lists(tmp_path, config))


def test_the_number_of_classes_follows_from_the_labels(tmp_path: Path) -> None:
    train = read_list(written(tmp_path, "a.png 0\nb.png 2\nc.png 1\nd.png 2\n", "train.txt"))
    test = read_list(written(tmp_path, "e.png 1\n", "test.txt"))
    assert number_of_classes(train, [train, test], None) == 3
    assert number_of_classes(train, [test], 4) == 4
    with pytest.raises(UserError, match="num_classes 5: .*train.txt lists only 4 images"):
        number_of_classes(train, [test], 5)
    more = read_list(written(tmp_path, "e.png 1\nf.png 4\n", "test.txt"))
    message = "test.txt line 2: label 4 makes 5 classes, 2 of them without an image in .*train.txt .first: label 3"
    with pytest.raises(UserError, match=message):
        number_of_classes(train, [more], None)
    gap = read_list(written(tmp_path, "a.png 0\nb.png 2\n", "train.txt"))
    with pytest.raises(UserError, match="train.txt line 2: label 2 makes 3 classes, 1 of them .*label 1.;"):
        number_of_classes(gap, [], None)


# --- class names -----------------------------------------------------------------------------------------------------


def test_class_names(tmp_path: Path) -> None:
    assert read_names(written(tmp_path, "\ufeff tom cat \r\ndog\r\n\r\n \r\n")) == ("tom cat", "dog")
    with pytest.raises(UserError, match="list.txt line 2 is empty"):
        read_names(written(tmp_path, "cat\n\ndog\n"))
    with pytest.raises(UserError, match="list.txt line 1 is empty"):
        read_names(written(tmp_path, "\ncat\n"))


# --- no text, no file, too much --------------------------------------------------------------------------------------


@each_reader
@pytest.mark.parametrize("data", [b"caf\xe9.png 0\n", "a.png 0\n".encode("utf-16"), b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_what_is_no_text_in_utf_8(tmp_path: Path, read: Read, data: bytes) -> None:
    with pytest.raises(UserError, match="not a text file|UTF-8|not JSON"):
        read(written(tmp_path, data))


@each_reader
def test_a_large_file_that_is_no_list_is_not_read_through(tmp_path: Path, read: Read) -> None:
    file = written(tmp_path, "a" * (2 * MAX_LINE))
    os.truncate(file, 2 << 30)  # 2 GiB that take no room on the disk
    with cheap(), pytest.raises(UserError, match="not a text file|larger than 64 MiB"):
        read(file)
    file.write_bytes(bytes(1000))
    os.truncate(file, 2 << 30)
    with cheap(), pytest.raises(UserError, match="line 1 holds a NUL character|larger than 64 MiB"):
        read(file)


@each_reader
def test_folders_and_fifos_are_refused_at_once(tmp_path: Path, read: Read) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, reason in (("fifo", "a FIFO, not a file"), ("folder", "a folder, not a file"), ("gone", "not found")):
        with pytest.raises(UserError, match=f"cannot read .*{name}: {reason}"):
            read(tmp_path / name)


def test_a_list_that_is_no_file_is_named_so(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, reason in (
        ("fifo", "a FIFO"),
        ("folder", "a folder"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null"),
    ):
        with pytest.raises(UserError, match=f"list file not found: .*{reason}.*set `lists`"):
            find_list(name, [tmp_path])


@pytest.mark.parametrize("read", [READERS["taxa"], READERS["counts"]], ids=["taxa", "counts"])
@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[" * 900 + "]" * 900,
        "[1, 2",
        "[" + "9" * 5000 + "]",
        "[1e999, NaN]",
        "[-1]",
        "[true]",
        "[1.5]",
        "[]",
        "{}",
        "7",
        "null",
        '"text"',
        f"[{10**300}]",
        "[" + "0," * 11_000_000 + "0]",
        json.dumps([{"id": 1, "name": "a"}]),
        json.dumps([{"id": "0", "name": "a"}]),
        json.dumps([{"id": 0}]),
    ],
    ids=lambda text: f"{text[:12]}-{len(text)}",
)
def test_json_of_another_kind_is_refused(tmp_path: Path, read: Read, text: str) -> None:
    with cheap_enough(text), pytest.raises(UserError) as caught:
        read(written(tmp_path, text))
    assert str(tmp_path / "list.txt") in str(caught.value) or "label_field" in str(caught.value)
    assert "\n" not in str(caught.value)


@contextmanager
def cheap_enough(text: str) -> Iterator[None]:
    """Five seconds, and a list of as many numbers as fit may take its memory."""
    assert len(text) < MAX_JSON
    began = time.process_time()
    yield
    assert time.process_time() - began < 5


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_list_costs_less_than_100_bytes_a_line(tmp_path: Path) -> None:
    """For iNaturalist's 437,513 lines: 35 MB instead of 74. Positions, labels and sizes of the split take 32 bytes."""
    lines = [f"train_val2018/Plantae/{i % 8142}/{i:032x}.jpg {i % 8142}" for i in range(20_000)]
    file = written(tmp_path, "\n".join(lines))
    tracemalloc.start()
    try:
        listing = read_list(file)
        of_list = tracemalloc.get_traced_memory()[0] / len(lines)
        source, indices = FileSource(tmp_path, listing.paths, listing.labels), np.arange(len(lines))
        record = Record.of(source, indices, indices)
        of_both = tracemalloc.get_traced_memory()[0] / len(lines)
    finally:
        tracemalloc.stop()
    assert of_list < 85 and of_both < of_list + 34
    assert [*record.paths] == [line.rpartition(" ")[0] for line in lines]


def test_path_lists() -> None:
    names = ["a", "", "b/ü.png", "c\udce9.png", "d"]
    paths = PathList(names)
    assert [*paths] == names == [paths[i] for i in range(5)] and paths == names and len(paths) == 5
    assert paths[-1] == "d" and paths[1:3] == names[1:3] and paths[::2] == names[::2]
    view = paths.at(np.array([3, 0, 3]))
    assert [*view] == ["c\udce9.png", "a", "c\udce9.png"] and view[1:] == ["a", "c\udce9.png"]
    assert view.at(np.array([1])) == ["a"] and "a" in view and "d" not in view
    assert paths != names[:4] and PathList(()) == [] and not PathList(())
    assert pickle.loads(pickle.dumps(view)) == view
    assert paths != "a" and PathList(["1"]) != [1] and PathList(["a", "b"]) != "ab"
    for position in (5, -6):
        with pytest.raises(IndexError):
            _ = paths[position]
