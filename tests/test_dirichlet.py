"""Drawn test distributions: DirMixE's own sets to the image (fixture D4), what is learnt from what, and the summary."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import Cli
from test_shifts import by_name, check, config, distributions, facts, names_of, shipped
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_info
from tailtune.datasets.data_bundle import TestDistribution
from tailtune.datasets.long_tail import longtail_counts
from tailtune.datasets.sources.inaturalist import taxon_labels
from tailtune.datasets.test_distributions.dirichlet import (
    PUBLISHED_CIFAR,
    PUBLISHED_LISTS,
    component_of,
    dirichlet_names,
    draw_counts,
    draw_images,
)
from tailtune.trainers.evaluation.distributions import dirichlet_summary
from tailtune.trainers.evaluation.expert_weights import Learner, Recipe, StreamLearner
from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.runs.result_table import dirichlet_lines

TAILTUNE_DATA = Path(os.environ.get("TAILTUNE_DATA", "nowhere"))
KINDS = ("uniform", "forward", "backward")
NINE = tuple(f"dirichlet-{kind}{k}" for kind in KINDS for k in (1, 2, 3))


def digest(counts: list[int]) -> str:
    return hashlib.sha256(",".join(map(str, counts)).encode()).hexdigest()[:12]


def learnt_counts(shift: TestDistribution, labels: Tensor) -> list[int]:
    assert shift.learn_positions is not None
    return torch.bincount(labels[shift.learn_positions], minlength=len(shift.counts)).tolist()


def cifar(classes: int, *pairs: object) -> tuple[dict[str, TestDistribution], Tensor]:
    labels = torch.arange(10_000) % classes
    cfg = shipped(f"cifar{classes}_ir100", "test_dists", "dirichlet", *pairs)
    shifts = distributions(cfg, build_info(cfg), labels)
    check(shifts, labels)
    return by_name(shifts), labels


# --- fixture D4 ------------------------------------------------------------------------------------------------------

FIRST = [4380, 4717, 4463, 4416, 4594, 4354, 3827, 4632, 5000, 4005]
TRAIN = {
    10: [44388, 47655, 45760, 12529, 12734, 12327, 12321, 12011, 12312],
    100: [22526, 21160, 19175, 7688, 9015, 8652, 8901, 6812, 8272],
}
LEARN = {
    10: "8540 d753bed524eb 8449 abd9d2ec5eed 9184 6768d6fcda91 2355 a099d6337d2e 2421 cc5fa751604e 2473 8041c7d2b3a5 "
    "2353 e37749ed0930 2371 ad7ad1ff4094 2645 2058c881eab6",
    100: "1800 228561c7b663 2380 2088a26a17d5 1879 b50d06e3a54b 1626 080f7e363987 1211 0db7354ae394 1404 4a912c8e77f6 "
    "1164 54307375f081 1218 b3bd98538446 1278 c7dcad330575",
}
C10 = """889 925 930 960 889 960 882 910 926 1000
831 802 687 1000 737 920 974 775 799 828
820 831 735 744 1000 837 788 825 906 721
1000 597 351 210 149 93 44 29 20 13
1000 588 378 238 118 83 45 29 17 9
1000 587 276 222 139 59 35 29 18 26
13 24 27 59 88 95 246 384 684 1000
2 9 27 43 68 154 177 350 613 1000
10 12 31 39 60 159 277 374 537 1000"""
C100 = (
    "1638 04da0fa32c83 1850 10ffc5309723 1303 cff2b65b8d2b 1792 79805ff65c1a 1494 eb375a321905 1862 e048a3bf296d "
    "1074 416e3d7977a2 1170 aed6d8c19d79 956 f223d94e7104"
)
IMAGES = {
    10: [46369021, 41605787, 40998068, 12584534, 12467635, 11948737, 13273998, 12226600, 12588752],
    100: [8269544, 9125309, 6446224, 8806011, 7441584, 9143807, 5430233, 5878883, 4790038],
}
LEARN_IMAGES = {
    10: [42611206, 42288819, 45976184, 11834136, 12005306, 12425967, 11733974, 11951177, 13179951],
    100: [8951163, 11809798, 9580205, 8155101, 6105495, 6965625, 5843331, 5988798, 6513862],
}
"""Sums of the positions that the original's classes choose, for labels 0, 1, 2, … in turn."""


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_as_published(classes: int) -> None:
    found, labels = cifar(classes)
    assert tuple(found) == NINE
    each = found.values()
    learnt = [learnt_counts(shift, labels) for shift in each]
    assert " ".join(f"{sum(counts)} {digest(counts)}" for counts in learnt) == LEARN[classes]
    counts = [shift.counts.tolist() for shift in each]
    if classes == 10:
        assert counts == [[int(n) for n in line.split()] for line in C10.splitlines()]
    else:
        assert " ".join(f"{sum(c)} {digest(c)}" for c in counts) == C100
    assert [int(shift.positions.sum()) for shift in each] == IMAGES[classes]
    learnt = [shift.learn_positions for shift in each if shift.learn_positions is not None]
    assert [int(positions.sum()) for positions in learnt] == LEARN_IMAGES[classes]
    assert {shift.origin for shift in each} == {"the published construction"}


