"""LT-Soups: capped subsets, and runs that start from merged runs (successors' specification §5.2, fixture 45)."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file
from torch import Tensor
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_data, build_info
from tailtune.datasets.long_tail import capped_subset
from tailtune.datasets.splits.split_records import Record
from tailtune.models import resolve
from tailtune.scripts import _grid
from tailtune.trainers.config_checks import outline
from tailtune.trainers.runs import merged_runs, trained_images
from tailtune.trainers.runs.merged_runs import MergeOptions, merged
from tailtune.trainers.runs.run_folder import FACTS

Config = Callable[..., CfgNode]
CAPS = (5, 10, 20, 40, 80, 160, 320)
SIZES = (500, 949, 1705, 2926, 4777, 7296, 9959)


def test_sizes_are_those_of_the_fixture(config: Config) -> None:
    sizes = []
    for cap in CAPS:
        info = build_info(resolve(config("cifar100_ir100", "tiny_clip", "subset_cap", cap)))
        sizes.append(int(info.class_counts.sum()))
        assert {name: len(each) for name, each in info.groups.items()} == {"many": 35, "med": 35, "few": 30}
    assert tuple(sizes) == SIZES


def test_the_grid_trains_for_the_steps_of_the_fixture() -> None:
    """The original counts one step more where a subset is a multiple of the batch: 580 instead of 570."""
    steps = {}
    for cell in _grid.read("lt_soups").cells:
        options = dict(zip(cell.words[4::2], cell.words[5::2], strict=True))
        if "subset_cap" in options:
            size = SIZES[CAPS.index(int(options["subset_cap"]))]
            whole = math.ceil(size / 128) * int(options.get("num_epochs", 10))
            steps[int(options["subset_cap"])] = min(whole, int(options.get("max_steps", whole)))
            assert options["subset_seed"] == str(CAPS.index(int(options["subset_cap"])))
        else:
            assert len(options["merge_runs"].split(",")) == 14
    assert [steps[cap] for cap in CAPS] == [100, 100, 140, 230, 380, 570, 780]


def test_a_capped_subset_is_drawn_as_in_the_original() -> None:
    """One generator for all classes, in the order of the labels; small classes are kept whole."""
    labels = np.array([2, 0, 0, 1, 0, 2, 0, 1, 0, 2])
    random, wanted = np.random.default_rng(3), []
    for label in range(3):
        positions = [index for index, each in enumerate(labels) if each == label]
        wanted.extend(random.choice(positions, min(2, len(positions)), replace=False).tolist())
    assert capped_subset(labels, 2, 3).tolist() == sorted(wanted)
    assert capped_subset(labels, 9, 3).tolist() == list(range(10))


def test_a_capped_split_does_not_depend_on_the_seed_of_the_run(config: Config) -> None:
    words = ("pretrained", "none", "subset_cap", 3, "val_per_class", 1)
    one, other, third = (
        build_data(resolve(config("fake_lt", "tiny_clip", *words, *more)))
        for more in ((), ("seed", 1), ("subset_seed", 1))
    )
    assert one.train.indices.tolist() == other.train.indices.tolist() != third.train.indices.tolist()
    assert one.info.class_counts.max() == 3 and one.val is not None and one.info.class_counts.sum() == len(one.train)
    whole = build_data(resolve(config("fake_lt", "tiny_clip", "pretrained", "none", "val_per_class", 1)))
    assert set(one.train.indices) <= set(whole.train.indices)
    assert all(torch.equal(one.info.groups[name], each) for name, each in whole.info.groups.items())


def numbered(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of run k: the number k, and integers that all runs share."""
    return {"weight": torch.full((2,), float(checkpoint.parent.name)).double(), "positions": torch.tensor([3, 5])}


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_runs, "folders", lambda options: [Path(name) for name in options.runs])


@pytest.mark.usefixtures("paths")
def test_runs_are_merged_one_after_another() -> None:
    """θ ← .3 θ + .7 mean of two, twice."""
    start = {"weight": torch.zeros(2), "positions": torch.tensor([3, 5])}
    found = merged(start, MergeOptions(["1", "2", "5", "9"], 0.7, 2), numbered)
    assert found["weight"].tolist() == pytest.approx([0.3 * 0.7 * 1.5 + 0.7 * 7] * 2)
    assert found["weight"].dtype == torch.float32 and found["positions"].tolist() == [3, 5]
    assert merged(start, MergeOptions([]), numbered)["weight"].tolist() == [0, 0]


@pytest.mark.usefixtures("paths")
def test_the_weights_of_seven_runs_are_those_of_the_fixture() -> None:
    tensors = [{"weight": row} for row in torch.eye(8)]
    found = merged(tensors[0], MergeOptions([*"1234567"]), lambda checkpoint: tensors[int(checkpoint.parent.name)])
    wanted = [0.000219, 0.000510, 0.001701, 0.005670, 0.018900, 0.063000, 0.21, 0.7]
    assert found["weight"].tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.usefixtures("paths")
