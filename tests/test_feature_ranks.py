"""`feature_cache` on several processes: they share the work, and the first one hands out the result."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Cli, free_port, offline
from feature_runs import WORDS, assert_same, counted
from safetensors.torch import load_file

from tailtune.models.backbones.vit_encoder import ViTEncoder

pytestmark = pytest.mark.slow
TWO_PROCESSES = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
TWO_MACHINES = f"""
import os, sys
os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", XDG_CACHE_HOME=f"of_{{os.environ['RANK']}}")
sys.path.insert(0, {str(ROOT)!r})
import tailtune
from tailtune import main
sys.exit(main.main(sys.argv[1:]))
"""


def launch_two(script: Path, words: str) -> str:
    """What a launch of two processes has logged."""
    command = [*TWO_PROCESSES, "--main_process_port", str(free_port()), str(script), *words.split()]
    done = subprocess.run(command, env=offline(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_two_processes_share_the_work(launch: Cli, tmp_path: Path) -> None:
    """The features do not depend on the number of processes, so either can use those of the other."""
    for run, cache in (("cold", True), ("warm", True), ("off", False)):
        launch_two(ROOT / "main.py", f"{WORDS} output_dir {run} feature_cache {cache} init_head class_mean")
    assert_same("warm", "cold")
    assert_same("off", "cold", 1e-4)
    with counted(ViTEncoder, "trunk") as images:
        assert launch(WORDS, "output_dir alone init_head class_mean").returncode == 0
    assert not images.call_count


def test_processes_that_cannot_read_the_same_file(launch: Cli, tmp_path: Path) -> None:
    """Two machines with a folder each, and one machine where nothing can be written: all ranks get the features."""
    script = tmp_path / "machines.py"
    script.write_text(TWO_MACHINES)
    words = f"{WORDS.removesuffix('feature_cache_dir kept')} init_head class_mean output_dir"
    assert launch(words, "one feature_cache_dir kept").returncode == 0
    for run, outcome in (("cold", "computed"), ("warm", "read from")):
        assert f"images: {outcome}" in launch_two(script, f"{words} {run}")
    for machine in ("of_0", "of_1"):
        folder = Path(machine, "tailtune/features")
        assert {path.name for path in folder.iterdir()} == {path.name for path in Path("kept").iterdir()}
        for path in folder.iterdir():
            assert torch.equal(load_file(path)["features"], load_file(Path("kept", path.name))["features"])
    Path("file").touch()
    log = launch_two(ROOT / "main.py", f"{words} unwritable feature_cache_dir file/kept")
    assert "cannot write" in log and "not kept" in log
    assert_same("warm", "cold")
    assert_same("unwritable", "cold")
    assert_same("cold", "one", 1e-4)
