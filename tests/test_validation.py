"""Validation during training: it changes nothing, chooses the best epoch, stops in time, and survives a kill."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, Cli, free_port, offline
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiers import slow_except
from torch import Tensor
from trajectories import Killed

from tailtune.trainers.evaluation.validation import Validation, ValidationPlan
from tailtune.trainers.evaluation.validation_metrics import HIGHER
from tailtune.trainers.storage.resume_states import ResumeStates

COMMAND = "-d fake_lt -m tiny_clip_peft pretrained none subset_cap 4 batch_size 16 val_per_class 2 "
COMMAND += "max_test_images 20 lr 0.3 "
VALIDATED = COMMAND + "num_epochs 4 val_every 1 keep best:mean_acc "


def tensors(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoint" / "tensors.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return found


WITH_BATCH_NORMS = "resnet32_ce backbone ResNet-20"


@pytest.mark.parametrize("model", slow_except([WITH_BATCH_NORMS], ["tiny_clip_peft pretrained none", WITH_BATCH_NORMS]))
def test_training_is_the_same_with_and_without(model: str, launch: Cli, tmp_path: Path) -> None:
    command = f"-d fake_lt -m {model} val_per_class 2 subset_cap 4 batch_size 16 max_test_images 8 num_epochs 2 "
    command += "output_dir "
    assert launch(f"{command}without").returncode == 0
    assert launch(f"{command}with val_every 1").returncode == 0
    assert same(*(tensors(tmp_path / "output" / name) for name in ("without", "with")))


@pytest.mark.parametrize("mode", ["fivecrop", "randaug"])
def test_tte_is_for_the_evaluation_alone(mode: str, launch: Cli, tmp_path: Path) -> None:
    """Validation in training sees one view of each image, whatever the evaluation does."""
    command = f"{COMMAND} num_epochs 1 val_every 1 output_dir "
    assert launch(f"{command}without").returncode == 0
    done = launch(f"{command}with tte True tte_mode {mode}")
    assert done.returncode == 0, done.stderr
    found = [result(tmp_path / "output" / name) for name in ("without", "with")]
    assert found[0]["train"]["validations"] == found[1]["train"]["validations"]
    assert found[0]["val"]["nll"] != found[1]["val"]["nll"]


def test_validation_draws_nothing_and_restores_modes(launch: Cli, tmp_path: Path) -> None:
    """Even a library that draws while it predicts changes nothing."""
    seen: list[tuple[list[bool], Tensor]] = []
    original = Validation.after_epoch

    def noisy(images: Tensor) -> Tensor:
        return torch.rand(len(images), 1, 10)

    def recorded(self: Validation, method: Any, *rest: Any) -> Any:
        method.model.head.eval()  # a part that does not train all the time
        before = [each.training for each in method.modules()], torch.get_rng_state()
        with mock.patch("tailtune.trainers.evaluation.tta.plain", lambda method: noisy):
            found = original(self, method, *rest)
        seen.extend([before, ([each.training for each in method.modules()], torch.get_rng_state())])
        return found

    with mock.patch.object(Validation, "after_epoch", recorded):
        assert launch(f"{COMMAND} num_epochs 1 val_every 1 output_dir run").returncode == 0
    (modes, draws), (modes_after, draws_after) = seen
    assert modes == modes_after and True in modes and False in modes and torch.equal(draws, draws_after)


def test_the_best_epoch_is_kept(launch: Cli, tmp_path: Path) -> None:
    """By hand: the tensors of every epoch's saved state, and the largest number of the validations."""
    states: dict[int, dict[str, Tensor]] = {}
    original = ResumeStates.save

    def recorded(self: ResumeStates, step: int, saved: dict[str, Tensor], facts: dict[str, Any]) -> None:
        states[step] = {name: tensor.clone() for name, tensor in saved.items() if name.startswith("method.")}
        original(self, step, saved, facts)

    with mock.patch.object(ResumeStates, "save", recorded):
        done = launch(f"{VALIDATED} print_freq 100 output_dir run")
    assert done.returncode == 0
    run = tmp_path / "output" / "run"
    found = result(run)["train"]
    assert [each["epoch"] for each in found["validations"]] == [1, 2, 3, 4]
    values = [each["mean_acc"] for each in found["validations"]]
    best = found["validations"][values.index(max(values))]
    assert found["kept_epoch"] == best["epoch"]
    kept = {name.removeprefix("method."): tensor for name, tensor in states[best["step"]].items()}
    assert same(tensors(run), kept)
    assert result(run)["val"]["mean_acc"] == pytest.approx(best["mean_acc"]), "fp32 on both sides"
    assert result(run)["val"]["nll"] == pytest.approx(best["nll"], rel=1e-5)
    assert f"the weights are those of epoch {best['epoch']}, the best of 4" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("epoch [")]
    assert len(lines) == 4 and all(" val acc " in line for line in lines), "one line an epoch"
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    curve = [(each.step, each.value) for each in events.Scalars("val/mean_acc")]
    assert curve == [(each["step"], pytest.approx(each["mean_acc"])) for each in found["validations"]]


