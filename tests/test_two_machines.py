"""Two launchers that meet on the loopback interface, as two machines do: the commands of docs/clusters.md."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, free_port, offline
from test_launcher import LOST, states, wait_for
from trajectories import trained

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="its signals are those of Linux")]

RUN = "main.py -d fake_lt -m tiny_clip_peft pretrained none num_epochs 12 batch_size 16 save_every 1 report none"
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def command_of_the_page(heading: str) -> list[str]:
    """The first command below a heading of docs/clusters.md."""
    page = (ROOT / "docs" / "clusters.md").read_text().partition(f"## {heading}\n")[2]
    found = re.search(r"```bash\n(.+?)\n```", page, re.DOTALL)
    assert found
    return shlex.split(found[1].replace("\\\n", " ").splitlines()[0])


def launched(folder: Path, name: str, heading: str, processes: int, endpoint: str = "") -> "subprocess.Popen[str]":
    """That command with the run of this test, in a run folder `name`."""
    command = command_of_the_page(heading)
    launcher = command[: command.index("main.py")]
    launcher[launcher.index("--nproc-per-node") + 1] = str(processes)
    launcher = [word.replace("node1:29500", endpoint) for word in launcher]
    words = [*launcher, *RUN.replace("main.py", str(ROOT / "main.py")).split(), "output_dir", name]
    words[0] = str(Path(sys.executable).parent / words[0])
    return subprocess.Popen(words, cwd=folder, env=offline(**LOOPBACK), stderr=subprocess.PIPE, text=True)


def pair(folder: Path) -> "list[subprocess.Popen[str]]":
    endpoint = f"127.0.0.1:{free_port()}"
    return [launched(folder, "run", "Two machines", 1, endpoint) for _ in range(2)]


def last_lines(machines: "list[subprocess.Popen[str]]") -> list[str]:
    return [machine.communicate(timeout=300)[1].splitlines()[-1] for machine in machines]


def test_two_machines_train_as_one_and_continue_after_each_loss(tmp_path: Path) -> None:
    alone = launched(tmp_path, "alone", "Several GPUs of one machine", 2)
    assert alone.communicate(timeout=300) and alone.returncode == 0

    first, second = pair(tmp_path)
    wait_for(lambda: bool(states(tmp_path)))
    second.kill()  # the launcher; its process sees this, and asks the others to stop
    assert "interrupted; the same command continues" in last_lines([first])
    assert first.returncode == 1
    second.communicate(timeout=60)

    saved = states(tmp_path)[-1]
    first, second = pair(tmp_path)
    wait_for(lambda: states(tmp_path)[-1] > saved)
    for process in [*psutil.Process(second.pid).children(recursive=True), second]:
        os.kill(process.pid, signal.SIGKILL)  # the machine
    assert last_lines([first]) == [LOST]
    assert first.returncode == 1
    second.communicate(timeout=60)

    saved = states(tmp_path)[-1]
    for machine in pair(tmp_path):
        machine.communicate(timeout=300)
        assert machine.returncode == 0
    output = tmp_path / "output"
    assert f"resuming after step {saved}" in (output / "run" / "log.txt").read_text()
    wanted, found = trained(output / "alone"), trained(output / "run")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
