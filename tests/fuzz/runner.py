"""Commands in children forked from one warm process, with limits: `import torch` costs seconds, a fork milliseconds."""

import ctypes
import gc
import os
import resource
import runpy
import select
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil

ROOT = Path(__file__).resolve().parents[2]
MAIN = (str(ROOT / "main.py"),)
ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    **{"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "CUDA_VISIBLE_DEVICES": ""},
}
"""One thread, because a process with threads must not fork; no network, no caches, no GPU."""
GIGA = 2**30
ADDRESSES = 9 * GIGA
"""Address space of a child, so that a bomb ends before the machine does; the libraries' own is 3.7 GiB."""
GRACE = 5.0
"""Seconds in which what a command has started must end after it."""


@dataclass(frozen=True)
class Limits:
    """What a command may take: seconds, and bytes beyond those of a process that has only imported the toolkit."""

    seconds: float = 60.0
    memory: int = GIGA


@dataclass(frozen=True)
class Outcome:
    """What became of a command.

    Args:
        code: exit code; negative for the signal that ended it.
        memory: bytes at the peak, beyond those of a process that has only imported the toolkit.
        hung: it ran past its time and was killed.
        left: processes that it has started and left behind.
    """

    command: str
    code: int
    stdout: str
    stderr: str
    seconds: float
    memory: int
    hung: bool
    left: int


def warm_up() -> None:
    """Import the toolkit. To be called first of all: afterwards this process can be forked.

    Raises:
        RuntimeError: something has started a thread already.
    """
    os.environ.update(ENVIRONMENT)
    import torch

    import tailtune.main
    import tailtune.trainers.dry_run
    import tailtune.trainers.run  # noqa: F401

    torch.set_num_threads(1)
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        raise RuntimeError(f"{threads} threads run here; a process with threads cannot be forked")


class Running:
    """A command that has been started, in a session and process group of its own.

    Args:
        argv: the words behind `python main.py`.
        cwd: its working directory; what it prints goes to files beside that.
        program: None: forked from here; else what a new Python executes, such as `MAIN`.
        environment: variables besides those of this process.
        script: what a fork runs.
    """

    def __init__(
        self,
        argv: Sequence[str],
        cwd: Path,
        limits: Limits | None = None,
        program: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        script: str = MAIN[0],
    ):
        self.argv, self.limits, self.printed = (
            list(argv),
            limits or Limits(),
            (_beside(cwd, "out"), _beside(cwd, "err")),
        )
        words = [f"{name}={value}" for name, value in (environment or {}).items()]
        self.command = " ".join([*words, "python", *map(_short, program or [script]), shlex.join(argv)])
        self.begin = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child([script, *self.argv], cwd, self.printed, program, environment or {})

    def send(self, number: signal.Signals, group: bool = False) -> None:
        """A signal to it, or to its group as a terminal does; none to what has ended."""
        if self.alive():
            (os.killpg if group else os.kill)(self.pid, number)

    def alive(self, seconds: float = 0.0) -> bool:
        """Whether it still runs after so many seconds more."""
        handle = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            return not poll.poll(1000 * max(seconds, 0))
        finally:
            os.close(handle)

    def children(self) -> list[psutil.Process]:
        """What it has started and still runs."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def wait(self) -> Outcome:
        """Its end, by force when its time is over."""
        hung = self.alive(self.begin + self.limits.seconds - time.monotonic())
        if hung:
            os.killpg(self.pid, signal.SIGKILL)
        _, status, usage = os.wait4(self.pid, 0)
        seconds = time.monotonic() - self.begin
        left = 0 if hung else len(_members(self.pid, GRACE))
        for pid in _members(self.pid):
            os.kill(pid, signal.SIGKILL)
        memory = 1024 * usage.ru_maxrss - _idle()
        code = os.waitstatus_to_exitcode(status)
        return Outcome(self.command, code, *self.texts(), seconds, max(0, memory), hung, left)

    def texts(self) -> list[str]:
        """What it has printed so far: standard output, standard error."""
        return [path.read_text(errors="backslashreplace") for path in self.printed]


def run(argv: Sequence[str], cwd: Path, limits: Limits | None = None, program: Sequence[str] | None = None) -> Outcome:
    """Start a command and wait for it; arguments as of `Running`."""
    return Running(argv, cwd, limits, program).wait()


def _child(
    argv: list[str],
    cwd: Path,
    printed: Sequence[Path],
    program: Sequence[str] | None,
    environment: Mapping[str, str],
) -> NoReturn:
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in enumerate(printed, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _give_up_rights()
        gc.callbacks.clear()  # Hypothesis has one
        os.chdir(cwd)
        os.environ.update(environment)
        if program:
            os.execv(sys.executable, [sys.executable, *program, *argv[1:]])
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _give_up_rights() -> None:
    """Let the modes of files hold for root, too: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc, drop_from_bounds, version_3 = ctypes.CDLL(None), 24, 0x20080522
    for right in (1, 2):
        libc.prctl(drop_from_bounds, right, 0, 0, 0)  # so that a new program does not get it again
    header, sets = (ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) == 0:
        for number in range(3):  # effective, permitted, inheritable
            sets[number] &= ~0b110
        libc.capset(header, sets)


def _idle(found: list[int] = []) -> int:  # noqa: B006 (a cache)
    """Peak memory in bytes of a fork that does nothing."""
    if not found:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        found.append(1024 * os.wait4(pid, 0)[2].ru_maxrss)
    return found[0]


def _members(group: int, patience: float = 0.0) -> list[int]:
    """Processes of a group that still run after so many seconds."""
    end = time.monotonic() + patience
    while True:
        found = [each.pid for each in psutil.process_iter(["status"]) if _is_member(each, group)]
        if not found or time.monotonic() >= end:
            return found
        time.sleep(0.05)


def _is_member(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _beside(cwd: Path, kind: str) -> Path:
    return cwd.with_name(f"{cwd.name}.{kind}")


def _short(word: str) -> str:
    return word.removeprefix(f"{ROOT}/")