def plan_of(metric: str | None, patience: int | None = None) -> Validation:
    """A validation whose data are not read."""
    data = mock.Mock()
    return Validation(ValidationPlan(1, metric, patience, 8, 0), data, mock.Mock(), mock.Mock())


def validations(metric: str, values: Sequence[float]) -> list[dict[str, Any]]:
    return [{"epoch": number, "step": 5 * number, metric: value} for number, value in enumerate(values, start=1)]


def test_the_first_of_equal_epochs_is_the_best() -> None:
    best = plan_of("accuracy").best_of(validations("accuracy", [1, 3, 3, 2]))
    assert best is not None and best["epoch"] == 2
    lowest = plan_of("nll").best_of(validations("nll", [3, 1, 2, 1]))
    assert lowest is not None and lowest["epoch"] == 2
    assert plan_of(None).best_of(validations("nll", [3.0])) is None
    assert plan_of("nll").best_of([]) is None


@pytest.mark.parametrize(
    ("values", "ends"), [([], False), ([5], False), ([5, 4], False), ([5, 5, 4], True), ([5, 4, 6], False)]
)
def test_patience_counts_validations_without_a_better_one(values: list[float], ends: bool) -> None:
    assert plan_of("accuracy", 2).ends(validations("accuracy", values)) == ends
    assert not plan_of("accuracy").ends(validations("accuracy", values))


def falling(self: Validation, *rest: Any) -> dict[str, float | None]:
    """Measured accuracies that fall from the first epoch on."""
    return {**dict.fromkeys(HIGHER, 100.0 - rest[-1]), "many_acc": 1.0, "med_acc": None, "few_acc": 2.0, "nll": 1.0}


def test_patience_ends_a_run_and_it_stays_ended(launch: Cli, tmp_path: Path) -> None:
    words = f"{VALIDATED} patience 2 output_dir run"
    with mock.patch.object(Validation, "_measured", falling):
        done = launch(words)
    assert done.returncode == 0 and "patience 2 ended the training after epoch 3" in done.stdout
    run = tmp_path / "output" / "run"
    found = result(run)
    assert found["stopped_early"] and found["train"]["epochs"] == 3 and found["train"]["kept_epoch"] == 1
    assert any("patience 2" in note for note in found["notes"])
    first = tensors(run)
    (run / "metrics.json").unlink()  # as if it was killed before its evaluation
    done = launch(words)
    assert done.returncode == 0 and "epoch [4" not in done.stdout
    assert same(tensors(run), first)


