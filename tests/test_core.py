"""The core: the batch is the batch, and order and augmentation are pure functions (docs/design.md: a training step).

{1, 2 processes} × {0, 2 workers} × {8, 32 images at once} × {killed and resumed, not} give one fp64 loss trajectory;
within a layout, killed equals unkilled bitwise. By default the plainest layout, and two processes with workers and cut
batches; `make test-slow` goes through all of them, and through a few more with text features that train, of which the
default tier only cuts the batches.
"""

import importlib
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import trajectories
from accelerate.state import AcceleratorState
from conftest import free_port
from tiers import slow_except
from trajectories import LAYOUTS, MORE, MOVES, STEPS, Layout, losses, name_of, scalars, trained

from tailtune.trainers.evaluation.adapted_results import ADAPTED

pytestmark = pytest.mark.xdist_group("core")  # its runs are shared


@dataclass(frozen=True)
class Runs:
    """Finished runs below a folder, by processes and layout."""

    folder: Path
    layouts: dict[int, list[Layout]]

    def of(self, workers: int, micro: int, killed: bool, world: int) -> Path:
        return self.folder / name_of(workers, micro, killed, world)

    def all(self) -> Iterator[tuple[Layout, int]]:
        yield from ((layout, world) for world, layouts in self.layouts.items() for layout in layouts)


@pytest.fixture(scope="module", params=slow_except(["few"], ["few", "text", "all"]))
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Half of the runs in this process, half on two processes.

    These are copies of this one, which need not import everything: ten seconds of a processor less than what a launcher
    starts, which slow tests of test_sharding.py do. A process that may have used a GPU cannot be copied."""
    folder = tmp_path_factory.mktemp("core")
    more = MORE[request.param]
    trajectories.move(folder, 1, 2, part=0, more=more)
    importlib.import_module("sklearn.linear_model")  # which a head needs, once for all copies
    AcceleratorState._reset_state(reset_partial_state=True)
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    port = free_port()
    pair = [
        context.Process(target=trajectories.as_rank, args=(rank, 2, port, folder, request.param, more))
        for rank in range(2)
    ]
    for process in pair:
        process.start()
    for layout in LAYOUTS[request.param][1]:
        trajectories.train(folder, *layout, more=more)
    if request.param == "few":
        trajectories.evaluate(folder)
    for process in pair:
        process.join(600)
        process.kill()  # where it waits for ever
    assert [process.exitcode for process in pair] == [0, 0], "the captured output says more"
    trajectories.move(folder, 2, 1, part=1, more=more)
    return Runs(folder, LAYOUTS[request.param])


def test_one_trajectory_in_every_layout(runs: Runs) -> None:
    reference = runs.of(0, 32, False, 1)
    assert len(losses(reference)) == STEPS
    wanted = trained(reference)
    for layout, world in runs.all():
        path = runs.of(*layout, world)
        assert losses(path) == pytest.approx(losses(reference), rel=1e-6), path.name
        for name, tensor in trained(path).items():
            assert tensor.dtype == torch.float64
            assert torch.allclose(tensor, wanted[name], rtol=1e-9, atol=1e-12), (path.name, name)


def test_one_validation_in_every_layout(runs: Runs) -> None:
    curves = {(path := runs.of(*layout, world)).name: scalars(path, "val/nll") for layout, world in runs.all()}
    reference = curves[runs.of(0, 32, False, 1).name]
    assert len(reference) == 2
    assert all(curve == pytest.approx(reference, rel=1e-9) for curve in curves.values())


def test_killed_equals_unkilled_bitwise(runs: Runs) -> None:
    for (workers, micro, killed), world in runs.all():
        if killed and runs.of(workers, micro, False, world).exists():
            whole, resumed = (trained(runs.of(workers, micro, k, world)) for k in (False, True))
            assert whole.keys() == resumed.keys()
            assert all(torch.equal(whole[name], resumed[name]) for name in whole), (workers, micro, world)


def test_cut_batches_share_the_texts(tmp_path: Path) -> None:
    """One pass through the text encoder for all micro-batches of a step: the same loss and weights."""
    whole, cut = (
        trajectories.train(tmp_path, 0, micro, False, more=f"{MORE['text']} max_steps 3") for micro in (32, 8)
    )
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-6) and len(losses(cut)) == 3
    wanted = trained(whole)
    assert all(torch.allclose(each, wanted[name], rtol=1e-9, atol=1e-12) for name, each in trained(cut).items())


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_a_killed_run_continues_on_another_number_of_processes(runs: Runs, before: int, after: int) -> None:
    path, reference = runs.folder / MOVES[before, after], runs.of(0, 32, False, 1)
    assert f"was on {before} processes and continues on {after}" in (path / "log.txt").read_text()
    assert losses(path) == pytest.approx(losses(reference), rel=1e-6)
    wanted = trained(reference)
    assert all(torch.allclose(each, wanted[name], rtol=1e-9, atol=1e-12) for name, each in trained(path).items())
    for tag in ("train/mean_acc", "train/few_acc"):
        assert scalars(path, tag) == pytest.approx(scalars(reference, tag), rel=1e-6, nan_ok=True)


def test_evaluation_counts_each_image_once(runs: Runs) -> None:
    """Two processes: the same test metrics, although 100 images do not fill equal batches of 64."""
    reference = runs.of(0, 32, False, 1)
    pair = next(runs.of(*layout, world) for layout, world in runs.all() if world == 2)
    one, two = (json.loads((path / "metrics.json").read_text()) for path in (reference, pair))
    assert one["test"]["per_class_acc"] == two["test"]["per_class_acc"]
    assert one["test"]["nll"] == pytest.approx(two["test"]["nll"], rel=1e-9)
    assert two["hardware"].startswith("2 ×")


@pytest.mark.parametrize("runs", ["few"], indirect=True)
def test_two_processes_share_the_images_and_one_of_them_gets_the_results(runs: Runs) -> None:
    """A head, an evaluation, an adaptation and estimated priors are those of one process."""
    one, two = (runs.folder / f"evaluated_{world}" for world in (1, 2))
    for name, part in (("metrics.json", "test"), ("metrics.json", "distributions"), (ADAPTED, "distributions")):
        found, wanted = (dict(numbers_of(json.loads((run / name).read_text())[part])) for run in (two, one))
        assert len(found) > 10 and found == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    predictors = json.loads((two / "metrics.json").read_text())["distributions"]["forward5"]["predictors"]
    assert predictors.keys() == {"plain", "sade", "target_prior"}
    heads = [trained(run) for run in (one, two)]
    assert all(torch.allclose(heads[1][name], tensor, atol=1e-6) for name, tensor in heads[0].items())
    first, second = json.loads((runs.folder / "received_2.json").read_text())
    features, views, logits = 159 * 128 * 4, 2 * 100 * 2 * 3 * 10 * 4, 100 * 3 * 10 * 4  # bytes
    assert first["gather"] > features + views + logits
    assert sum(second.values()) < features / 8, "decisions and the head: nothing of each image"


def numbers_of(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Path and value of every number in what JSON can hold."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers_of(each, f"{path}/{key}")
    elif isinstance(value, int | float):
        yield path, value
