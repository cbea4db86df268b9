"""Test sets of other class frequencies: the published ones to the image, and those of a user's own data."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from tailtune.configs import load_configs
from tailtune.configs.config_files import FOLDER
from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_data, build_info
from tailtune.datasets.data_bundle import DataInfo, TestDistribution
from tailtune.datasets.long_tail import longtail_counts, random_positions
from tailtune.datasets.shot_groups import shot_groups
from tailtune.datasets.sources.published_lists import PUBLISHED, is_published
from tailtune.datasets.test_distributions.build import build_distributions
from tailtune.datasets.test_distributions.frequency_rules import distribution_names
from tailtune.datasets.test_distributions.published_order import introsort_argsort
from tailtune.datasets.test_distributions.settings import DistributionSettings
from tailtune.trainers.option_schema import declared

TAILTUNE_DATA = Path(os.environ.get("TAILTUNE_DATA", "nowhere"))
DEFAULTS = declared().defaults
DEFAULTS |= {"num_workers": 0, "resolution": 32, "interpolation": "bilinear", "test_dists": ["all"]}
RATIOS = (50, 25, 10, 5, 2)
ELEVEN = [*(f"forward{r}" for r in RATIOS), "uniform", *(f"backward{r}" for r in reversed(RATIOS))]


def config(dataset: str, **values: Any) -> CfgNode:
    assert set(values) <= set(DEFAULTS)
    cfg = CfgNode(DEFAULTS | {"data": "mine", "dataset": dataset} | values)
    cfg.freeze()
    return cfg


def shipped(data: str, *pairs: object) -> CfgNode:
    words = ["resolution", 32, "interpolation", "bilinear", "test_dists", "all", *pairs]
    return load_configs(data, "tiny_clip", [str(each) for each in words], declared())[-1]


def facts(counts: list[int]) -> DataInfo:
    names, groups = tuple(f"class {k}" for k in range(len(counts))), shot_groups(counts, 100, 20)
    return DataInfo("mine", names, torch.tensor(counts), groups, (0.5,) * 3, (0.5,) * 3)


def distributions(cfg: CfgNode, info: DataInfo, labels: Tensor) -> tuple[TestDistribution, ...]:
    return build_distributions(DistributionSettings.of(cfg), info, labels)


def names_of(cfg: CfgNode) -> tuple[str, ...]:
    return distribution_names(DistributionSettings.of(cfg))


def by_name(shifts: tuple[TestDistribution, ...]) -> dict[str, TestDistribution]:
    return {each.name: each for each in shifts}


def check(shifts: tuple[TestDistribution, ...], labels: Tensor) -> None:
    """What holds for any test set: its counts are those of its images, each of which it has once."""
    for each in shifts:
        counts = torch.bincount(labels[each.positions], minlength=len(each.counts))
        assert torch.equal(each.counts, counts) and each.counts.dtype == each.positions.dtype == torch.int64
        assert len(each.positions.unique()) == len(each.positions) == int(each.counts.sum())


# --- names -----------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert names_of(config("Fake", test_dists=None)) == ()
    assert list(names_of(config("Fake"))) == ELEVEN
    assert names_of(shipped("inat2018")) == ("forward3", "forward2", "uniform", "backward2", "backward3")
    mixed = config("Fake", test_dists=["forward100", "uniform", "all", "backward1"], shift_ratios=[2])
    assert names_of(mixed) == ("forward100", "uniform", "forward2", "backward2", "backward1")


@pytest.mark.parametrize("name", ["sideways5", "forward", "forward0", "backward-2", "uniform5", "forward2.5", "All"])
def test_a_wrong_name_is_refused_without_images(name: str) -> None:
    with pytest.raises(UserError, match=rf"test_dists: unknown distribution '{name}'; choices: all, uniform, forward"):
        build_info(config("CIFAR100", root="/nowhere", test_dists=["uniform", name]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shift_factors": {"forwards": 0.5}}, "shift_factors: unknown distribution 'forwards'"),
        ({"shift_factors": {"forward3": 3.0}}, "shift_factors: forward3 3 must be above 0"),
        ({"shift_files": "list_{name}.txt"}, "shift_files list_{name}.txt: it needs dataset ImageList"),
        ({"dataset": "ImageList", "shift_files": "list.txt"}, "{name} in its value"),
        ({"shift_order": "published", "label_field": "genus"}, "label_field is genus: set shift_order counts"),
    ],
)
def test_options_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        names_of(config(**{"dataset": "Fake"} | values))


# --- CIFAR -----------------------------------------------------------------------------------------------------------

CIFAR_TOTALS = {50: 2486, 25: 2956, 10: 3876, 5: 4932, 2: 7166}


def test_cifar100_is_the_published_construction() -> None:
    labels = torch.arange(10_000) % 100
    for data in ("cifar100_ir100", "cifar100_ir10", "cifar100"):
        cfg = shipped(data)
        shifts = distributions(cfg, build_info(cfg), labels)
        check(shifts, labels)
        assert [each.name for each in shifts] == ELEVEN
    found = by_name(shifts)
    for ratio, total in CIFAR_TOTALS.items():
        forward, backward = found[f"forward{ratio}"], found[f"backward{ratio}"]
        assert len(forward.positions) == len(backward.positions) == total
        assert forward.counts.tolist() == backward.counts.flip(0).tolist()
        assert forward.origin == backward.origin == "the published construction"
    assert found["uniform"].positions.tolist() == list(range(10_000)) and "all" in found["uniform"].origin
    chosen = found["forward50"].positions.tolist()
    assert chosen[:5] == [2600, 8600, 200, 5500, 7500] and chosen[100:105] == [1801, 2901, 6401, 9201, 7201]
    assert chosen[-2:] == [2799, 399] and sum(chosen) == 12_415_935
    larger, smaller = found["backward2"].positions, found["backward50"].positions
    assert set(smaller.tolist()) <= set(larger.tolist())  # nested


def test_another_seed_draws_other_images_of_the_same_classes() -> None:
    labels, info = torch.arange(10_000) % 100, build_info(shipped("cifar100_ir100"))
    first, again, other = (
        distributions(shipped("cifar100_ir100", "test_dists", "forward10", "shift_seed", seed), info, labels)[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.positions, again.positions) and torch.equal(first.counts, other.counts)
    assert set(first.positions.tolist()) != set(other.positions.tolist()) and first.origin == "drawn with seed 1"


# --- published lists: the counts need no file ------------------------------------------------------------------------

FIRST = {
    "imagenet_lt": [86, 674, 566, 333, 417, 97, 755, 775, 984, 601, 402, 490],
    "places_lt": [7, 9, 12, 19, 24, 42, 45, 48, 52, 62, 66, 67],
    "inat2018": [2844, 3119, 3986, 3582, 3836, 3191, 2015, 488, 3822, 1652, 3553, 2820],
}
LAST = {
    "imagenet_lt": [491, 58, 747, 865, 155, 356],
    "places_lt": [128, 137, 56, 88, 126, 195],
    "inat2018": [7425, 2773, 4065, 2868, 2864, 2880],
}
CHECKSUM = {"imagenet_lt": 250_188_180, "places_lt": 12_221_340, "inat2018": 474_867_604}
EACH = {"imagenet_lt": 50, "places_lt": 100, "inat2018": 3}
"""Test images of every class."""
SUMS: dict[str, dict[str, tuple[int, int]]] = {
    "imagenet_lt": {
        "forward50": (12_058, 6_026_218),
        "backward50": (12_058, 6_101_049),
        "forward25": (14_437, 7_213_850),
        "backward25": (14_437, 7_286_050),
        "forward10": (19_059, 9_514_486),
        "backward10": (19_059, 9_577_097),
        "forward5": (24_365, 12_160_856),
        "backward5": (24_365, 12_216_944),
        "forward2": (35_574, 17_756_321),
        "backward2": (35_574, 17_795_131),
        "uniform": (50_000, 50 * sum(range(1000))),
    },
    "places_lt": {
        "forward50": (8989, 1_555_671),
        "backward50": (8989, 1_642_273),
        "forward25": (10_727, 1_881_361),
        "backward25": (10_727, 1_962_290),
        "forward10": (14_103, 2_510_978),
        "backward10": (14_103, 2_582_343),
        "forward5": (17_970, 3_228_065),
        "backward5": (17_970, 3_288_466),
        "forward2": (26_155, 4_738_931),
        "backward2": (26_155, 4_775_689),
        "uniform": (36_500, 100 * sum(range(365))),
    },
    "inat2018": {
        "forward2": (12_906, 52_611_422),
        "backward2": (12_906, 52_482_828),
        "forward3": (11_147, 45_551_226),
        "backward3": (11_137, 45_324_669),
        "uniform": (24_426, 99_426_033),
    },
}
"""Lines, and the sum of the labels over them."""
SHOTS = {
    ("imagenet_lt", "forward50"): (9769, 2153, 136),
    ("imagenet_lt", "backward50"): (726, 6118, 5214),
    ("imagenet_lt", "forward10"): (12_582, 5741, 736),
    ("imagenet_lt", "backward10"): (2910, 10_374, 5775),
    ("places_lt", "forward50"): (6999, 1809, 181),
    ("places_lt", "backward50"): (510, 3524, 4955),
    ("places_lt", "forward10"): (8871, 4373, 859),
    ("places_lt", "backward10"): (1969, 6430, 5704),
    ("inat2018", "forward3"): (1685, 6239, 3223),
    ("inat2018", "backward3"): (834, 4076, 6227),
    ("inat2018", "forward2"): (1685, 7997, 3224),
    ("inat2018", "backward2"): (842, 5615, 6449),
}
"""Images of many-, medium- and few-shot classes."""


def list_config(data: str, *pairs: object) -> CfgNode:
    """With the labels of the lists themselves."""
    return shipped(data, "root", "/nowhere", *(("label_field", "id") if data == "inat2018" else ()), *pairs)


@pytest.mark.parametrize("data", FIRST)
def test_the_published_order(data: str) -> None:
    counts = build_info(list_config(data)).class_counts.tolist()
    order = introsort_argsort(counts)[::-1]
    assert order[:12] == FIRST[data] and order[-6:] == LAST[data]
    assert sum(i * k for i, k in enumerate(order)) % (10**9 + 7) == CHECKSUM[data]
    assert [counts[k] for k in order] == sorted(counts, reverse=True)
    assert order != np.argsort(counts, kind="stable")[::-1].tolist()


@pytest.mark.parametrize("data", FIRST)
def test_the_published_counts_without_any_list(data: str) -> None:
    cfg = list_config(data)
    info = build_info(cfg)
    labels = torch.arange(info.num_classes).repeat(EACH[data])
    shifts = distributions(cfg, info, labels)
    check(shifts, labels)
    k = torch.arange(info.num_classes)
    assert {each.name: (len(each.positions), int((k * each.counts).sum())) for each in shifts} == SUMS[data]
    for each in shifts:
        shots = tuple(int(each.counts[classes].sum()) for classes in info.groups.values())
        assert shots == SHOTS.get((data, each.name), shots)
        assert each.origin.startswith("all test images" if each.name == "uniform" else "drawn with seed 0")


def test_classes_without_an_image_are_said() -> None:
    cfg = list_config("inat2018")
    found = by_name(distributions(cfg, build_info(cfg), torch.arange(8142).repeat(3)))
    empty = {name: (each.counts == 0).nonzero().flatten().tolist() for name, each in found.items()}
    assert empty["forward3"] == [2880] and "classes without an image: 1" in found["forward3"].origin
    assert empty["backward3"] == sorted([2844, 3119, 3986, 3582, 3836, 3191, 2015, 488])
    assert not empty["forward2"] and not empty["uniform"] and "without an" not in found["forward2"].origin


def test_draws_are_independent_of_each_other_and_of_the_rest() -> None:
    cfg, alone = list_config("places_lt"), list_config("places_lt", "test_dists", "backward5")
    info, labels = build_info(cfg), torch.arange(365).repeat(100)
    state = np.random.get_state(legacy=False)["state"]["key"].copy(), torch.get_rng_state()
    found = by_name(distributions(cfg, info, labels))
    assert torch.equal(found["backward5"].positions, distributions(alone, info, labels)[0].positions)
    assert not set(found["backward50"].positions.tolist()) <= set(found["backward5"].positions.tolist())
    assert (np.random.get_state(legacy=False)["state"]["key"] == state[0]).all()
    assert torch.equal(torch.get_rng_state(), state[1])


# --- list files ------------------------------------------------------------------------------------------------------

COUNTS, RANK = [30, 10, 20], {0: 2, 1: 0, 2: 1}
"""Training images of three species by id, and the ranks of their names."""


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """Four test images a class; lists of forward2 (4, 2, 2) and of forward4, by ids."""
    for name, counts in {"test": (4, 4, 4), "forward2": (4, 2, 2), "backward2": (2, 4, 2)}.items():
        # Files have the same name in every class, and the list of a distribution has another order than the test list.
        lines = [f"val/{k}/{i}.png {k}\n" for k, count in enumerate(counts) for i in range(count)]
        (tmp_path / f"{name}.txt").write_text("".join(lines if name == "test" else reversed(lines)))
    species = [{"id": k, "name": name} for k, name in enumerate(("Vulpes", "Apis", "Mus"))]
    (tmp_path / "categories.json").write_text(json.dumps(species))
    return tmp_path


def listed(folder: Path, **values: Any) -> CfgNode:
    values = {"test_list": "test.txt", "shift_order": "published", "shift_files": "{name}.txt"} | values
    return config("ImageList", root=str(folder), shift_max=4, **{"test_dists": ["forward2", "forward4"]} | values)


@pytest.mark.parametrize("field", ["", "name"])
def test_a_list_file_is_used_where_there_is_one(lists: Path, field: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tailtune")
    rank = RANK if field else {k: k for k in range(3)}
    labels = torch.tensor([rank[k] for k in range(3) for _ in range(4)])
    counts = [n for _, n in sorted((rank[k], n) for k, n in enumerate(COUNTS))]
    shifts = distributions(listed(lists, label_field=field), facts(counts), labels)
    check(shifts, labels)
    assert shifts[0].positions.tolist() == [9, 8, 5, 4, 3, 2, 1, 0] and shifts[0].origin == "list forward2.txt"
    assert [int(shifts[1].counts[rank[k]]) for k in range(3)] == [4, 1, 2]
    assert shifts[1].origin == "drawn with seed 0, without the list forward4.txt"
    assert "images are drawn at random because list files are missing (1): forward4.txt" in caplog.text


def test_a_cut_test_split_keeps_what_the_list_has_of_it(lists: Path) -> None:
    kept = random_positions(12, 5)
    labels = torch.from_numpy(np.repeat(np.arange(3), 4)[kept])
    shift = distributions(listed(lists, max_test_images=5), facts(COUNTS), labels)[0]
    assert sorted(kept[shift.positions].tolist()) == sorted({9, 8, 5, 4, 3, 2, 1, 0} & set(kept.tolist()))


def test_lists_in_either_layout_of_places(lists: Path) -> None:
    (lists / "test.txt").write_text("".join(f"val/cave-wet/{i}.jpg 0\nval/sky/{9 - i}.jpg 1\n" for i in range(4)))
    (lists / "forward4.txt").write_text("val_256/3.jpg 0\n" + "".join(f"val_256/{9 - i}.jpg 1\n" for i in range(4)))
    cfg = listed(lists, test_dists=["forward4"])
    shift = distributions(cfg, facts([5, 9]), torch.tensor([0, 1] * 4))[0]
    assert shift.positions.tolist() == [6, 1, 3, 5, 7] and shift.counts.tolist() == [1, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("val/0/9.png 0\n", r"forward2.txt line 1: val/0/9.png with this label is not in .*test.txt"),
        ("val/0/1.png 0\nval/0/1.png 0\n", r"forward2.txt line 2: val/0/1.png is listed twice"),
        ("val/0/1.png 0\n", r"has 1 images of label 0, .* ask for 4; .* set `shift_files none`"),
    ],
)
def test_a_list_file_that_does_not_fit(lists: Path, text: str, message: str) -> None:
    (lists / "forward2.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        distributions(listed(lists), facts(COUNTS), torch.arange(3).repeat_interleave(4))


def test_a_wrong_list_is_refused_before_training(lists: Path) -> None:
    for k in range(3):
        (lists / f"val/{k}").mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32)).save(lists / f"val/{k}/{i}.png")
    assert len(build_data(listed(lists, train_list="test.txt", shift_order="counts")).test) == 12
    (lists / "forward2.txt").write_text("val/0/1.png 0\n")
    with pytest.raises(UserError, match="forward2.txt has 1 images of label 0"):
        build_data(listed(lists, train_list="test.txt"))


def test_a_test_list_that_changed_since(lists: Path) -> None:
    with pytest.raises(UserError, match=r"test.txt is not the list of the evaluated images"):
        distributions(listed(lists), facts(COUNTS), torch.arange(3).repeat(4))


def test_merged_classes_have_no_published_order(lists: Path) -> None:
    (lists / "categories.json").write_text(json.dumps([{"id": k, "name": "Mus"} for k in range(3)]))
    with pytest.raises(UserError, match="label_field name merges classes; set shift_order counts"):
        distributions(listed(lists, label_field="name"), facts(COUNTS), torch.arange(3).repeat_interleave(4))


# --- a user's own data -----------------------------------------------------------------------------------------------


def test_own_data_by_stable_descending_training_count() -> None:
    labels = torch.tensor([0] * 30 + [1] * 12 + [2] * 25 + [3] * 20)
    shifts = distributions(config("ImageFolder"), facts([7, 80, 80, 9]), labels)
    check(shifts, labels)
    found = by_name(shifts)
    for name, counts in (
        ("forward10", longtail_counts(12, 4, 0.1)),
        ("backward10", longtail_counts(12, 4, 0.1)[::-1]),
        ("uniform", [12] * 4),
    ):
        assert [int(found[name].counts[k]) for k in (1, 2, 3, 0)] == counts
        assert found[name].origin == "drawn with seed 0"
    assert found["forward50"].counts.min() == 0 and "classes without an image: 2" in found["forward50"].origin


def test_capped_training_images_do_not_change_the_order_of_the_classes(tmp_path: Path) -> None:
    trained = [(label, number) for label, count in enumerate((3, 9, 6)) for number in range(count)]
    (tmp_path / "train.txt").write_text("".join(f"{label}-{number}.png {label}\n" for label, number in trained))
    (tmp_path / "test.txt").write_text("".join(f"t{n}.png {n % 3}\n" for n in range(60)))
    lists = {"data_dir": str(tmp_path), "train_list": "train.txt", "test_list": "test.txt", "test_dists": ["forward10"]}
    labels = torch.arange(60) % 3
    whole, capped = (config("ImageList", **lists, **more) for more in ({}, {"subset_cap": 3}))
    assert build_info(capped).class_counts.tolist() == [3, 3, 3]
    for cfg in (whole, capped):
        (found,) = distributions(cfg, build_info(cfg), labels)
        assert found.counts.tolist() == [2, 20, 6]


def test_more_images_than_there_are() -> None:
    labels = torch.tensor([0] * 30 + [1] * 12)
    shift = distributions(config("ImageFolder", shift_max=20, test_dists=["uniform"]), facts([9, 8]), labels)[0]
    assert shift.counts.tolist() == [20, 12] and "classes with fewer images than asked for: 1" in shift.origin
    empty = distributions(config("ImageFolder", test_dists=["forward2"]), facts([9, 8, 5]), labels)[0]
    assert empty.counts.tolist() == [12, 8, 0]  # a class without a test image does not empty the others


@pytest.mark.parametrize("order", ["label", "counts"])
@pytest.mark.parametrize("limit", [8, 40, 1000])
def test_a_cut_test_split_keeps_the_shape(order: str, limit: int) -> None:
    cfg = config("Fake", num_classes=10, max_test_images=limit, shift_order=order)
    data = build_data(cfg)
    shifts = by_name(distributions(cfg, data.info, data.test.labels))
    check(tuple(shifts.values()), data.test.labels)
    forward, backward = shifts["forward10"], shifts["backward10"]
    assert len(forward.positions) and len(backward.positions)
    if limit > 10:
        assert forward.counts[:3].sum() > forward.counts[-3:].sum()
        assert backward.counts[:3].sum() < backward.counts[-3:].sum()
    assert (forward.origin == "the published construction") == (order == "label" and limit == 1000)


# --- the published files themselves ----------------------------------------------------------------------------------

FOLDERS = {"imagenet_lt": "ImageNet_LT", "places_lt": "Places_LT_v2", "inat2018": "iNaturalist18"}


@pytest.mark.parametrize("data", FIRST)
@pytest.mark.parametrize("field", ["id", "name"])
def test_the_published_files(data: str, field: str, tmp_path: Path) -> None:
    """Where a checkout has them (environment variable TAILTUNE_DATA): every file passes as what it is."""
    folder = TAILTUNE_DATA / "lt_lists" / FOLDERS[data]
    if not folder.is_dir() or (field == "name" and data != "inat2018"):
        pytest.skip(f"no {folder}")
    for file in folder.glob("*.txt"):
        (tmp_path / file.name).symlink_to(file.absolute())
    (tmp_path / "categories.json").symlink_to(folder.parent.absolute() / "classnames/iNaturalist18_categories.json")
    cfg = shipped(data, "lists", tmp_path, *(("label_field", field) if data == "inat2018" else ()))
    info = build_info(cfg)
    lines = (tmp_path / cfg.test_list).read_text().splitlines()
    own = np.array([int(line.split()[1]) for line in lines])
    species = sorted(json.loads((tmp_path / "categories.json").read_text()), key=lambda each: each["id"])
    names = sorted(each["name"] for each in species)
    rank = np.array([names.index(each["name"]) for each in species]) if field == "name" else np.arange(8142)
    labels = torch.from_numpy(rank[own])
    shifts = distributions(cfg, info, labels)
    check(shifts, labels)
    assert {each.name: (len(each.positions), int(own[each.positions].sum())) for each in shifts} == SUMS[data]
    for each in shifts:
        if each.name == "uniform":
            continue
        file = tmp_path / cfg.shift_files.replace("{name}", each.name)
        assert is_published(file) and each.origin.startswith(f"published list {file.name}")
        assert [lines[i] for i in each.positions] == file.read_text().splitlines()


def test_the_files_of_the_shipped_configs_are_published() -> None:
    for path in (FOLDER / "data").glob("*.yaml"):
        cfg = shipped(path.stem)
        for name in names_of(cfg) if cfg.shift_files else ():
            assert name == "uniform" or cfg.shift_files.replace("{name}", name) in PUBLISHED