def killed_run(launch: Cli, words: str, at: int) -> None:
    """Kill a launch before the state after validation number `at` is written."""
    count = 0
    original = ResumeStates.save

    def save(self: ResumeStates, *rest: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise Killed
        original(self, *rest)

    with mock.patch.object(ResumeStates, "save", save), pytest.raises(Killed):
        launch(words)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("metric", slow_except(["mean_acc"], ["mean_acc", "nll"]))
def test_a_killed_run_keeps_the_same_epoch(metric: str, launch: Cli, tmp_path: Path) -> None:
    words = f"{COMMAND} num_epochs 3 val_every 1 keep best:{metric}"
    assert launch(f"{words} output_dir whole").returncode == 0
    for at in (2, 2):  # one epoch more each time
        killed_run(launch, f"{words} output_dir killed", at)
    done = launch(f"{words} output_dir killed")
    assert done.returncode == 0 and "resuming after step" in done.stdout
    whole, killed = (tmp_path / "output" / name for name in ("whole", "killed"))
    assert same(tensors(whole), tensors(killed))
    for entry in ("validations", "kept_epoch"):
        assert result(whole)["train"][entry] == result(killed)["train"][entry]


def test_a_run_whose_best_epoch_is_past_has_it_in_its_states(launch: Cli, tmp_path: Path) -> None:
    words = f"{VALIDATED} output_dir "
    with mock.patch.object(Validation, "_measured", falling):
        assert launch(f"{words}whole").returncode == 0
        for at in (2, 2):
            killed_run(launch, f"{words}killed", at)
        assert launch(f"{words}killed").returncode == 0
    whole, killed = (tmp_path / "output" / name for name in ("whole", "killed"))
    assert result(killed)["train"]["kept_epoch"] == 1 and same(tensors(whole), tensors(killed))
    states = sorted((killed / "state").iterdir())
    assert same(
        {name: each for name, each in load_file(states[-1] / "tensors.safetensors").items() if name[:5] == "best."},
        {f"best.{name}": each for name, each in tensors(killed).items()},
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("val_per_class 0 val_every 1", "val_every 1 needs a validation split, and fake_lt has none; the test images"),
        ("keep best:accuracy", "keep best:accuracy needs validations during training; add `val_every 1`"),
        ("patience 3", "patience 3 needs validations during training; add `val_every 1`"),
        ("val_every 1 patience 3", "patience 3 needs a metric; add `keep best:mean_acc`"),
        ("val_every 9", "val_every 9 is above num_epochs 4, so no epoch would be validated"),
        ("val_every 1 keep best:speed", "best:"),
    ],
)
def test_refused(words: str, message: str, launch: Cli, tmp_path: Path) -> None:
    done = launch(f"{COMMAND} num_epochs 4 {words} output_dir run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "output" / "run").exists()


def test_options_of_the_test_choose_no_epoch(launch: Cli, tmp_path: Path) -> None:
    """All validation images at the default crop choose it, and a resumed run goes on with them."""
    words = f"{VALIDATED} num_epochs 2 augment imagenet output_dir "
    assert launch(f"{words}plain").returncode == 0
    killed_run(launch, f"{words}other crop_margin 0", 2)
    assert launch(f"{words}other crop_margin 9 max_test_images 3").returncode == 0
    plain, other = (tmp_path / "output" / name for name in ("plain", "other"))
    assert same(tensors(plain), tensors(other))
    curves = [
        [{key: value for key, value in validated.items() if key != "seconds"} for validated in validations]
        for validations in (result(run)["train"]["validations"] for run in (plain, other))
    ]
    assert curves[0] == curves[1]


@pytest.mark.slow  # test_core.py compares the curves by default
def test_two_processes(launch: Cli, tmp_path: Path) -> None:
    """As one process, in fp64: the same curve, the same epoch, the same weights."""
    words = f"{VALIDATED} prec fp64 test_prec fp64 num_epochs 2 num_workers 0 output_dir "
    assert launch(f"{words}one").returncode == 0
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "main.py"), *f"{words}two".split()],
            cwd=tmp_path,
            env={
                **offline(),
                "WORLD_SIZE": "2",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
                "ACCELERATE_USE_CPU": "true",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    one, two = (tmp_path / "output" / name for name in ("one", "two"))
    assert [each["mean_acc"] for each in result(two)["train"]["validations"]] == [
        each["mean_acc"] for each in result(one)["train"]["validations"]
    ]
    assert result(one)["train"]["kept_epoch"] == result(two)["train"]["kept_epoch"]
    assert all(torch.allclose(tensors(one)[name], each) for name, each in tensors(two).items())
