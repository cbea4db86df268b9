"""Data sets from config to batches: order, purity, splits, and every message a user can meet."""

import io
import json
import logging
import os
import pickle
import subprocess
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from tiers import slow_except
from yacs.config import CfgNode

from tailtune.configs.config_files import FOLDER
from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_data, build_info
from tailtune.datasets.loading.data_loader import clean_worker_error, eval_loader, train_loader
from tailtune.datasets.loading.samplers import StepSampler
from tailtune.datasets.sources import cifar
from tailtune.datasets.sources.image_list import folder_names, read_list
from tailtune.datasets.sources.inaturalist import taxon_labels
from tailtune.datasets.sources.named_source import BadImage
from tailtune.datasets.sources.published_lists import PUBLISHED, published_at
from tailtune.datasets.splits.unreadable_images import UnreadableImages
from tailtune.datasets.table import DATASETS
from tailtune.datasets.view import View
from tailtune.trainers.option_schema import declared

TAILTUNE_DATA = Path(os.environ.get("TAILTUNE_DATA", "nowhere"))
"""A folder that may hold unpacked local data (`cifar10_jpeg`, `lt_lists`); what is absent is skipped."""

DEFAULTS = declared().defaults
DEFAULTS |= {"expand": 3, "num_workers": 0, "resolution": 28, "interpolation": "bilinear"}


def config(dataset: str, **values: Any) -> CfgNode:
    assert set(values) <= set(DEFAULTS)
    cfg = CfgNode(DEFAULTS | {"data": "mine", "dataset": dataset} | values)
    cfg.freeze()
    return cfg


def fake(**values: Any) -> CfgNode:
    return config("Fake", **{"num_classes": 4, "imb_factor": 0.1} | values)


def local(name: str) -> Path:
    if not (TAILTUNE_DATA / name).is_dir():
        pytest.skip(f"{name} is not unpacked in TAILTUNE_DATA")
    return TAILTUNE_DATA / name


