"""Processes that decode images, signals, and disks that are full: one line says it, and what is there is kept."""

import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, Cli, offline
from test_bad_input import files_of_at_most, one_line, signal_after, states

from tailtune import main
from tailtune.configs.errors import UserError
from tailtune.datasets.loading import workers
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.datasets.sources.image_sources import ArraySource
from tailtune.datasets.view import View
from tailtune.trainers.distributed import world_size
from tailtune.trainers.evaluation import inference as evaluator
from tailtune.trainers.methods.base import Method
from tailtune.trainers.processes.console_log import attach_file, detach_file, start_console
from tailtune.trainers.processes.interrupts import ASK_AFTER, Agreement, Interrupt
from tailtune.trainers.storage.tensorboard_events import Events

FAKE = "-d fake_lt -m tiny_clip_peft pretrained none max_test_images 40 test_batch_size 4"
TRAIN = f"{FAKE} subset_cap 12 batch_size 8 num_epochs 1 save_every 1 output_dir run"
RUN = Path("output/run")
LOST = ("was killed (out of memory?)", "num_workers", "test_batch_size", "the same command continues")


@contextmanager
def after_step(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Training does something, once, in the middle of a step."""
    original = Method.after_step

    def hooked(self: Method, done: int) -> None:
        original(self, done)
        if done == step:
            act()

    Method.after_step = hooked  # type: ignore[method-assign]
    try:
        yield
    finally:
        Method.after_step = original  # type: ignore[method-assign]


def to_a_worker(number: signal.Signals) -> int:
    """Send a signal to one of the processes that decode for this one."""
    process = multiprocessing.active_children()[0]
    assert process.pid
    os.kill(process.pid, number)
    return process.pid


# --- processes that decode -------------------------------------------------------------------------------------------


def test_a_worker_killed_while_training(launch: Cli) -> None:
    start = time.monotonic()
    with after_step(3, lambda: void(to_a_worker(signal.SIGKILL))):
        one_line(launch(f"{TRAIN} num_workers 2"), *LOST)
    assert time.monotonic() - start < 60
    assert not multiprocessing.active_children(), "the other one has to end, too"
    assert states(RUN)
    done = launch(f"{TRAIN} num_workers 2")
    assert done.returncode == 0
    assert "resuming after step" in done.stdout


@pytest.mark.parametrize("dims", [4, pytest.param(5, marks=pytest.mark.slow)], ids=["evaluating", "adapting"])
def test_a_worker_killed_while_evaluating(launch: Cli, monkeypatch: pytest.MonkeyPatch, dims: int) -> None:
    killed: list[int] = []

    def batches(*args: Any, **named: Any) -> Iterator[dict[str, Any]]:
        for batch in eval_loader(*args, **named):
            if batch["image"].ndim == dims and not killed:  # two views of each image are [B, 2, 3, H, W]
                killed.append(to_a_worker(signal.SIGKILL))
            yield batch

    words = f"{FAKE.replace('tiny_clip_peft', 'tiny_clip')} num_experts 3 max_steps 1 adapt sade test_dists backward5"
    words += " feature_cache False"  # features are no images
    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "eval_loader", batches)
        one_line(launch(f"{words} num_workers 2 output_dir run"), *LOST)
    assert killed and not multiprocessing.active_children()
    done = launch(f"{words} num_workers 0 output_dir run")
    assert done.returncode == 0 and "epoch [" not in done.stdout, "what was trained is kept"


def test_a_worker_that_never_answers(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailtune.datasets.loading.workers.CHECK_SECONDS", 0.1)
    monkeypatch.setattr("tailtune.datasets.loading.workers.STUCK_SECONDS", 2.0)
    with after_step(3, lambda: void(to_a_worker(signal.SIGSTOP))):
        one_line(launch(f"{TRAIN} num_workers 2"), "have delivered none for 2 s", "num_workers 0", "the same command")
    assert not multiprocessing.active_children()
    assert states(RUN)


def test_a_job_that_is_stopped_for_a_while_goes_on(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that answers late is not stuck."""
    monkeypatch.setattr("tailtune.datasets.loading.workers.CHECK_SECONDS", 0.2)
    monkeypatch.setattr("tailtune.datasets.loading.workers.STUCK_SECONDS", 30.0)

    def stop() -> None:
        process = to_a_worker(signal.SIGSTOP)
        threading.Timer(1.0, os.kill, (process, signal.SIGCONT)).start()

    with after_step(3, stop):
        assert launch(f"{TRAIN} num_workers 1 max_steps 8").returncode == 0


def squares(count: int = 64) -> View:
    source = ArraySource(np.zeros((count, 8, 8, 3), dtype=np.uint8), np.zeros(count), "squares")
    return View(source, np.arange(count), lambda _: torch.zeros(3, 8, 8, dtype=torch.uint8))


def _decode(pipe: Connection) -> None:
    batches = iter(eval_loader(squares(), 4, 2))
    next(batches), next(batches)  # one of each process, so that both have begun
    pipe.send([each.pid for each in multiprocessing.active_children()])
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch sees to it, in seconds")
def test_workers_outlive_a_polite_signal_and_not_the_main_process() -> None:
    """A scheduler's SIGTERM reaches all processes of a job; the main one saves its state, for which it needs them."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    job = fork.Process(target=_decode, args=(theirs,))
    job.start()
    assert ours.poll(60)
    pids = ours.recv()
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGUSR1)
    time.sleep(0.3)
    assert all(runs(pid) for pid in pids)
    job.kill()
    job.join()
    end = time.monotonic() + 10
    while any(map(runs, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(runs, pids))


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("free", [0, 64 * 1024])
def test_little_shared_memory(launch: Cli, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tailtune.datasets.loading.workers.free_shared_memory", lambda: free)
        done = launch(f"{FAKE} max_steps 2 num_workers 2 output_dir run test_batch_size 40")
    assert (done.returncode, done.stderr) == (0, "")
    assert "warning: num_workers 2 needs" in done.stdout and "/dev/shm" in done.stdout


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="only root may mount")
@pytest.mark.parametrize(("option", "most"), [("rw", 64 * 1024), ("ro", 0)])
def test_shared_memory_as_the_system_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, most: int
) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", f"size=64k,{option}", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this root may not mount either")
    monkeypatch.setattr("tailtune.datasets.loading.workers.SHARED_MEMORY", tmp_path)
    try:
        assert workers.free_shared_memory() == most
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_shared_memory_that_others_fill_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library raises reaches the main process, rather than end in a thread of the worker's."""

    def refuse(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(UserError, match="/dev/shm is full: lower num_workers.*the same command continues"):
        list(eval_loader(squares(), 4, 2))


def test_a_bug_in_a_worker_stays_one() -> None:
    view = squares()
    view.transform = lambda _: 1 / 0  # type: ignore[assignment, return-value]
    with pytest.raises(ZeroDivisionError):
        list(eval_loader(view, 4, 2))


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "delay"),
    [
        ([str(ROOT / "main.py")], 0.0),
        ([str(ROOT / "main.py")], 1.0),
        (["-m", "tailtune"], 0.0),
        (["-c", "import tailtune; tailtune.command()"], 0.0),  # what the console script does
    ],
)
def test_five_interrupts_at_the_start(tmp_path: Path, program: list[str], delay: float) -> None:
    """Among the imports: one line, whatever library is just being loaded."""
    command, found = [sys.executable, *program, *FAKE.split()], offline(PYTHONPATH=str(ROOT))
    process = subprocess.Popen(command, cwd=tmp_path, env=found, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not answers(process.pid):
        time.sleep(0.001)
    time.sleep(delay)
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert process.communicate(timeout=30)[1].decode() == "interrupted\n"
    assert process.returncode == 130


@pytest.mark.parametrize(("hint", "line"), [("", "interrupted"), ("start again", "interrupted; start again")])
def test_a_signal_ends_the_process_with_the_hint_of_the_moment(hint: str, line: str) -> None:
    program = (
        "import signal, tailtune\n"
        "from tailtune.trainers.processes.exit import end_at_signals\n"
        "from tailtune.trainers.processes.interrupts import with_hint\n"
        "end_at_signals()\n"
        f"with with_hint('no longer'), with_hint('{hint}'):\n"
        "    signal.raise_signal(signal.SIGINT)\n"
    )
    found = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=found, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, f"{line}\n")


