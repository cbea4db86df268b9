"""The published long-tailed subsets, hold-outs and groups."""

import numpy as np
import pytest
import torch

from tailtune.configs.errors import UserError
from tailtune.datasets.long_tail import (
    capped_counts,
    check_hold_out,
    hold_out,
    longtail_counts,
    random_positions,
    subsample,
)
from tailtune.datasets.shot_groups import shot_groups

CYCLE = np.arange(50_000) % 100
"""Synthetic labels, image i in class i mod 100: the position within its class is i // 100."""


@pytest.mark.parametrize(("imb", "total"), [(0.01, 10_847), (0.02, 12_608), (0.1, 19_573)])
def test_cifar100_totals(imb: float, total: int) -> None:
    assert sum(longtail_counts(500, 100, imb)) == total


def test_counts() -> None:
    assert longtail_counts(5000, 10, 0.01) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert longtail_counts(500, 100, 0.01)[:11] == [500, 477, 455, 434, 415, 396, 378, 361, 344, 328, 314]
    assert longtail_counts(500, 100, 0.01)[-8:] == [6, 6, 6, 6, 5, 5, 5, 5]
    assert longtail_counts(128, 10, 1 / 64)[0] == 128
    assert longtail_counts(128, 10, 1 / 64)[-1] == 2
    assert longtail_counts(7, 1, 0.1) == [7]


@pytest.mark.parametrize(
    ("imb", "checksum"),
    [(0.01, 56_872_736), (0.02, 74_823_927), (0.1, 160_497_249)],
)
def test_lift_positions(imb: float, checksum: int) -> None:
    chosen = subsample(CYCLE, longtail_counts(500, 100, imb))
    within = [chosen[CYCLE[chosen] == k] // 100 for k in range(100)]
    assert within[0][:8].tolist() == [90, 254, 283, 445, 461, 15, 316, 489]
    assert within[1][:8].tolist() == [277, 307, 436, 88, 261, 57, 413, 459]
    assert within[50][:8].tolist() == [307, 484, 149, 423, 351, 193, 34, 338]
    assert within[99][:5].tolist() == [348, 153, 363, 361, 299]
    assert sum((k + 1) * int(each.sum()) for k, each in enumerate(within)) == checksum
    assert (np.diff(CYCLE[chosen]) >= 0).all()


def test_sade_indices() -> None:
    chosen = subsample(CYCLE, longtail_counts(500, 100, 0.01))
    assert chosen[:5].tolist() == [9000, 25400, 28300, 44500, 46100]
    assert chosen[500:505].tolist() == [27701, 30701, 43601, 8801, 26101]
    assert chosen[-5:].tolist() == [34899, 15399, 36399, 36199, 29999]
    assert int(chosen.sum()) == 271_164_136


def test_sade_forward_test_set() -> None:
    labels = np.arange(10_000) % 100
    chosen = subsample(labels, longtail_counts(100, 100, 1 / 50))
    assert len(chosen) == 2486
    assert chosen[:5].tolist() == [2600, 8600, 200, 5500, 7500]
    assert chosen[100:105].tolist() == [1801, 2901, 6401, 9201, 7201]
    assert chosen[-2:].tolist() == [2799, 399]
    assert int(chosen.sum()) == 12_415_935


def test_user_data_are_capped_by_what_there_is() -> None:
    assert capped_counts([10, 200, 50, 1], 0.125) == [10, 100, 50, 1]
    assert capped_counts([10, 200], None) == [10, 200]
    for wrong in (0.0, 1.5):
        with pytest.raises(UserError, match="imb_factor"):
            capped_counts([10, 200], wrong)


def test_hold_out_is_balanced_and_disjoint() -> None:
    labels = np.array([0] * 9 + [1] * 4 + [2] * 30)
    held, rest = hold_out(labels, 3, ["a", "b", "c"], "val_per_class")
    assert labels[held].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert sorted([*held, *rest]) == list(range(len(labels)))
    again, _ = hold_out(labels, 3, ["a", "b", "c"], "val_per_class")
    assert held.tolist() == again.tolist()


def test_hold_out_names_the_small_class() -> None:
    with pytest.raises(UserError, match="val_per_class 4.*'b'.*4 images"):
        hold_out(np.array([0] * 9 + [1] * 4), 4, ["a", "b"], "val_per_class")
    with pytest.raises(UserError, match="'gone'.*0 images"):
        check_hold_out([5, 0], 1, ["a", "gone"], "test_per_class")


def test_shot_groups() -> None:
    counts = [101, 100, 20, 19, 0]
    groups = {name: classes.tolist() for name, classes in shot_groups(counts, 100, 20).items()}
    assert groups == {"many": [0], "med": [1, 2], "few": [3, 4]}
    sizes = {name: len(classes) for name, classes in shot_groups(longtail_counts(500, 100, 0.01), 100, 20).items()}
    assert sizes == {"many": 35, "med": 35, "few": 30}


def test_some_positions() -> None:
    assert random_positions(5, None).tolist() == random_positions(5, 9).tolist() == [0, 1, 2, 3, 4]
    some = random_positions(1000, 100)
    assert len(set(some.tolist())) == 100
    assert (np.diff(some) > 0).all()
    assert some[-1] > 900


def test_global_generators_stay_as_they_are() -> None:
    state = np.random.get_state(legacy=False)["state"]["key"].copy(), torch.get_rng_state()
    subsample(CYCLE, [3] * 100)
    hold_out(CYCLE, 3, [str(k) for k in range(100)], "val_per_class")
    random_positions(100, 10)
    assert (np.random.get_state(legacy=False)["state"]["key"] == state[0]).all()
    assert torch.equal(torch.get_rng_state(), state[1])
