"""Shared fixtures: small thread count, a fresh Accelerate state, configs and models that build in milliseconds.

The fixtures import what they need. The first process of pytest-xdist runs no test, so it need not wait for torch.
"""

import copy
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tailtune  # first: it takes this checkout, whose `datasets` is not the library, from sys.path

if os.environ.get("TAILTUNE_TEST_DEVICE", "cpu") != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for GPUs; also for the processes that tests start

if TYPE_CHECKING:
    from yacs.config import CfgNode

ROOT = tailtune.ROOT
Cli = Callable[..., subprocess.CompletedProcess[str]]
"""Words of a command line → exit code and what it printed."""
HasRun = Callable[..., None]


@pytest.fixture(scope="session", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nobody's caches are used or changed. Most of what a small run waits for is left out: files reach the disk later,
    generated images and the random weights of the embedded CLIP are drawn once, commit, versions of packages and the
    stored schema are looked up once, and runs in this process make no report and no pictures (test_report.py and
    test_curves.py make them)."""
    import torch

    from tailtune.datasets.sources.fake import fake_sources
    from tailtune.models.backbones.random_clip import random_clip
    from tailtune.trainers.cached_schema import cached_schema
    from tailtune.trainers.runs.metrics_file import commit
    from tailtune.trainers.storage.checkpoint import version

    torch.set_num_threads(1)  # results and times that do not depend on the machine's load
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        patch.setattr("os.fsync", lambda descriptor: None)
        patch.setattr("tailtune.datasets.sources.fake.fake_sources", cache(fake_sources))
        patch.setattr("tailtune.models.backbones.open_clip_backbone.random_clip", _drawn_once(random_clip))
        patch.setattr("tailtune.main.cached_schema", cache(cached_schema))
        patch.setattr("tailtune.trainers.runs.metrics_file.commit", cache(commit))
        patch.setattr("tailtune.trainers.storage.checkpoint.version", cache(version))
        patch.setattr("tailtune.trainers.evaluation.evaluate.add_report", lambda *_: "")
        patch.setattr("tailtune.trainers.evaluation.curves_of_evaluation.class_pictures", lambda *_: {})
        yield


def _drawn_once(random_clip: Callable[..., Any]) -> Callable[..., Any]:
    """`random_clip` that keeps small models and gives copies of them, which takes half as long."""
    drawn: dict[str, Any] = {}

    def get(arch: str, config: dict[str, Any], resolution: int, seed: int) -> Any:
        if config["embed_dim"] > 64:
            return random_clip(arch, config, resolution, seed)
        key = json.dumps([config, resolution, seed])
        if key not in drawn:
            drawn[key] = random_clip(arch, config, resolution, seed)
        return copy.deepcopy(drawn[key])

    return get


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps a singleton for a process; a test may ask for another precision."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def config() -> Callable[..., "CfgNode"]:
    """`config("fake_lt", "tiny_clip_peft", "lr", 0.1)` → the frozen, resolved config of that command."""
    from tailtune.configs import load_configs
    from tailtune.models import resolve
    from tailtune.trainers.option_schema import declared

    def make(data: str, model: str, *pairs: object) -> "CfgNode":
        return resolve(load_configs(data, model, [str(each) for each in pairs], declared())[-1])

    return make


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Runs `main.py` in a scratch folder, offline: `cli("-d", "fake_lt", …)`."""

    def call(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "main.py"), *map(str, words)]
        return subprocess.run(
            command, cwd=tmp_path, env=offline(**environment), capture_output=True, text=True, timeout=300
        )

    return call


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli` in this process, without the seconds that imports take: `launch("-d fake_lt", "lr", 0.1)`."""
    from accelerate.state import AcceleratorState

    from tailtune import main

    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        argv = [part for word in words for part in str(word).split()]
        code = main.main(argv)
        AcceleratorState._reset_state(reset_partial_state=True)
        return subprocess.CompletedProcess(argv, code, *capsys.readouterr())

    return call


FINISHED: dict[str, Path] = {}
"""Command → a scratch folder in which it has run."""


@pytest.fixture
def has_run(
    launch: Cli, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> HasRun:
    """`has_run("-d fake_lt", …)` leaves in the scratch folder what the command leaves in an empty one.

    A command runs once in this process and is copied from then on, so nothing that it uses may be patched."""

    def call(*words: object) -> None:
        command = " ".join(map(str, words))
        if command not in FINISHED:
            folder = tmp_path_factory.mktemp("finished")
            with monkeypatch.context() as patch:
                patch.chdir(folder)
                done = launch(command)
            assert done.returncode == 0, done.stderr
            FINISHED[command] = folder
        shutil.copytree(FINISHED[command] / "output", tmp_path / "output", symlinks=True, dirs_exist_ok=True)

    return call


def free_port() -> int:
    """A port for a launch of several processes; workers of pytest-xdist launch at the same time."""
    with socket.socket() as tried:
        tried.bind(("localhost", 0))
        return tried.getsockname()[1]


def offline(**environment: str) -> dict[str, str]:
    """An environment without network and without anybody's caches, in which Python keeps compiled modules."""
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, "PYTHONDONTWRITEBYTECODE": "", **environment}


LONGEST = ("test_contract.py", "test_options.py", "test_core.py", "test_ensembles.py", "test_cli.py")
LONGEST += ("test_composition.py", "test_bad_input.py", "test_ownership.py", "test_processes.py", "test_resume.py")
LONGEST += ("test_literal.py", "test_peft.py", "test_memory.py")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """What the imports of all tests make stays until the end, so the search for garbage leaves it out: two seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that the workers of `make test` end together."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