def test_runs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="merge_runs: 1"):
        merged({"weight": torch.zeros(3)}, MergeOptions(["1"]), numbered)
    with pytest.raises(UserError, match="positions of 1 differs"):
        merged({"weight": torch.zeros(2), "positions": torch.tensor([3, 6])}, MergeOptions(["1"]), numbered)


@pytest.mark.parametrize(
    "words, message",
    [
        ("merge_runs a,b", "name that one's model config with `after`"),
        ("merge_share 0.5", "nothing is merged without merge_runs"),
        ("after tiny_clip method crt merge_runs a,b,c merge_together 2", "no multiple of merge_together 2"),
        ("after tiny_clip method distill distill.inner classify merge_runs a", "is a teacher"),
        ("subset_cap 0", "subset_cap must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(words: str, message: str, config: Config) -> None:
    with pytest.raises(UserError, match=message):
        outline(config("fake_lt", "tiny_clip", "pretrained", "none", *words.split()))


def test_training_images_of_merged_runs_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test images that a merged run was trained on are named, also if it had merged or continued others itself."""
    about = {"last": ("start", ["one", "two"]), "two": ("start", ["three"]), "one": (None, []), "three": ("last", [])}
    for name, (after, runs) in about.items():
        (tmp_path / name / "checkpoint").mkdir(parents=True)
        facts = {"after": after and str(tmp_path / after), "merged": {str(tmp_path / each): "" for each in runs}}
        (tmp_path / name / FACTS).write_text(json.dumps(facts))
    splits = {name: SimpleNamespace(records={"train": Record(name)}) for name in (*about, "start")}
    monkeypatch.setattr(trained_images, "kept_splits", lambda home: splits[home.name])
    folder: Any = SimpleNamespace(source=tmp_path / "last", soup=(), foreign=None)
    assert {each.fingerprint for each in trained_images.trained_on(folder, None)} == splits.keys()


def test_the_start_of_runs_that_were_trained_again_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ensemble wise` goes from the start of a run to its end."""
    monkeypatch.setattr(merged_runs, "facts_of", lambda options: {"merged": {"one": "new"}})
    merged_runs.check_unchanged(MergeOptions(["one"]), {"merged": {"one": "new"}, "after": "start"})
    with pytest.raises(UserError, match="a run that was merged was trained again"):
        merged_runs.check_unchanged(MergeOptions(["one"]), {"merged": {"one": "old"}})


def tensors(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoint" / "tensors.safetensors")


def test_the_whole_recipe(launch: Cli, tmp_path: Path) -> None:
    """Two runs on subsets, merged into the start; then the head alone is trained on all images."""
    common = "max_test_images 8 batch_size 16 num_workers 0 "
    for number in (0, 1):
        words = f"-d fake_lt -m tiny_clip_peft {common} num_epochs 1 lr 0.01 subset_cap 2 seed {number}"
        done = launch(f"{words} output_dir soup/run{number}")
        assert done.returncode == 0, done.stdout
    last = f"-d fake_lt -m tiny_clip_h2t {common} h2t.ratio 0 pair_sampler none sampler shuffle max_steps 3 "
    last += "after.num_epochs 0 after.max_test_images 8 merge_together 2 output_dir soup/merged "
    refused = launch(f"{last} merge_runs soup/run0,soup/missing")
    assert refused.returncode == 2 and "merge_runs soup/missing holds no checkpoint" in refused.stdout + refused.stderr
    other = f"-d fake_lt -m tiny_clip_peft {common} num_epochs 1 lr 0.01 subset_cap 2 scale 5 output_dir soup/other"
    assert launch(other).returncode == 0
    refused = launch(f"{last} merge_runs soup/run0,soup/other")
    assert refused.returncode == 2 and "soup/other was trained with scale 5" in refused.stderr
    done = launch(f"{last} merge_runs soup/run0,soup/run1")
    assert done.returncode == 0, done.stdout
    output = tmp_path / "output" / "soup"
    one, other, result = (tensors(output / name) for name in ("run0", "run1", "merged"))
    start = tensors(output / "merged" / "stage1")
    assert start.keys() == one.keys() == result.keys()
    for name, first in start.items():
        wanted = 0.3 * first + 0.7 * (one[name] + other[name]) / 2
        if name.startswith("model.head"):
            assert not torch.allclose(result[name], wanted, atol=1e-6)
        else:
            torch.testing.assert_close(result[name], wanted, rtol=1e-6, atol=1e-7)
    facts = json.loads((output / "merged" / "checkpoint" / "facts.json").read_text())
    assert [Path(path).name for path in facts["merged"]] == ["run0", "run1"]
    assert json.loads((output / "run0" / "metrics.json").read_text())["subset_cap"] == 2