def save(path: Path, shade: int = 100, size: tuple[int, int] = (40, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 50, 200)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/{cat,dog}/*.png with six and four images, test/{cat,dog}/*.png with two each."""
    for split, counts in (("train", {"cat": 6, "dog": 4}), ("test", {"cat": 2, "dog": 2})):
        for name, count in counts.items():
            for i in range(count):
                save(tmp_path / split / name / f"{i}.png", shade=10 * i)
    return tmp_path


@pytest.fixture
def listed(folder: Path) -> Path:
    """The same with train.txt, test.txt: cats have label 0."""
    for split in ("train", "test"):
        files = sorted((folder / split).rglob("*.png"))
        lines = [f"{file.relative_to(folder).as_posix()} {int(file.parent.name == 'dog')}\n" for file in files]
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def lists(folder: Path, **values: Any) -> CfgNode:
    return config("ImageList", **{"root": str(folder), "train_list": "train.txt", "test_list": "test.txt"} | values)


# --- facts ---------------------------------------------------------------------------------------------------------


def test_info_and_data_agree(folder: Path, listed: Path) -> None:
    configs = [
        fake(),
        fake(val_per_class=2, group_imb_factor=0.5),
        config("Digits", imb_factor=1 / 64),
        config("ImageFolder", root=str(folder)),
        lists(listed, imb_factor=0.5, val_per_class=1),
        lists(listed, test_list=None, test_per_class=2),
    ]
    for cfg in configs:
        info, bundle = build_info(cfg), build_data(cfg)
        assert info.class_names == bundle.info.class_names
        assert info.class_counts.tolist() == torch.bincount(bundle.train.labels).tolist()
        assert torch.equal(info.class_counts, bundle.info.class_counts)
        assert torch.equal(bundle.train_unaugmented.labels, bundle.train.labels)
        assert torch.equal(bundle.train_as_test.labels, bundle.train.labels)
        assert sorted(torch.cat(list(info.groups.values())).tolist()) == list(range(info.num_classes))


@pytest.mark.parametrize(
    ("values", "total", "groups"),
    [
        ({"imb_factor": 0.01}, 10_847, (35, 35, 30)),
        ({"imb_factor": 0.02}, 12_608, (41, 41, 18)),
        ({"imb_factor": 0.1, "group_imb_factor": 0.01}, 19_573, (35, 35, 30)),
        ({"group_imb_factor": 0.01}, 50_000, (35, 35, 30)),
    ],
)
def test_cifar100_facts_need_no_download(values: dict[str, float], total: int, groups: tuple[int, ...]) -> None:
    info = build_info(config("CIFAR100", root="/nowhere", **values))
    assert int(info.class_counts.sum()) == total
    assert tuple(len(info.groups[name]) for name in ("many", "med", "few")) == groups
    assert info.class_names[0] == "apple"
    assert info.num_classes == len(set(info.class_names)) == 100


@pytest.mark.parametrize(
    ("file", "field", "classes", "total", "groups"),
    [
        ("imagenet_lt.json", "", 1000, 115_846, (385, 479, 136)),
        ("places_lt.json", "", 365, 62_500, (131, 163, 71)),
        ("inat2018.json", "id", 8142, 437_513, (842, 4076, 3224)),
        ("inat2018.json", "name", 8142, 437_513, (842, 4076, 3224)),
        ("inat2018.json", "genus", 4401, 437_513, None),
        ("inat2018.json", "kingdom", 6, 437_513, None),
    ],
)
def test_shipped_counts(file: str, field: str, classes: int, total: int, groups: tuple[int, ...] | None) -> None:
    cfg = lists(Path("/nowhere"), class_counts=f"counts/{file}", label_field=field, num_classes=classes)
    info = build_info(cfg)
    assert info.class_counts.shape == (classes,)
    assert int(info.class_counts.sum()) == total
    if groups:
        assert tuple(len(info.groups[name]) for name in ("many", "med", "few")) == groups


def test_shipped_counts_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="num_classes 10.*1000 classes"):
        build_info(lists(Path("/nowhere"), class_counts="counts/imagenet_lt.json", num_classes=10))
    with pytest.raises(UserError, match="unknown label_field 'tribe'"):
        build_info(lists(Path("/nowhere"), class_counts="counts/inat2018.json", label_field="tribe"))
    with pytest.raises(UserError, match=r"class_counts: no file 'counts/mine.json'"):
        build_info(lists(Path("/nowhere"), class_counts="counts/mine.json"))


def test_imagenet_names() -> None:
    info = build_info(lists(Path("/nowhere"), class_counts="counts/imagenet_lt.json", classnames="imagenet"))
    assert len(set(info.class_names)) == 998
    assert info.class_names[657] == info.class_names[744] == "missile"
    assert info.class_names[836] == info.class_names[837] == "sunglasses"
    assert info.class_names[0] == "tench"


def test_digits() -> None:
    bundle = build_data(config("Digits", imb_factor=0.015625, augment="digits"))
    counts = bundle.info.class_counts
    assert (int(counts.max()), int(counts.min())) == (128, 2)
    assert torch.bincount(bundle.test.labels).tolist() == [50] * 10
    assert bundle.info.class_names[3] == "digit three"
    pixels = np.array(bundle.train.source.load(0))
    assert pixels.shape == (8, 8, 3)
    assert set(np.unique(pixels)) <= {round(v * 255 / 16) for v in range(17)}


def test_fake_images_have_several_sizes_and_a_tail() -> None:
    bundle = build_data(fake())
    assert bundle.info.class_counts.tolist() == [40, 18, 8, 4]
    assert torch.bincount(bundle.test.labels).tolist() == [10] * 4
    sizes = {bundle.test.source.load(i).size for i in range(10)}
    assert len(sizes) == 3
    again = build_data(fake())
    assert np.array_equal(np.array(bundle.train.source.load(5)), np.array(again.train.source.load(5)))


def test_unknown_dataset_and_options_that_do_not_apply() -> None:
    with pytest.raises(UserError, match="unknown dataset 'CIFAR'; did you mean"):
        build_info(config("CIFAR"))
    with pytest.raises(UserError, match="no dataset is given; choices: CIFAR10,"):
        build_info(config(""))
    with pytest.raises(UserError, match="unknown augment 'cutout'"):
        build_info(fake(augment="cutout"))
    with pytest.raises(UserError, match="`test_list` does not apply to dataset CIFAR10"):
        build_info(config("CIFAR10", test_list="test.txt"))
    with pytest.raises(UserError, match="num_classes 7"):
        build_info(config("CIFAR10", num_classes=7))
    with pytest.raises(UserError, match=r"class 'class 2' \(label 2\) has no training image"):
        build_info(fake(imb_factor=0.001))


def test_global_generators_stay_as_they_are(listed: Path) -> None:
    state = np.random.get_state(legacy=False)["state"]["key"].copy(), torch.get_rng_state()
    for cfg in (fake(val_per_class=1, max_test_images=5), config("Digits", imb_factor=0.1), lists(listed)):
        build_info(cfg)
        bundle = build_data(cfg)
        list(eval_loader(bundle.test, 8, 0))
        list(train_loader(bundle.train, StepSampler(bundle.train.labels, 8, 8, 0), 0))
    assert (np.random.get_state(legacy=False)["state"]["key"] == state[0]).all()
    assert torch.equal(torch.get_rng_state(), state[1])


# --- CIFAR ---------------------------------------------------------------------------------------------------------


class SyntheticCIFAR:
    """Stands for torchvision's class: image i has label i mod 100 and i in its first bytes."""

    url = "https://example.org/cifar.tar.gz"

    def __init__(self, root: Path, train: bool, download: bool = False):
        length = 50_000 if train else 10_000
        self.data = np.zeros((length, 2, 2, 3), dtype=np.uint8)
        self.data[:, 0, 0, 0], self.data[:, 0, 0, 1] = np.arange(length) % 251, np.arange(length) // 251
        self.targets = [i % 100 for i in range(length)]


def test_cifar_subset_and_test_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", SyntheticCIFAR)
    bundle = build_data(config("CIFAR100", imb_factor=0.01, augment="cifar", resolution=32))
    assert len(bundle.train) == 10_847
    assert bundle.train.indices[:5].tolist() == [9000, 25400, 28300, 44500, 46100]
    pixels = np.array(bundle.train.source.load(int(bundle.train.indices[1])))
    assert int(pixels[0, 0, 1]) * 251 + int(pixels[0, 0, 0]) == 25400
    assert len(bundle.test) == 10_000
    assert bundle.train[1]["label"] == 0


def test_cifar_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    for name, archive in (("CIFAR10", "cifar-10-python.tar.gz"), ("CIFAR100", "cifar-100-python.tar.gz")):
        with pytest.raises(UserError) as caught:
            build_data(config(name, root=str(tmp_path)))
        message = str(caught.value)
        assert f"https://www.cs.toronto.edu/~kriz/{archive}" in message
        assert str(tmp_path) in message
        assert "`root`" in message
        assert "\n" not in message


def test_cifar_names_are_torchvisions_once_downloaded() -> None:
    root = local("cifar")
    for name, kind in (("CIFAR10", torchvision.datasets.CIFAR10), ("CIFAR100", torchvision.datasets.CIFAR100)):
        assert tuple(kind(root, train=False).classes) == cifar.CLASS_NAMES[name]


def test_cifar10_jpeg_subset() -> None:
    root = local("cifar10_jpeg")
    bundle = build_data(lists(root, classnames="classnames.txt", imb_factor=0.01))
    assert bundle.info.class_counts.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert bundle.info.class_names == cifar.CLASS_NAMES["CIFAR10"]
    # The published procedure, written out once more on NumPy's global stream.
    state = np.random.get_state()
    np.random.seed(0)
    labels = np.array([int(line.split()[1]) for line in (root / "train.txt").read_text().splitlines()])
    expected = []
    for k, count in enumerate(bundle.info.class_counts.tolist()):
        positions = np.where(labels == k)[0]
        np.random.shuffle(positions)
        expected += positions[:count].tolist()
    np.random.set_state(state)
    assert bundle.train.indices.tolist() == expected
    assert bundle.train[0]["image"].shape == (3, 28, 28)


# --- views and loaders ---------------------------------------------------------------------------------------------


def test_a_sample() -> None:
    bundle = build_data(fake())
    sample = bundle.train[3, 1]
    assert sample["image"].dtype == torch.uint8
    assert sample["image"].shape == (3, 28, 28)
    assert (sample["label"], sample["index"], sample["weight"]) == (0, 3, 1.0)
    batch = bundle.train.batch([(0, 0), (69, 0)])
    assert batch["image"].shape == (2, 3, 28, 28)
    assert batch["label"].tolist() == [0, 3]
    assert (batch["label"].dtype, batch["weight"].dtype) == (torch.int64, torch.float32)


def test_augmentation_is_a_function_of_its_key() -> None:
    train = build_data(fake()).train
    once = train[7, 2, 1]["image"]
    torch.rand(3)
    assert torch.equal(train[7, 2, 1]["image"], once)
    others = [train[7, 2]["image"], train[7, 3, 1]["image"], build_data(fake(seed=1)).train[7, 2, 1]["image"]]
    assert not any(torch.equal(once, other) for other in others)
    assert torch.equal(train[7, 2]["image"], train[7, 2, 0]["image"])
    assert torch.equal(train[7]["image"], train[7, 0, 0]["image"])


def test_views_travel_to_spawned_workers(listed: Path) -> None:
    for cfg in (fake(tte=True), lists(listed, augment="imagenet")):
        bundle = build_data(cfg)
        for view in (bundle.train, bundle.test):
            assert torch.equal(pickle.loads(pickle.dumps(view))[3, 1]["image"], view[3, 1]["image"])


def epoch_of(view: View, workers: int, rank: int, world: int, step: int = 0) -> dict[int, torch.Tensor]:
    sampler = StepSampler(view.labels, 16, 4, seed=0, rank=rank, world=world)
    sampler.set_position(1, step)
    batches = list(train_loader(view, sampler, workers))
    return {int(i): image for batch in batches for i, image in zip(batch["index"], batch["image"], strict=True)}


def test_training_does_not_depend_on_workers_ranks_or_resuming() -> None:
    train = build_data(fake()).train
    alone = epoch_of(train, 0, 0, 1)
    assert sorted(alone) == list(range(len(train)))
    for workers, rank, world, step in [(2, 0, 1, 0), (2, 0, 2, 0), (0, 1, 2, 0), (0, 0, 1, 3)]:
        part = epoch_of(train, workers, rank, world, step)
        assert all(torch.equal(image, alone[i]) for i, image in part.items())


def test_persistent_workers_follow_the_sampler() -> None:
    train = build_data(fake()).train
    sampler = StepSampler(train.labels, 16, 16, seed=0)
    loader = train_loader(train, sampler, 2)
    orders = []
    for epoch in range(2):
        sampler.set_position(epoch, 0)
        orders.append([i for batch in loader for i in batch["index"].tolist()])
        assert orders[-1] == [i for batch in sampler for i, *_ in batch]
    assert orders[0] != orders[1]
    sampler.set_position(0, 3)
    assert [i for batch in loader for i in batch["index"].tolist()] == orders[0][48:]


LOADERS = [(workers, *shards) for shards in ((1, 16), (3, 4), (7, 16)) for workers in (0, 2)]


@pytest.mark.parametrize(("workers", "world", "batch_size"), slow_except([(2, 3, 4), (0, 7, 16)], LOADERS))
def test_evaluation_sees_each_image_once(workers: int, world: int, batch_size: int) -> None:
    test = build_data(fake()).test
    shards = [list(eval_loader(test, batch_size, workers, rank, world)) for rank in range(world)]
    assert len({tuple(len(batch["index"]) for batch in shard) for shard in shards}) == 1
    batches = [batch for shard in shards for batch in shard]
    index = torch.cat([batch["index"] for batch in batches])
    weight = torch.cat([batch["weight"] for batch in batches])
    label = torch.cat([batch["label"] for batch in batches])
    assert sorted(index[index >= 0].tolist()) == list(range(len(test)))
    assert torch.equal(weight, (index >= 0).float())
    assert torch.equal(label[index >= 0], test.labels[index[index >= 0]])


def test_five_crop_batches_are_lists_where_sizes_differ() -> None:
    test = build_data(fake(tte=True)).test
    batch = next(iter(eval_loader(test, 10, 0)))
    assert isinstance(batch["image"], list)
    assert all(min(image.shape[1:]) == 31 for image in batch["image"])
    even = test.batch([0, 1])
    assert even["image"].shape == (2, 3, 31, 31)
    assert test[-1]["image"].shape == (3, 31, 31)


def test_max_test_images_covers_the_classes() -> None:
    test = build_data(fake(max_test_images=20)).test
    assert len(test) == 20
    assert len(test.labels.unique()) == 4


# --- lists ---------------------------------------------------------------------------------------------------------


def test_lists(listed: Path) -> None:
    bundle = build_data(lists(listed))
    assert bundle.info.class_names == ("cat", "dog")
    assert bundle.info.class_counts.tolist() == [6, 4]
    assert (len(bundle.test), bundle.val) == (4, None)
    assert bundle.train.source.location(6) == f"{listed}/train/dog/0.png (line 7 of {listed}/train.txt)"


def test_list_paths_resolve_against_the_yaml_then_lists(listed: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("home")
    (home / "train.txt").write_text("train/cat/0.png 0\ntrain/dog/1.png 1\n")
    (home / "names.txt").write_text("tom cat\nbig dog\n\n")
    cfg = lists(listed, data_dir=str(home), classnames="names.txt")
    bundle = build_data(cfg)  # train.txt beside the YAML, test.txt below root
    assert len(bundle.train) == 2
    assert len(bundle.test) == 4
    assert bundle.info.class_names == ("tom cat", "big dog")
    beside = lists(listed, data_dir=str(listed.parent), root=listed.name)
    assert len(build_data(beside).train) == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train/cat/0.png 0\ntrain/cat/1.png\n", "train.txt line 2: expected"),
        ("train/cat/0.png 0\n\ntrain/cat/1.png cat\n", "train.txt line 3: expected"),
        ("train/cat/0.png -1\n", "train.txt line 1: expected"),
        ("train/cat/0.png 0\ntrain/cat/1.png 2\n", r"train.txt line 2: label 2 is not in 0 … 1"),
        ("\n\n", "train.txt lists no image"),
    ],
)
def test_bad_lines(listed: Path, text: str, message: str) -> None:
    (listed / "train.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        build_data(lists(listed, num_classes=2))


def test_too_few_class_names(listed: Path) -> None:
    (listed / "names.txt").write_text("cat\n")
    with pytest.raises(UserError, match=r"classnames names.txt: 1 names for 2 classes"):
        build_info(lists(listed, classnames="names.txt"))


def test_a_list_in_another_encoding(listed: Path) -> None:
    (listed / "train.txt").write_bytes("train/cat/\xe9.png 0\n".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        build_data(lists(listed))


def test_paths_with_blanks_and_tabs(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("my cats/one 1.png 0\nb.png\t1\n")
    listing = read_list(tmp_path / "train.txt")
    assert listing.paths == ["my cats/one 1.png", "b.png"]
    assert listing.labels.tolist() == [0, 1]


def test_missing_things_name_the_key(listed: Path) -> None:
    with pytest.raises(UserError, match="list file not found: .*other.txt .*`lists`"):
        build_info(lists(listed, train_list="other.txt"))
    with pytest.raises(UserError, match="set `train_list`"):
        build_info(lists(listed, train_list=None))
    with pytest.raises(UserError, match="image folder not found: .*/gone .*`root`"):
        build_data(lists(listed / "gone", lists=str(listed)))
    (listed / "elsewhere").mkdir()
    with pytest.raises(UserError, match=r"image not found: .*line 1 of .*`root`"):
        build_data(lists(listed / "elsewhere", lists=str(listed)))
    with pytest.raises(UserError, match="no test split: set `test_list`, or set `test_per_class`"):
        build_info(lists(listed, test_list=None))
    with pytest.raises(UserError, match="test_per_class 1: the data have a test split already"):
        build_info(lists(listed, test_per_class=1))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_missing_published_list_is_named_with_its_source(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        build_data(lists(tmp_path, train_list=name))
    assert PUBLISHED[name][0] in str(caught.value)
    assert published_at(name) in str(caught.value)
    own_split = name.endswith(("train.txt", "val.txt", "test.txt"))
    assert ("facebookresearch/classifier-balancing" if own_split else "SADE") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_altered_published_list_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "Places_LT_val.txt"
    file.write_text("train/airfield/1.jpg 0\n")
    read_list(file)
    blob = subprocess.run(["git", "hash-object", str(file)], capture_output=True, text=True, check=True).stdout.strip()
    assert blob in caplog.text
    assert PUBLISHED["Places_LT_val.txt"][0] in caplog.text


def test_classes_without_images_are_refused(listed: Path) -> None:
    with pytest.raises(UserError, match=r"class 'class 2' \(label 2\) has no training image"):
        build_info(lists(listed, num_classes=3))


def test_class_names_must_fit(listed: Path) -> None:
    (listed / "names.txt").write_text("a\nb\nc\n")
    with pytest.raises(UserError, match="num_classes 2: data 'mine' have 3 classes"):
        build_info(lists(listed, num_classes=2, classnames="names.txt"))
    (listed / "train.txt").write_text("train/cat/0.png 0\ntrain/dog/0.png 0\ntrain/dog/1.png 1\n")
    with pytest.raises(UserError, match="classnames folders"):
        build_info(lists(listed, classnames="folders"))
    assert build_info(lists(listed)).class_names == ("class 0", "class 1")


def test_validation_split(listed: Path) -> None:
    (listed / "val.txt").write_text("train/cat/5.png 0\ntrain/dog/3.png 1\n")
    bundle = build_data(lists(listed, val_list="val.txt"))
    assert bundle.val is not None
    assert bundle.val.labels.tolist() == [0, 1]
    with pytest.raises(UserError, match="val_per_class 1: the data have a validation split"):
        build_data(lists(listed, val_list="val.txt", val_per_class=1))


@pytest.mark.parametrize("values", [{"val_per_class": 3}, {"val_per_class": 2, "imb_factor": 0.5, "seed": 5}])
def test_validation_hold_out(listed: Path, values: dict[str, Any]) -> None:
    bundle = build_data(lists(listed, **values))
    assert bundle.val is not None
    assert torch.bincount(bundle.val.labels).tolist() == [values["val_per_class"]] * 2
    assert not set(bundle.val.indices.tolist()) & set(bundle.train.indices.tolist())
    other = build_data(lists(listed, **values | {"seed": 9}))
    assert other.train.indices.tolist() == bundle.train.indices.tolist()
    with pytest.raises(UserError, match="val_per_class 4: class 'dog' has only 4 images"):
        build_info(lists(listed, val_per_class=4))


# --- folders -------------------------------------------------------------------------------------------------------


def test_folder_with_test_split(folder: Path) -> None:
    save(folder / "train" / "cat" / "deep" / "er" / "x.JPEG")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "cat" / "notes.txt").write_text("not an image")
    bundle = build_data(config("ImageFolder", root=str(folder)))
    assert bundle.info.class_names == ("cat", "dog")
    assert bundle.info.class_counts.tolist() == [7, 4]
    assert torch.bincount(bundle.test.labels).tolist() == [2, 2]
    assert bundle.train[6]["image"].shape == (3, 28, 28)


def test_folder_without_test_split(folder: Path) -> None:
    root = str(folder)
    (folder / "test").rename(folder / "val")
    with pytest.raises(UserError, match="no test split: add .*test/<class>.*`test_per_class`"):
        build_info(config("ImageFolder", root=root))
    bundle = build_data(config("ImageFolder", root=root, test_per_class=2))
    assert bundle.info.class_counts.tolist() == [4, 2]
    assert torch.bincount(bundle.test.labels).tolist() == [2, 2]
    files = [view.source.location(int(i)) for view in (bundle.train, bundle.test) for i in view.indices]
    assert len(set(files)) == 10
    assert bundle.val is not None
    assert len(bundle.val) == 4
    with pytest.raises(UserError, match="test_per_class 4: class 'dog'"):
        build_info(config("ImageFolder", root=root, test_per_class=4))


def test_folder_messages(folder: Path) -> None:
    with pytest.raises(UserError, match="image folder not found: .*`root`"):
        build_info(config("ImageFolder", root=str(folder / "gone")))
    save(folder / "test" / "bird" / "0.png")
    with pytest.raises(UserError, match="test/bird: 'bird' is no class"):
        build_info(config("ImageFolder", root=str(folder)))
    with pytest.raises(UserError, match="`train_list` does not apply"):
        build_info(config("ImageFolder", root=str(folder), train_list="train.txt"))
    (folder / "empty" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="no class folders"):
        build_info(config("ImageFolder", root=str(folder / "empty")))


# --- bad images ----------------------------------------------------------------------------------------------------


def spoil(listed: Path) -> None:
    """Image 2 is cut short, image 3 is no image, image 7 is missing."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="PNG")
    (listed / "train/cat/2.png").write_bytes(buffer.getvalue()[:3000])
    (listed / "train/cat/3.png").write_text("<html>not found</html>")
    (listed / "train/dog/1.png").unlink()


def failure(loader: Iterable[Any]) -> UserError | None:
    """What a caller shows."""
    try:
        for _ in loader:
            pass
    except BadImage as error:
        return clean_worker_error(error)
    return None


@pytest.mark.parametrize(("index", "reason"), [(2, "cannot read image"), (3, "cannot read image"), (7, "not found")])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_goes_bad_stops_with_one_line(listed: Path, index: int, reason: str, workers: int) -> None:
    train = build_data(lists(listed)).train
    spoil(listed)
    loader = eval_loader(View(train.source, np.array([0, index]), train.transform), 2, workers)
    clean = failure(loader)
    assert isinstance(clean, BadImage)
    message = str(clean)
    assert reason in message
    assert train.source.location(index) in message
    assert f"line {index + 1} of {listed}/train.txt" in message
    assert "\n" not in message


def test_other_errors_are_not_cleaned() -> None:
    assert clean_worker_error(ValueError("a bug")) is None
    plain = UserError("one line")
    assert clean_worker_error(plain) is plain


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_go_bad_are_skipped(listed: Path, workers: int) -> None:
    bundle = build_data(lists(listed, on_bad_image="skip"))
    spoil(listed)
    for view in (bundle.train, bundle.train_as_test):
        batches = list(eval_loader(view, 5, workers))
        weight = torch.cat([batch["weight"] for batch in batches])
        index = torch.cat([batch["index"] for batch in batches])
        images = torch.cat([batch["image"] for batch in batches])
        assert index[weight == 0].tolist() == [2, 3, 7]
        assert images.shape == (10, 3, 28, 28)
        assert not images[weight == 0].any()


def test_unreadable_images_are_named_before_anything_starts(listed: Path) -> None:
    """By their places, all at once; one that is cut short is found where images are to be left out."""
    spoil(listed)
    with pytest.raises(UnreadableImages, match="cannot read 2 images: .*line 4 of .*line 8 of .*on_bad_image skip"):
        build_data(lists(listed))


def test_unreadable_images_do_not_count(listed: Path) -> None:
    whole = build_data(lists(listed))
    spoil(listed)
    bundle = build_data(lists(listed, on_bad_image="skip"))
    assert bundle.info.class_counts.tolist() == [4, 3]
    assert bundle.train.indices.tolist() == [0, 1, 4, 5, 6, 8, 9]
    assert set(bundle.splits.unreadable) == {"train/cat/2.png", "train/cat/3.png", "train/dog/1.png"}
    assert bundle.splits.left_out == 3
    assert bundle.records["train"].fingerprint != whole.records["train"].fingerprint
    for index in range(4):
        (listed / f"train/dog/{index}.png").unlink(missing_ok=True)
    with pytest.raises(UnreadableImages, match="cannot read 4 images: .*; class 'dog' has no other training image"):
        build_data(lists(listed, on_bad_image="skip"))


# --- Places and iNaturalist ----------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Path]:
    """Lists in the published spelling, images in Places365's small-image layout."""
    (tmp_path / "train.txt").write_text("train/airfield/1.jpg 0\ntrain/bazaar-indoor/2.jpg 1\n")
    (tmp_path / "test.txt").write_text("val/airfield/3.jpg 0\nval/bazaar-indoor/4.jpg 1\n")
    for path in ("data_256/a/airfield/1.jpg", "data_256/b/bazaar/indoor/2.jpg", "val_256/3.jpg", "val_256/4.jpg"):
        save(tmp_path / path)
    yield tmp_path


def test_places_in_the_small_image_layout(places: Path) -> None:
    bundle = build_data(lists(places, classnames="folders"))
    assert bundle.info.class_names == ("airfield", "bazaar-indoor")
    for view in (bundle.train, bundle.test):
        assert [view[i]["weight"] for i in range(2)] == [1.0, 1.0]
    (places / "train.txt").write_text("data_256/a/airfield/1.jpg 0\ndata_256/b/bazaar/indoor/2.jpg 1\n")
    (places / "test.txt").write_text("val_256/3.jpg 0\nval_256/4.jpg 1\n")
    bundle = build_data(lists(places, classnames="folders"))
    assert bundle.info.class_names == ("airfield", "bazaar-indoor")
    assert bundle.test[1]["label"] == 1


CATEGORIES = [
    {"id": 1, "name": "Abax", "genus": "B", "kingdom": "Animalia"},
    {"id": 0, "name": "Zea mays", "genus": "Z", "kingdom": "Plantae"},
    {"id": 2, "name": "Mus", "genus": "B", "kingdom": "Animalia"},
]


@pytest.mark.parametrize(
    ("field", "labels", "names"),
    [
        ("id", [0, 1, 2], ("Zea mays", "Abax", "Mus")),
        ("name", [2, 0, 1], ("Abax", "Mus", "Zea mays")),
        ("genus", [1, 0, 0], ("B", "Z")),
        ("kingdom", [1, 0, 0], ("Animalia", "Plantae")),
    ],
)
def test_inat_labels(tmp_path: Path, field: str, labels: list[int], names: tuple[str, ...]) -> None:
    (tmp_path / "categories.json").write_text(json.dumps(CATEGORIES))
    lines = "".join(f"{i}.png {i}\n" for i in range(3))
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(lines)
    for i in range(3):
        save(tmp_path / f"{i}.png")
    bundle = build_data(lists(tmp_path, label_field=field, classnames="categories.json"))
    assert bundle.train.labels.tolist() == bundle.test.labels.tolist() == labels
    assert bundle.info.class_names == names
    assert bundle.info.mean == (0.466, 0.471, 0.380)


def test_inat_messages(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a.png 0\nb.png 3\n")
    (tmp_path / "test.txt").write_text("a.png 0\n")
    with pytest.raises(UserError, match="categories.json .*`lists`"):
        build_info(lists(tmp_path, label_field="name"))
    file = tmp_path / "categories.json"
    file.write_text(json.dumps(CATEGORIES))
    with pytest.raises(UserError, match="train.txt line 2: label 3 is not in 0 … 2"):
        build_info(lists(tmp_path, label_field="name"))
    with pytest.raises(UserError, match="unknown label_field 'species'"):
        taxon_labels(file, "species")
    with pytest.raises(UserError, match="'order'"):
        taxon_labels(file, "order")
    (tmp_path / "train.txt").write_text("a.png 0\n")
    with pytest.raises(UserError, match="needs `label_field`"):
        build_info(lists(tmp_path, classnames="categories.json"))


def test_real_inat_labels() -> None:
    file = local("lt_lists") / "classnames" / "iNaturalist18_categories.json"
    new_label, names = taxon_labels(file, "name")
    assert new_label[0] == 3575
    assert names[3575] == "Hermodice carunculata"
    assert int((new_label == np.arange(8142)).sum()) == 4
    counts = json.loads((FOLDER / "data/counts/inat2018.json").read_text())
    for field, by_label in counts.items():
        new_label, names = taxon_labels(file, field)
        assert np.bincount(new_label, weights=counts["id"]).astype(int).tolist() == by_label
        assert len(names) == len(by_label)


def test_real_lists_are_the_published_ones(caplog: pytest.LogCaptureFixture) -> None:
    root = local("lt_lists")
    caplog.set_level(logging.WARNING)
    for version in ("Places_LT_v1", "Places_LT_v2"):
        listing = read_list(root / version / "Places_LT_train.txt")
        names = folder_names(listing, 365)
        counts = json.loads((FOLDER / "data/counts/places_lt.json").read_text())
        assert np.bincount(listing.labels).tolist() == counts
        assert names is not None
        assert (names[0], names[116]) == ("airfield", "desert_road")
    read_list(root / "ImageNet_LT" / "ImageNet_LT_test.txt")
    assert not caplog.records


def test_every_entry_gives_facts_and_images(folder: Path, listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", SyntheticTen)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", SyntheticCIFAR)
    special = {"ImageList": lists(listed), "ImageFolder": config("ImageFolder", root=str(folder))}
    for name in DATASETS:
        try:
            bundle = build_data(special.get(name, config(name)))
        except UserError as error:  # a data set that has to be downloaded, and is not faked above
            assert ("download" in str(error) or name == "Shards") and "`root`" in str(error)
            continue
        assert bundle.info.num_classes == len(bundle.info.class_counts)
        for view in (bundle.train, bundle.train_unaugmented, bundle.train_as_test, bundle.test):
            assert view[len(view) - 1]["image"].shape == (3, 28, 28)


class SyntheticTen(SyntheticCIFAR):
    def __init__(self, root: Path, train: bool, download: bool = False):
        super().__init__(root, train, download)
        self.targets = [label % 10 for label in self.targets]


def test_no_warning_on_import_or_use() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(iter(eval_loader(build_data(fake()).test, 4, 0)))