def answers(pid: int) -> bool:
    """Whether a process has a handler of its own for Ctrl-C that is not Python's."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_a_second_signal_counts_when_it_is_not_the_first_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler and the launcher that it asks send the same one, within milliseconds."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored
    now = [100.0]
    monkeypatch.setattr("tailtune.trainers.processes.interrupts.time.monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        for _ in range(5):
            signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        now[0] += 2
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the later one had to act as it does outside")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no such signal")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_lost_terminal_and_a_time_limit_save_a_state(launch: Cli, number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_DFL)  # `nohup pytest` begins with SIGHUP ignored
    with signal_after(3, number):
        done = launch(f"{TRAIN} num_workers 0")
    assert (done.returncode, done.stderr) == (130, "interrupted; the same command continues\n")


def test_several_processes_stop_at_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """They print rarely; what one of them is asked, all do within seconds, without asking at every step."""
    monkeypatch.setattr("tailtune.trainers.processes.interrupts.ASK_AFTER", ASK_AFTER / 40)
    both, shares = threading.Barrier(2), [[0.0, 0.0], [0.0, 0.0]]
    stopped, questions = [0, 0], [0, 0]

    def process(rank: int) -> None:
        def total(values: list[float]) -> list[float]:
            questions[rank] += 1
            shares[rank] = values
            both.wait()
            sums = [sum(each) for each in zip(*shares, strict=True)]
            both.wait()
            return sums

        agreement = Agreement(2, 5, total)
        for step in range(6, 400):
            time.sleep(0.002)
            if agreement.stops(rank == 1 and step > 60, step):
                stopped[rank] = step
                return

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert stopped[0] == stopped[1]
    assert 60 < stopped[0] <= 60 + 51
    assert questions[0] == questions[1] < (stopped[0] - 5) / 2


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x'"),
        ({"WORLD_SIZE": "2"}, "no RANK"),
        ({"LOCAL_RANK": "0", "RANK": "0"}, "no WORLD_SIZE"),
    ],
)
def test_a_stray_launch_environment(
    launch: Cli, monkeypatch: pytest.MonkeyPatch, values: dict[str, str], part: str
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    one_line(launch(f"{FAKE} max_steps 1 output_dir run"), part, "unset")


def test_a_whole_launch_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    assert world_size() == 3


# --- terminals, logs and full disks ----------------------------------------------------------------------------------


def test_a_terminal_without_our_signs_shows_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(content, "ascii", write_through=True))
        code = main.main(f"{FAKE} max_steps 1 num_workers 0 output_dir run".split())
    shown = content.getvalue().decode("ascii")
    assert code == 0
    assert "fake_lt - tiny_clip_peft - TinyCLIP - seed 0" in shown
    assert "-" * 40 in shown and "\ntest " in shown


class Closed(io.StringIO):
    def write(self, _: str) -> int:
        raise BrokenPipeError


LOG = logging.getLogger("tailtune")


@pytest.fixture
def closed() -> Iterator[None]:
    """Files of the log are closed after a test."""
    yield
    detach_file()


def test_a_closed_console_stays_quiet(
    closed: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`main.py … | head`; the log has every line."""
    monkeypatch.setattr(sys, "stdout", Closed())
    start_console(True)
    attach_file(tmp_path / "log.txt")
    LOG.info("a line")
    assert "a line" in (tmp_path / "log.txt").read_text()
    assert capsys.readouterr().err == ""


