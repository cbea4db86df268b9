"""FSDP2: one trajectory with and without it, across kills and other numbers of processes; one block at a time is whole.

By default one process shards for itself. `make test-slow` has two processes.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, Cli, free_port, offline
from sharded_runs import EXPERTS, part
from test_bad_input import one_line
from torch import Tensor
from torch.distributed.tensor import DTensor
from trajectories import losses, scalars, trained

from tailtune.datasets.build_data import build_info
from tailtune.models.backbones.transformer_encoder import TransformerEncoder
from tailtune.trainers.runs.load_run import make_method
from tailtune.trainers.sharding import copy_to_shard

RUNS = ("whole", "resumed", "to_one", "to_two")


@pytest.fixture
def sharded_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone, which shards as several would."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for module in ("trainer", "sharding"):
        monkeypatch.setattr(f"tailtune.trainers.{module}.is_sharded", lambda: True)
    yield
    dist.destroy_process_group()


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many blocks are whole whenever one is computed, forward and backward."""
    counts: dict[str, list[int]] = {"forward": [], "backward": []}
    original = TransformerEncoder.compute_block

    def counted(self: TransformerEncoder, block: Any, x: Tensor, *more: Any) -> Tensor:
        def count(way: str) -> None:
            whole = [each for each in self.blocks if not isinstance(each.get_parameter("mlp.fc1.weight"), DTensor)]
            assert block in whole
            counts[way].append(len(whole))

        if self.calls_blocks:
            count("forward")
            if x.requires_grad:  # not the input of the first block
                x.register_hook(lambda _: count("backward"))
        return original(self, block, x, *more)

    monkeypatch.setattr(TransformerEncoder, "compute_block", counted)
    return counts


def test_one_block_at_a_time_is_whole(
    tmp_path: Path, gathered: dict[str, list[int]], request: pytest.FixtureRequest
) -> None:
    words = "batch_size 16 val_per_class 1 max_steps 2 max_test_images 8"
    part(tmp_path / "alone", killed=False, more=words)
    assert not gathered["forward"], "without FSDP the blocks are not called"
    request.getfixturevalue("sharded_alone")
    part(tmp_path / "sharded", killed=False, more=words)
    assert set(gathered["forward"]) == set(gathered["backward"]) == {1}
    wanted, found = trained(tmp_path / "alone"), trained(tmp_path / "sharded")
    assert wanted.keys() == found.keys()
    assert all(torch.allclose(found[key], tensor, rtol=1e-8, atol=1e-10) for key, tensor in wanted.items())


def test_weights_of_a_convnet_can_be_sharded(config: Any) -> None:
    """They are channels_last, which FSDP does not take. The method itself stays as it is."""
    cfg = config("fake_lt", "tiny_clip", "backbone", "ResNet-20", "pretrained", "none", "init_head", "none")
    method = make_method(cfg, build_info(cfg))
    assert all(each.is_contiguous() for each in copy_to_shard(method).parameters())
    assert not all(each.is_contiguous() for each in method.parameters())


@pytest.mark.slow
def test_a_convnet_is_sharded(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    words = "backbone ResNet-20 init_head none bn_tuning True max_steps 2 max_test_images 8 val_every none"
    part(tmp_path / "alone", killed=False, more=words)
    request.getfixturevalue("sharded_alone")
    part(tmp_path / "sharded", killed=False, more=words)
    wanted, found = trained(tmp_path / "alone"), trained(tmp_path / "sharded")
    assert wanted.keys() == found.keys()
    assert all(torch.allclose(found[key], tensor, rtol=1e-8, atol=1e-10) for key, tensor in wanted.items())


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
    part(folder / "experts_alone", killed=False, more=EXPERTS)
    output, _ = pair.communicate(timeout=900)
    assert pair.returncode == 0, output[-3000:]
    part(folder / "to_one", killed=False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "alone"), [*((name, "alone") for name in RUNS), ("experts", "experts_alone")])
def test_one_trajectory(runs: Path, name: str, alone: str) -> None:
    wanted, found = trained(runs / alone), trained(runs / name)
    assert "sharded over 2 processes" in (runs / name / "log.txt").read_text()
    assert losses(runs / name) == pytest.approx(losses(runs / alone), rel=1e-9)
    assert wanted.keys() == found.keys()
    assert all(torch.allclose(found[key], tensor, rtol=1e-8, atol=1e-10) for key, tensor in wanted.items())


@pytest.mark.slow
def test_killed_equals_unkilled_bitwise(runs: Path) -> None:
    whole, resumed = trained(runs / "whole"), trained(runs / "resumed")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_validation_sees_the_trained_weights(runs: Path) -> None:
    values = scalars(runs / "alone", "val/nll")
    assert len(values) == 2 and values[0] != values[1]
    assert all(scalars(runs / name, "val/nll") == pytest.approx(values, rel=1e-9) for name in RUNS)


def test_deepspeed_is_refused_before_anything_is_written(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    one_line(launch("-d fake_lt -m tiny_clip pretrained none max_steps 1"), "DeepSpeed is not supported", "--use_fsdp")
    assert not Path("output").exists()


def test_a_tuner_that_reads_weights_between_the_blocks_is_refused(sharded_alone: None, launch: Cli) -> None:
    words = "-d fake_lt -m tiny_clip pretrained none peft AdaLoRA num_epochs 2 batch_size 16 max_test_images 8"
    one_line(launch(words), "peft AdaLoRA reads weights that FSDP has freed")


def test_version_1_is_refused(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setattr("tailtune.trainers.sharding.is_sharded", lambda: True)
    done = launch("-d fake_lt -m tiny_clip pretrained none max_steps 1")
    assert done.returncode == 2 and "fsdp_version to 2" in done.stderr
