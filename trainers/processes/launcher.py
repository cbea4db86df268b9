"""What the processes of one `accelerate launch` (or torchrun) know about their launcher and each other.

A launcher prints pages of text when one of its processes fails. Therefore the first process that ends with a message,
and so knows the cause, starts a program (`last_line.py`) that prints the message after the launcher has ended. The
other processes end silently. This works on Linux only; elsewhere each process prints its own message at once.
"""

import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LOST = "error: a process of this launch was killed or lost (out of memory?); the same command continues"
GRACE = 25.0
"""Seconds from a signal to the end of a process: fewer than the 30 after which a launcher kills it."""
NOTICE = 3.0
"""Seconds after a signal until a process that waits for a lost one ends."""
IMPATIENT = 1.0
"""Seconds after which a second signal ends a process at once. A launcher and a scheduler may both send the first."""
LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun")
MODULES = ("accelerate.commands", "torch.distributed")
"""Names of programs, and beginnings of modules for `python -m`, that are launchers."""


@dataclass(frozen=True)
class Launch:
    """The launcher of this process."""

    pid: int
    """Its process id."""
    address: str
    """Name of a socket. The process that binds it first prints its message; the others stay silent."""
    processes: int
    """How many processes it has started on this machine."""


_launches: list[Launch] = []
"""The launch of this process; empty without a launcher."""


def detect_launcher() -> None:
    """Find out whether a launcher has started this process, and if so, end when the launcher ends."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _end_when_asked()
    if sys.platform != "linux" or not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return
    import psutil  # Accelerate needs it too; imported here because most processes do not

    try:
        parent = psutil.Process(os.getppid())
        words, started = parent.cmdline(), parent.create_time()
    except psutil.Error:
        return
    if any(Path(word).name in LAUNCHERS or word.startswith(MODULES) for word in words[:4]):
        processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
        address = f"\0tailtune-{os.getuid()}-{parent.pid}-{started}"
        _launches.append(Launch(parent.pid, address, int(processes) if processes.isdigit() else 1))
        threading.Thread(target=_end_with_launcher, args=(parent.pid,), daemon=True).start()


def has_launcher() -> bool:
    """Whether a launcher has started this process."""
    return bool(_launches)


def one_is_lost(seconds: float = 0) -> bool:
    """Whether a process of the launch has died.

    Args:
        seconds: how long to look for that before the answer is no.
    """
    if not _launches:
        return False
    end = time.monotonic() + seconds
    while True:
        alive = _children(_launches[0].pid)
        if alive is not None and alive < _launches[0].processes:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)


def _children(process: int) -> int | None:
    """How many children of a process are alive; None if the process itself is not."""
    import psutil

    alive = 0
    try:
        parent = psutil.Process(process)
        if parent.status() == psutil.STATUS_ZOMBIE:
            return None
        for child in parent.children():
            with suppress(psutil.NoSuchProcess):  # it has ended in the meantime
                alive += child.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return alive


def print_after_launcher(line: str) -> bool:
    """Print a line after the launcher has ended, unless another process has already left one.

    Args:
        line: the message.

    Returns:
        False without a launcher; the caller then has to print the line itself.
    """
    if not _launches:
        return False
    import socket
    import subprocess

    launch = _launches[0]
    taken = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        taken.bind(launch.address)  # stays bound until the program below ends, which inherits the socket
    except OSError:
        return True
    if launch.pid == 1 or "SLURM_JOB_ID" in os.environ:  # when such a launcher ends, all other programs are ended too
        write_to_stderr(line)
    program = Path(__file__).with_name("last_line.py")
    command = [sys.executable, "-I", "-S", str(program), str(launch.pid), line]
    quiet = subprocess.DEVNULL
    subprocess.Popen(command, stdin=quiet, stdout=quiet, start_new_session=True, pass_fds=[taken.fileno()], cwd="/")
    return True


def write_to_stderr(line: str) -> None:
    """Print a line without Python's buffers, which may be in use when a signal handler runs."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    with suppress(OSError):  # the terminal may be gone
        os.write(2, f"{line}\n".encode(encoding, "backslashreplace"))


def _end_with_launcher(launcher: int) -> None:
    """Wait until the launcher has ended, then send this process SIGTERM."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _end_when_asked() -> None:
    """Start a thread that ends this process after a signal, also while a library waits for a lost process."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    threading.Thread(target=_wait_for_signals, args=(reads,), daemon=True).start()


def _wait_for_signals(reads: int) -> None:
    """End this process after a signal if Python's own signal handlers have not done so."""
    asked: list[float] = []
    while True:
        numbers = os.read(reads, 4096) if select.select([reads], [], [], 0.5)[0] else b""
        now = time.monotonic()
        if {signal.SIGINT, signal.SIGTERM} & set(numbers) and (not asked or now - asked[-1] > IMPATIENT):
            asked.append(now)
        if not asked:
            continue
        lost = now - asked[0] > NOTICE and one_is_lost()
        if lost or now - asked[0] > GRACE or (len(asked) > 1 and now - asked[1] > IMPATIENT):
            line = LOST if lost else "interrupted"
            if not print_after_launcher(line):
                write_to_stderr(line)
            os._exit(130)