def test_lines_before_the_file_reach_it(closed: None, tmp_path: Path) -> None:
    first, second = tmp_path / "log.txt", tmp_path / "moved" / "log.txt"
    second.parent.mkdir()
    start_console(True)
    LOG.info("before")
    attach_file(first)
    LOG.info("within")
    detach_file()
    LOG.info("between")
    attach_file(second)
    LOG.info("after")
    assert [each.split()[-1] for each in first.read_text().splitlines()] == ["before", "within"]
    assert [each.split()[-1] for each in second.read_text().splitlines()] == ["between", "after"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no such device")
def test_a_log_on_a_full_disk_is_said_once(closed: None, capsys: pytest.CaptureFixture[str]) -> None:
    start_console(True)
    LOG.info("line 0")
    attach_file(Path("/dev/full"))
    LOG.info("line 1")
    LOG.info("line 2")
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.count("warning: cannot write /dev/full (No space left on device)") == 1
    assert all(f"line {number}\n" in shown.out for number in range(3))


def test_a_log_that_cannot_be_opened(closed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_console(True)
    attach_file(tmp_path)  # a folder
    LOG.info("after")
    warning, after = capsys.readouterr().out.splitlines()
    assert warning.startswith(f"warning: cannot write {tmp_path}") and after == "after"


def test_curves_on_a_full_disk(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the run nor a thread ends; what is lost is said once for each file."""

    def full(self: object, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    done = launch(f"{FAKE} num_epochs 1 num_workers 0 output_dir run")
    assert (done.returncode, done.stderr) == (0, "")
    warnings = [line for line in done.stdout.splitlines() if "tfevents" in line]
    assert len(warnings) == 2, "one of training, one of the test"
    assert all("No space left on device" in line for line in warnings)


def test_a_folder_for_curves_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with Events(tmp_path / "file" / "tensorboard") as events:
        events.add_scalar("a", 1.0)


def test_export_for_lift_on_a_full_disk(launch: Cli) -> None:
    words = "-d fake_lt -m tiny_clip_peft pretrained none max_steps 1 max_test_images 20 num_workers 0 output_dir run"
    assert launch(words).returncode == 0
    with files_of_at_most(2000):
        one_line(launch(f"{words} export lift"), "cannot write", "checkpoint.pth.tar")
    assert not (RUN / "export" / "lift").exists()
    assert launch(f"{words} export lift").returncode == 0


def void(_: object) -> None:
    """So that a lambda returns nothing."""
