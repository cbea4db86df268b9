"""The core: the batch is the batch, and order and augmentation are pure functions (design.md §3).

{1, 2 processes} × {0, 2 workers} × {8, 32 images at once} × {killed and resumed, not} give one fp64 loss trajectory;
within a layout, killed equals unkilled bitwise.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trajectories
from conftest import ROOT, offline
from trajectories import LAYOUTS, STEPS, losses, name_of, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sixteen runs: eight in this process, eight on two processes started by `accelerate launch`."""
    folder = tmp_path_factory.mktemp("core")
    launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    script = [str(ROOT / "tests" / "trajectories.py"), str(folder)]
    environment = offline(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    pair = subprocess.Popen(
        [*launcher, "--main_process_port", "29517", *script],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for layout in LAYOUTS:
        trajectories.train(folder, *layout)
    output, _ = pair.communicate(timeout=280)
    assert pair.returncode == 0, output[-3000:]
    return folder


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_trajectory_in_every_layout(folder: Path, layout: tuple[int, int, bool], world: int) -> None:
    reference, found = (folder / name_of(*each) for each in ((0, 32, False, 1), (*layout, world)))
    assert len(losses(reference)) == STEPS
    assert losses(found) == pytest.approx(losses(reference), rel=1e-6)
    wanted = trained(reference)
    for name, tensor in trained(found).items():
        assert tensor.dtype == torch.float64
        assert torch.allclose(tensor, wanted[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("layout", [each for each in LAYOUTS if not each[2]], ids=str)
def test_killed_equals_unkilled_bitwise(folder: Path, layout: tuple[int, int, bool], world: int) -> None:
    whole, resumed = (trained(folder / name_of(*layout[:2], killed, world)) for killed in (False, True))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_evaluation_counts_each_image_once(folder: Path) -> None:
    """Two processes: the same test metrics, although 100 images do not fill equal batches of 64."""
    one, two = (json.loads((folder / name_of(0, 32, False, world) / "metrics.json").read_text()) for world in (1, 2))
    assert one["test"]["per_class_acc"] == two["test"]["per_class_acc"]
    assert one["test"]["nll"] == pytest.approx(two["test"]["nll"], rel=1e-9)
    assert two["hardware"].startswith("2 ×")
