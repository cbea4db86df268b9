"""A larger `num_epochs` continues a run, if it then equals a run that had that many from the beginning."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import Cli, HasRun
from safetensors.torch import load_file
from tiers import slow_except
from torch import Tensor
from trajectories import Killed, killed_after

from tailtune.trainers.storage.resume_states import ResumeStates

COMMAND = "-d fake_lt -m tiny_clip_peft pretrained none subset_cap 8 batch_size 32 max_test_images 20 val_per_class 1 "
COMMAND += "lr 0.05 "
OPEN = COMMAND + "schedule constant "


def tensors(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoint" / "tensors.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return found


BEST = "val_every 1 keep best:nll"


@pytest.mark.parametrize("words", slow_except([BEST], ["", BEST, "schedule multistep lr_steps [1]"]))
def test_a_longer_run_equals_one_of_that_length(words: str, launch: Cli, has_run: HasRun, tmp_path: Path) -> None:
    has_run(f"{OPEN} {words} num_epochs 3 output_dir whole")
    has_run(f"{OPEN} {words} num_epochs 1 output_dir longer")
    done = launch(f"{OPEN} {words} num_epochs 3 output_dir longer")
    assert done.returncode == 0 and "resuming after step" in done.stdout and "epoch [1/" not in done.stdout
    whole, longer = (tmp_path / "output" / name for name in ("whole", "longer"))
    assert same(whole, longer)
    first, second = result(whole), result(longer)
    assert first["test"] == second["test"] and second["train"]["epochs"] == 3
    assert first["train"].get("validations") == second["train"].get("validations")
    again = launch(f"{OPEN} {words} num_epochs 3 output_dir longer")
    assert again.returncode == 0 and "finished before" in again.stdout


@pytest.mark.parametrize("moment", ["after the claim", "in an epoch"])
def test_a_longer_run_that_is_killed_continues(moment: str, launch: Cli, has_run: HasRun, tmp_path: Path) -> None:
    has_run(f"{OPEN} {BEST} num_epochs 3 output_dir whole")
    has_run(f"{OPEN} {BEST} num_epochs 1 output_dir longer")
    longer = f"{OPEN} {BEST} num_epochs 3 output_dir longer"
    if moment == "in an epoch":
        with killed_after(8):
            launch(longer)
    else:
        with mock.patch.object(ResumeStates, "load", side_effect=Killed), pytest.raises(Killed):
            launch(longer)
    AcceleratorState._reset_state(reset_partial_state=True)
    run = tmp_path / "output" / "longer"
    assert not (run / "metrics.json").exists() and not (run / "checkpoint").exists(), "of one epoch"
    done = launch(longer)
    assert done.returncode == 0 and "resuming after step" in done.stdout
    assert same(tmp_path / "output" / "whole", run)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("schedule constant augment mda", "mda_func convex sets the crops of each epoch by the number of epochs"),
        ("schedule cosine", "schedule cosine sets the learning rate of each epoch by the number of epochs"),
        (
            "schedule constant method dirmixe loss_type CE num_experts 3",
            "its method or its tuner counts the steps up to the end",
        ),
    ],
    ids=["crop", "schedule", "method"],
)
def test_where_the_length_matters_it_says_why_not(words: str, why: str, launch: Cli, tmp_path: Path) -> None:
    assert launch(f"{COMMAND} {words} num_epochs 1 output_dir run").returncode == 0
    run = tmp_path / "output" / "run"
    files = ("metrics.json", "config.yaml", "tailtune.json", "checkpoint/tensors.safetensors")
    before = [(run / name).read_bytes() for name in files]
    done = launch(f"{COMMAND} {words} num_epochs 2 output_dir run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "num_epochs 2: the run in this folder has 1" in done.stderr and why in done.stderr
    assert [(run / name).read_bytes() for name in files] == before
    assert launch(f"{COMMAND} {words} num_epochs 1 output_dir run").returncode == 0, "the result is still there"


@pytest.mark.parametrize("words", ["num_epochs 2", "num_epochs 4 lr 0.2", "num_epochs 4 test_only True"])
def test_fewer_epochs_or_other_options_are_another_run(
    words: str, launch: Cli, has_run: HasRun, tmp_path: Path
) -> None:
    has_run(f"{OPEN} {BEST} num_epochs 3 output_dir whole")
    done = launch(f"{OPEN} {BEST} {words} output_dir whole")
    assert done.returncode == 2 and "holds another run" in done.stderr
    assert (tmp_path / "output" / "whole" / "metrics.json").exists()


def test_a_run_of_no_epoch_gets_some(launch: Cli, tmp_path: Path) -> None:
    """It has no state to continue from, so any schedule will do."""
    assert launch(f"{COMMAND} num_epochs 1 output_dir whole").returncode == 0
    assert launch(f"{COMMAND} num_epochs 0 output_dir longer").returncode == 0
    assert launch(f"{COMMAND} num_epochs 1 output_dir longer").returncode == 0
    assert same(*(tmp_path / "output" / name for name in ("whole", "longer")))