@pytest.mark.parametrize("classes", [10, 100])
def test_the_draws_of_training_images_come_first(classes: int) -> None:
    stream, sizes = np.random.RandomState(0), (50_000 // classes, 10_000 // classes, 10_000 // classes)
    totals = []
    for kind in np.repeat(KINDS, 3):
        for m in sizes:
            base = longtail_counts(m, classes, 1 if kind == "uniform" else 0.01)
            counts = draw_counts(stream, base[::-1] if kind == "backward" else base, m, m, 1)
            draw_images(stream, counts, [np.arange(m)] * classes)
            totals += [counts] if m == sizes[0] else []
    assert [sum(counts) for counts in totals] == TRAIN[classes]
    assert classes == 100 or totals[0] == FIRST


@pytest.mark.parametrize(
    ("file", "classes", "m", "expected"),
    [
        ("ImageNet_LT_uniform.txt", 1000, 50, ["22440 4bc2e4c6e5aa 0", "9821 cbe2b1251b4e 0", "9532 6d1cb5c5263e 0"]),
        (
            "iNaturalist18_val.txt",
            8142,
            3,
            ["6333 8117d57a9593 2047", "3267 215f1a93af08 4984", "3434 d05c892b4db2 4850"],
        ),
    ],
)
def test_the_procedure_for_lists(file: str, classes: int, m: int, expected: list[str]) -> None:
    """One set of each component in turn, for class counts in descending order."""
    (ratio, concentration, least), stream, found = PUBLISHED_LISTS[file], np.random.RandomState(0), []
    for kind in KINDS:
        base = longtail_counts(m, classes, 1 if kind == "uniform" else 1 / ratio)
        counts = draw_counts(stream, base[::-1] if kind == "backward" else base, m, concentration, least)
        draw_images(stream, counts, [np.arange(m)] * classes)
        found.append(f"{sum(counts)} {digest(counts)} {counts.count(0)}")
        assert kind != "uniform" or least == 0 or min(counts) == 7
    assert found == expected


FILES = {
    "imagenet_lt": (
        [22395, 21206, 21567, 8703, 9247, 7911, 9034, 8468, 8434],
        [557965242, 522153572, 542488879, 216233328, 233724760, 198107313, 229864228, 213533917, 214373008],
    ),
    "inat2018": (
        [5916, 6191, 6336, 3851, 3900, 3396, 4356, 3603, 4500],
        [72458345, 75510244, 77238192, 47068695, 47454134, 41182522, 52594098, 43602672, 54920453],
    ),
}
"""Images of each set, and the sums of their positions in the test list, as the original's classes choose them."""


@pytest.mark.parametrize("data", FILES)
@pytest.mark.parametrize("field", ["id", "name"])
def test_the_published_lists(data: str, field: str, tmp_path: Path) -> None:
    """Where a checkout has them (environment variable TAILTUNE_DATA); labels of the lists, and ranks of names."""
    folder = TAILTUNE_DATA / "lt_lists" / {"imagenet_lt": "ImageNet_LT", "inat2018": "iNaturalist18"}[data]
    if not folder.is_dir() or (field == "name" and data != "inat2018"):
        pytest.skip(f"no {folder}")
    for file in folder.glob("*.txt"):
        (tmp_path / file.name).symlink_to(file.absolute())
    categories = folder.parent.absolute() / "classnames/iNaturalist18_categories.json"
    (tmp_path / "categories.json").symlink_to(categories)
    pairs = ("label_field", field) if data == "inat2018" else ()
    cfg = shipped(data, "lists", tmp_path, "test_dists", "dirichlet", *pairs)
    own = np.loadtxt(tmp_path / cfg.test_list, usecols=1, dtype=np.int64)
    labels = torch.from_numpy(own if data == "imagenet_lt" else taxon_labels(categories, field)[0][own])
    shifts = distributions(cfg, build_info(cfg), labels)
    check(shifts, labels)
    assert [len(each.positions) for each in shifts] == FILES[data][0]
    assert [int(each.positions.sum()) for each in shifts] == FILES[data][1]
    assert all(each.origin.startswith("the published construction") for each in shifts)


def test_imagenet_without_its_list_is_said(caplog: pytest.LogCaptureFixture) -> None:
    cfg = shipped("imagenet_lt", "root", "/nowhere", "test_dists", "dirichlet-forward2")
    caplog.set_level("INFO", "tailtune")
    (shift,) = distributions(cfg, build_info(cfg), torch.arange(1000).repeat(50))
    assert shift.origin == "drawn with seed 0, without the list ImageNet_LT_uniform.txt"
    assert len(shift.positions) == FILES["imagenet_lt"][0][4] and "SADE-AgnosticLT" in caplog.text


# --- SADE's setting as DirMixE uses it -------------------------------------------------------------------------------

RATIOS = {100: (2478, 2131), 50: (2795, 2486), 25: (3229, 2956), 10: (4084, 3876), 5: (5081, 4932), 2: (7241, 7166)}


@pytest.mark.parametrize("classes", [10, 100])
def test_thirteen_sets_of_cifar(classes: int) -> None:
    cfg = shipped(f"cifar{classes}_ir100", "test_dists", "[all]", "shift_ratios", "[2,5,10,25,50,100]")
    shifts = distributions(cfg, build_info(cfg), torch.arange(10_000) % classes)
    totals = [each[classes == 100] for each in RATIOS.values()]
    assert [len(each.positions) for each in shifts] == [*totals, 10_000, *totals[::-1]]
    names = [*(f"forward{r}" for r in RATIOS), "uniform", *(f"backward{r}" for r in reversed(RATIOS))]
    assert [each.name for each in shifts] == names


# --- names and options -----------------------------------------------------------------------------------------------


def test_names() -> None:
    assert names_of(config("Fake", test_dists=["dirichlet"])) == NINE
    mixed = config("Fake", test_dists=["uniform", "dirichlet-forward", "dirichlet-backward2", "dirichlet-forward1"])
    assert names_of(mixed) == ("uniform", *NINE[3:6], NINE[7])
    beside = names_of(config("Fake", test_dists=["all", "dirichlet"], shift_ratios=[2]))
    assert beside == ("forward2", "uniform", "backward2", *NINE)
    assert len(dirichlet_names("dirichlet", 5)) == 15
    assert [component_of(name) for name in ("dirichlet-forward12", "forward2", "uniform")] == ["forward", None, None]


@pytest.mark.parametrize("name", ["dirichlet-sideways1", "dirichlet-forward4", "dirichlet-forward0", "dirichlets"])
def test_a_wrong_name(name: str) -> None:
    with pytest.raises(UserError, match=rf"test_dists: .* '{name}'; choices: dirichlet, dirichlet-uniform, .*trials 3"):
        build_info(config("CIFAR100", root="/nowhere", test_dists=["uniform", name]))


def test_one_set_is_what_it_is_among_all() -> None:
    found, _ = cifar(100)
    alone, _ = cifar(100, "test_dists", "uniform,dirichlet-forward2")
    assert list(alone) == ["uniform", "dirichlet-forward2"] and alone["uniform"].learn_positions is None
    for key in ("positions", "counts", "learn_positions"):
        assert torch.equal(getattr(alone[NINE[4]], key), getattr(found[NINE[4]], key))


def test_capped_training_images_do_not_change_the_test_sets() -> None:
    """A run on at most five images of a class is tested on the same images as the others."""
    found, _ = cifar(100, "subset_cap", 5)
    assert [int(each.positions.sum()) for each in found.values()] == IMAGES[100]


def test_what_is_not_published_is_not_called_so() -> None:
    changes = {
        "shift_seed": 1,
        "dirichlet_trials": 4,
        "dirichlet_ratio": 50,
        "dirichlet_concentration": 1e4,
        "dirichlet_least": 0,
    }
    for key, value in changes.items():
        found, _ = cifar(10, key, value)
        assert {each.origin for each in found.values()} == {f"drawn with seed {int(key == 'shift_seed')}"}
    assert PUBLISHED_CIFAR == (100, None, 1)


def test_a_larger_concentration_spreads_less() -> None:
    """With S → ∞ the counts are those of the component but for ±5 %, relative to a class that has +5 % at most."""
    loose, tight = (cifar(100, "dirichlet_concentration", value)[0]["dirichlet-forward1"] for value in (100, 1e9))
    base = torch.tensor(longtail_counts(100, 100, 0.01))
    assert (tight.counts[:10] / base[:10]).min() > 0.88 and (loose.counts[:10] / base[:10]).min() < 0.5


def test_a_concentration_of_almost_nothing() -> None:
    with pytest.raises(UserError, match="dirichlet_concentration 1e-09 is too small"):
        cifar(10, "dirichlet_concentration", 1e-9)


@pytest.mark.parametrize("order", ["label", "counts"])
@pytest.mark.parametrize("limit", [8, 40, 1000])
def test_a_cut_split(order: str, limit: int) -> None:
    labels = torch.arange(100)[torch.randperm(100, generator=torch.Generator().manual_seed(0))][:limit] % 10
    cfg = config("Fake", test_dists=["dirichlet"], max_test_images=limit, shift_order=order)
    shifts = by_name(distributions(cfg, facts([40 - 3 * k for k in range(10)]), labels))
    check(tuple(shifts.values()), labels)
    for each in shifts.values():
        assert len(each.positions) and each.origin.startswith("drawn") == (limit < 1000 or order == "counts")
    if limit > 10:
        forward, backward = shifts["dirichlet-forward1"].counts, shifts["dirichlet-backward1"].counts
        assert forward[:3].sum() > forward[-3:].sum() and backward[:3].sum() < backward[-3:].sum()


def test_unbalanced_data_by_training_count() -> None:
    """The largest class has as many images as the smallest of the test split; classes keep what they have."""
    labels = torch.tensor([0] * 30 + [1] * 12 + [2] * 25)
    cfg = config("ImageFolder", test_dists=["dirichlet"], dirichlet_concentration=1e6, dirichlet_ratio=10.0)
    found = by_name(distributions(cfg, facts([7, 90, 9]), labels))
    assert found["dirichlet-forward1"].counts.argmax() == 1 and found["dirichlet-backward1"].counts.argmax() == 0
    assert all(int(each.counts.max()) == 12 for each in found.values())
    short = config("ImageFolder", test_dists=["dirichlet-uniform"], shift_max=20, dirichlet_concentration=1e6)
    shift = distributions(short, facts([7, 90, 9]), labels)[0]
    assert shift.counts[1] == 12 and "classes with fewer images than asked for: 1" in shift.origin


# --- what is learnt from ---------------------------------------------------------------------------------------------


def test_equal_learns_from_the_same_images() -> None:
    own, (equal, _) = cifar(10)[0], cifar(10, "dirichlet_learn", "equal")
    for name in NINE:
        assert equal[name].learn_positions is None and torch.equal(equal[name].positions, own[name].positions)
    assert equal[NINE[0]].origin == "the published construction, weights are learnt from the same images"


def test_disjoint_cuts_every_class_in_halves() -> None:
    own, (halves, labels) = cifar(10)[0], cifar(10, "dirichlet_learn", "disjoint")
    for name in NINE:
        half, whole = halves[name], own[name]
        assert half.learn_positions is not None and "one half of each class" in half.origin
        assert not set(half.positions.tolist()) & set(half.learn_positions.tolist())
        assert set(half.positions.tolist()) | set(half.learn_positions.tolist()) == set(whole.positions.tolist())
        assert half.counts.tolist() == [(n + 1) // 2 for n in whole.counts.tolist()]
        assert learnt_counts(half, labels) == [n // 2 for n in whole.counts.tolist()]


def views(n: int = 60) -> tuple[Logits, Logits]:
    """Experts of which the first is steady on the first half of the images, the second on the rest."""
    draws = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % 5
    clean = 3 * torch.eye(5)[labels].view(n, 1, 1, 5).expand(n, 1, 2, 5)
    first = (torch.arange(n) < n // 2).float()
    noise = torch.randn(n, 2, 2, 5, generator=draws) * 2 * torch.stack([1 - first, first], 1).view(n, 1, 2, 1)
    index = torch.arange(n)
    return Logits(clean[:, 0], labels, index), Logits(clean + noise, labels, index)


def test_weights_are_learnt_from_the_images_to_learn_from() -> None:
    plain, two = views()
    recipe = Recipe(batch_size=8, lr=0.2)
    weights = []
    for learn in (None, torch.arange(30, 60)):
        learner = Learner("x", plain, torch.arange(30), recipe, learn)
        while learner.running:
            learner.learn(two)
        weights.append(learner.weights)
        assert torch.equal(plain.labels[learner.predictions()[1]], plain.labels[:30]), "but the test set is predicted"
        assert learner.facts()["learnt_from"] == 30
    assert weights[0].argmax() == 0 and weights[1].argmax() == 1


def test_a_stream_learns_from_what_it_predicts() -> None:
    plain, two = views()
    own, other = (StreamLearner("x", plain, torch.arange(30), Recipe(), learn) for learn in (None, torch.arange(9)))
    for learner in (own, other):
        learner.learn(two)
    assert torch.equal(own.weights, other.weights) and len(other.predictions()[1]) == 30


def test_nothing_to_learn_from() -> None:
    """Halves of classes with one image each."""
    plain, _ = views()
    learner = Learner("x", plain, torch.arange(5), Recipe(), torch.tensor([], dtype=torch.int64))
    assert not learner.running and learner.weights.tolist() == [0.5, 0.5] and len(learner.predictions()[0]) == 5


# --- mean and deviation ----------------------------------------------------------------------------------------------


def entry(accuracy: float, few: float | None = 0.0, **more: Any) -> dict[str, Any]:
    return {"accuracy": accuracy, "mean_acc": 1.0, "many_acc": 2.0, "med_acc": 3.0, "few_acc": few, **more}


def test_the_summary() -> None:
    results = {
        "uniform": {"predictors": {"plain": entry(99.0)}},
        "dirichlet-uniform1": {"n": 3, "predictors": {"plain": entry(10.0, 5.0), "sade": entry(20.0)}},
        "dirichlet-uniform2": {"n": 3, "predictors": {"plain": entry(14.0, None), "sade": entry(26.0)}},
        "dirichlet-backward3": {"n": 3, "predictors": {"plain": entry(30.0, 5.0), "sade": entry(50.0)}},
    }
    found = dirichlet_summary(results)
    assert list(found) == ["uniform", "backward", "all"] and found["uniform"]["predictors"].keys() == {"plain", "sade"}
    assert found["uniform"]["predictors"]["plain"].keys() == {"accuracy", "mean_acc", "many_acc", "med_acc", "few_acc"}
    assert found["uniform"]["predictors"]["plain"]["accuracy"] == {"mean": 12.0, "std": pytest.approx(8**0.5)}
    assert found["uniform"]["predictors"]["sade"]["accuracy"] == {"mean": 23.0, "std": pytest.approx(18**0.5)}
    assert found["uniform"]["predictors"]["plain"]["few_acc"] == {"mean": None, "std": None}
    assert found["backward"]["predictors"]["sade"]["accuracy"] == {"mean": 50.0, "std": None}
    assert found["all"]["draws"] == 3 and found["all"]["predictors"]["plain"]["accuracy"]["mean"] == 18.0
    assert found["all"]["predictors"]["plain"]["accuracy"]["std"] == pytest.approx(((64 + 16 + 144) / 2) ** 0.5)
    assert dirichlet_summary({"uniform": results["uniform"]}) == {}


def test_its_table() -> None:
    results = {name: {"predictors": {"plain": entry(k * 10.0), "sade": entry(100.0)}} for k, name in enumerate(NINE)}
    lines = dirichlet_lines(dirichlet_summary(results))
    assert len(lines) == 3 + 3 * 4 + 2 and dirichlet_lines({}) == []
    assert lines[3] == "uniform (3)" and lines[4].split()[:4] == ["plain", "10.00", "±", "10.00"]
    assert lines[5].split()[:4] == ["sade", "100.00", "±", "0.00"] and lines[12] == "all (9)"
    one = dirichlet_lines(dirichlet_summary({NINE[0]: results[NINE[0]]}))
    assert len(one) == 3 + 3 + 2 and "± n/a" in one[4], "all is said where it is not the only component"


# --- runs ------------------------------------------------------------------------------------------------------------

RUN = "-d fake_lt -m tiny_clip pretrained none num_experts 2 max_steps 2 batch_size 16 num_workers 0 output_dir run"


def result(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path("output") / folder / "metrics.json").read_text())
    return found


def test_a_finished_run_answers_from_its_logits(launch: Cli) -> None:
    assert launch(RUN).returncode == 0
    with mock.patch("tailtune.trainers.run.build_data", side_effect=AssertionError("images are not needed")):
        done = launch(RUN, "test_only True test_dists uniform,dirichlet")
    assert done.returncode == 0, done.stderr
    found = result("run/tests/test_dists_uniform-dirichlet")
    assert list(found["distributions"]) == ["uniform", *NINE]
    accuracies = [found["distributions"][name]["predictors"]["plain"]["accuracy"] for name in NINE]
    summary = found["dirichlet"]
    for k, kind in enumerate(KINDS):
        mean = summary[kind]["predictors"]["plain"]["accuracy"]["mean"]
        assert mean == pytest.approx(np.mean(accuracies[3 * k : 3 * k + 3])) and f"{mean:.2f} ± " in done.stdout
    assert summary["all"]["predictors"]["plain"]["accuracy"]["std"] == pytest.approx(np.std(accuracies, ddof=1))
    launch(RUN, "test_only True test_dists uniform")
    assert "dirichlet" not in result("run/tests/test_dists_uniform")


def test_a_run_adapts_to_the_other_draw(launch: Cli) -> None:
    assert (
        launch(RUN, "adapt sade adapt_epochs 1 test_dists dirichlet-forward dirichlet_learn disjoint").returncode == 0
    )
    found = result("run")
    for each in found["distributions"].values():
        assert 0 < each["predictors"]["sade"]["learnt_from"] <= each["n"]
    assert found["dirichlet"].keys() == {"forward", "all"} and "sade" in found["dirichlet"]["all"]["predictors"]
    launch(RUN, "test_only True many_above 30")
    (again,) = Path("output/run/tests").iterdir()
    assert "dirichlet" not in result(f"run/tests/{again.name}"), "it is of one evaluation"


@pytest.mark.parametrize(
    ("words", "culprit", "remedy"),
    [
        ("test_dists dirichlet-sideways1", "'dirichlet-sideways1'", "dirichlet-backward"),
        ("dirichlet_ratio 0.5", "dirichlet_ratio", "1"),
        ("dirichlet_concentration 0", "dirichlet_concentration 0", "above 0"),
        ("dirichlet_concentration -5", "dirichlet_concentration -5", "above 0"),
        ("dirichlet_trials 0", "dirichlet_trials", "1"),
        ("dirichlet_learn other", "dirichlet_learn", "disjoint"),
        ("dirichlet_list some.txt", "dirichlet_list some.txt", "none"),
    ],
)
def test_bad_input(words: str, culprit: str, remedy: str, launch: Cli) -> None:
    for more in ("--dry-run", ""):
        done = launch(RUN, words, more)
        assert done.returncode == 2 and culprit in done.stderr and remedy in done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
