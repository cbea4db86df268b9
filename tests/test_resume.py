"""A run that is killed over and over ends in the same weights, bit for bit, as one that is left alone."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Cli, offline
from safetensors.torch import load_file

COMMAND = "-d fake_lt -m tiny_clip_peft pretrained none save_every 1 batch_size 8 num_epochs {epochs} output_dir {name}"
COMMAND += " max_test_images 20 subset_cap {cap}"
STEPS = {None: 20, 8: 9}
"""`subset_cap` → steps of an epoch."""

ONCE = ((10, signal.SIGKILL),)
"""Step after which a signal is sent, and the signal; the last epoch has begun here."""
OFTEN = (
    (1, signal.SIGKILL),  # the first state is there
    (36, signal.SIGKILL),  # within the second epoch
    (50, signal.SIGTERM),
    (61, signal.SIGKILL),  # the last epoch has begun
)


@pytest.mark.parametrize(
    ("epochs", "cap", "kills"),
    [(2, 8, ONCE), pytest.param(4, None, OFTEN, marks=pytest.mark.slow)],
    ids=["once", "often"],
)
def test_killed_run_equals_undisturbed_run_bitwise(
    epochs: int, cap: int | None, kills: tuple[tuple[int, signal.Signals], ...], launch: Cli, tmp_path: Path
) -> None:
    assert launch(COMMAND.format(epochs=epochs, cap=cap, name="whole")).returncode == 0
    command = COMMAND.format(epochs=epochs, cap=cap, name="killed")
    for step, number in kills:
        reached = run_until(command, step, number, tmp_path)
        assert step <= reached < epochs * STEPS[cap], "the run was over before it could be killed"
    done = launch(command)
    assert done.returncode == 0
    assert "resuming after step" in done.stdout
    whole, killed = (checkpoint(tmp_path / "output" / name) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def run_until(words: str, step: int, number: signal.Signals, folder: Path) -> int:
    """Start or continue the run in a process of its own, signal it when the state of a step is there.

    Returns:
        The newest step that was saved.
    """
    command = [sys.executable, str(ROOT / "main.py"), *words.split()]
    with (folder / "stderr").open("w+") as errors:
        process = subprocess.Popen(
            command, cwd=folder, env=offline(), stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )
        end = time.monotonic() + 120
        while newest(folder) < step and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(number)
        code = process.wait(60)
        errors.seek(0)
        printed = errors.read()
    polite = number != signal.SIGKILL
    assert code == (130 if polite else -number), printed
    assert printed == ("interrupted; the same command continues\n" if polite else "")
    return newest(folder)


def newest(folder: Path) -> int:
    found = (folder / "output" / "killed" / "state").glob("[0-9]*")
    return max((int(each.name) for each in found), default=0)


def checkpoint(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint" / "tensors.safetensors")
