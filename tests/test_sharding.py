"""FSDP2 on two processes: one trajectory with and without it, across kills and another number of processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Cli, free_port, offline
from sharded_runs import part
from trajectories import losses, scalars, trained

RUNS = ("whole", "resumed", "to_one", "to_two")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs: `alone` on one process, all others sharded over two, at least in part."""
    folder = tmp_path_factory.mktemp("sharded")
    part(folder / "to_two", killed=True)
    launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--num_processes", "2"]
    launcher += ["--use_fsdp", "--fsdp_version", "2", "--main_process_port", str(free_port())]
    pair = subprocess.Popen(
        [*launcher, str(ROOT / "tests" / "sharded_runs.py"), str(folder)],
        cwd=folder,
        env=offline(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    part(folder / "alone", killed=False)
    output, _ = pair.communicate(timeout=280)
    assert pair.returncode == 0, output[-3000:]
    part(folder / "to_one", killed=False)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_one_trajectory(runs: Path, name: str) -> None:
    wanted, found = trained(runs / "alone"), trained(runs / name)
    assert "sharded over 2 processes" in (runs / name / "log.txt").read_text()
    assert losses(runs / name) == pytest.approx(losses(runs / "alone"), rel=1e-9)
    assert wanted.keys() == found.keys()
    assert all(torch.allclose(found[key], tensor, rtol=1e-8, atol=1e-10) for key, tensor in wanted.items())


def test_killed_equals_unkilled_bitwise(runs: Path) -> None:
    whole, resumed = trained(runs / "whole"), trained(runs / "resumed")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_validation_sees_the_trained_weights(runs: Path) -> None:
    for tag in ("val/nll",):
        values = scalars(runs / "alone", tag)
        assert len(values) == 2 and values[0] != values[1]
        assert all(scalars(runs / name, tag) == pytest.approx(values, rel=1e-9) for name in RUNS)


def test_version_1_is_refused(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setattr("tailtune.trainers.distributed.is_sharded", lambda: True)
    done = launch("-d fake_lt -m tiny_clip pretrained none max_steps 1")
    assert done.returncode == 2 and "fsdp_version to 2" in done.stderr
