"""Several processes of one launch end together, with one line after all that the launcher prints.

Most cases need neither torch nor our training: a launcher of a few lines does to its processes what torch's does.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, free_port, offline

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each process speaks for itself")

LOST = "error: a process of this launch was killed or lost (out of memory?); the same command continues"
LAUNCHER = """
import os, signal, subprocess, sys, time

def tell(number):
    for each in started:
        if each.poll() is None:
            os.killpg(each.pid, number)
    for each in started:
        each.wait()

def stop(number, _):
    tell(number)
    print("pages of the launcher", file=sys.stderr)
    sys.exit(1)

signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
about = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
started = [
    subprocess.Popen([sys.executable, *sys.argv[1:]], env={**os.environ, **about, "RANK": rank}, start_new_session=True)
    for rank in "01"
]
while all(each.poll() is None for each in started):
    time.sleep(0.05)
tell(signal.SIGTERM)
if any(each.returncode for each in started):
    print("pages of the launcher", file=sys.stderr)
    sys.exit(1)
"""
PROCESS = """
import os, sys, time
sys.path.insert(0, ROOT)
from tailtune.trainers.processes.exit import end_at_signals, run_as_process
end_at_signals()
from tailtune.configs.errors import UserError
from tailtune.main import exit_code_and_line

def work():
    open(f"ready{os.environ['RANK']}", "w").close()
    while len([name for name in os.listdir() if name.startswith("ready")]) < 2:
        time.sleep(0.01)
    DO
    return 0

run_as_process(work, exit_code_and_line)
"""
WAIT = "time.sleep(60)"
ONE = "os.environ['RANK'] == '1'"


def start(folder: Path, do: str) -> "subprocess.Popen[str]":
    """Two processes that do the same, below a launcher."""
    launcher, process = folder / "torchrun", folder / "process.py"
    launcher.write_text(LAUNCHER)
    process.write_text(PROCESS.replace("ROOT", repr(str(ROOT))).replace("DO", do))
    command = [sys.executable, str(launcher), str(process)]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(there: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("do", "line"),
    [
        ("raise UserError('lr: must be a number')", "error: lr: must be a number"),
        (f"if {ONE}: raise UserError('bad image')\n    {WAIT}", "error: bad image"),
        (f"if {ONE}: os.kill(os.getpid(), 9)\n    {WAIT}", LOST),
        (f"if not {ONE}: os.kill(os.getpid(), 9)\n    {WAIT}", LOST),
        (
            f"if {ONE}: os.kill(os.getpid(), 9)\n    time.sleep(1); raise RuntimeError('Connection closed by peer')",
            LOST,
        ),
        ("raise RuntimeError('[gloo/transport/tcp/pair.cc:547] Connection reset by peer [10.0.0.2]:2241')", LOST),
        (f"if {ONE}: 1 / 0\n    {WAIT}", "error: ZeroDivisionError; its traceback stands above"),
    ],
    ids=["all refuse", "one refuses", "second killed", "first killed", "connection", "other machine", "bug"],
)
def test_the_cause_comes_last(tmp_path: Path, do: str, line: str) -> None:
    process = start(tmp_path, do)
    lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 1
    assert lines[-2:] == ["pages of the launcher", line], lines
    assert sum(each.startswith(("error:", "interrupted")) for each in lines) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stays_one(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, WAIT)
    wait_for(lambda: (tmp_path / "ready1").exists() and (tmp_path / "ready0").exists())
    process.send_signal(number)
    assert process.communicate(timeout=60)[1].splitlines() == ["pages of the launcher", "interrupted"]


def test_processes_end_with_their_launcher(tmp_path: Path) -> None:
    process = start(tmp_path, WAIT)
    wait_for(lambda: (tmp_path / "ready1").exists() and (tmp_path / "ready0").exists())
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    process.kill()
    assert process.communicate(timeout=20)[1].splitlines() == ["interrupted"]
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in ranks)


def test_a_process_in_a_library_that_waits_for_a_dead_one_ends(tmp_path: Path) -> None:
    """There Python answers no signal; here one that blocks them stands for it."""
    deaf = "import signal; [signal.signal(each, lambda *_: None) for each in (2, 15)]; time.sleep(60)"
    process = start(tmp_path, f"if {ONE}: time.sleep(0.2); os.kill(os.getpid(), 9)\n    {deaf}")
    before = time.monotonic()
    assert process.communicate(timeout=60)[1].splitlines()[-1] == LOST
    assert time.monotonic() - before < 20


@pytest.fixture
def launch(tmp_path: Path) -> Callable[[Callable[[psutil.Process], object]], str]:
    """`accelerate launch` itself, which something happens to while it trains → the last line."""
    words = "-d fake_lt -m tiny_clip_peft pretrained none num_epochs 100000 save_every 100000 print_freq 100000"
    launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    command = [
        *launcher,
        "--main_process_port",
        str(free_port()),
        str(ROOT / "main.py"),
        *words.split(),
        "output_dir",
        "run",
    ]

    def call(act: Callable[[psutil.Process], object]) -> str:
        before = states(tmp_path)
        with (tmp_path / "out").open("w") as out:
            process = subprocess.Popen(
                command, cwd=tmp_path, env=offline(), stdout=out, stderr=subprocess.PIPE, text=True
            )
            wait_for(lambda: states(tmp_path) > before or process.poll() is not None)
            act(psutil.Process(process.pid))
            return process.communicate(timeout=60)[1].splitlines()[-1]

    return call


def states(folder: Path) -> list[int]:
    return sorted(int(each.name) for each in (folder / "output" / "run" / "state").glob("[0-9]*"))


@pytest.mark.slow
def test_training_on_two_processes_is_interrupted(launch: Callable[..., str], tmp_path: Path) -> None:
    before: list[int] = []

    def interrupt(launcher: psutil.Process) -> None:
        before.extend(states(tmp_path))
        launcher.send_signal(signal.SIGINT)

    assert launch(interrupt) == "interrupted; the same command continues"
    assert states(tmp_path)[-1] > before[-1]


@pytest.mark.slow
def test_training_on_two_processes_loses_one_and_continues(launch: Callable[..., str], tmp_path: Path) -> None:
    assert launch(lambda launcher: launcher.children()[1].kill()) == LOST
    saved = states(tmp_path)[-1]
    assert launch(lambda launcher: launcher.kill()) == "interrupted; the same command continues"
    assert f"resuming after step {saved}" in (tmp_path / "out").read_text()
