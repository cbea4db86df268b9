"""Detects the launcher of a process (`accelerate launch` or torchrun), and coordinates the processes of one launch.

A launcher prints pages of text when one of its processes fails. The first process that ends with a message knows the
cause. It starts a program (`last_line.py`) that prints this message after the launcher has ended. The other processes
print nothing. This works on Linux only; on other systems each process prints its own message immediately.
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
"""Longest time in seconds between a signal and the end of a process. A launcher kills the process after 30 seconds."""
NOTICE = 3.0
"""Time in seconds between a signal and the end of a process that waits for a lost process."""
IMPATIENT = 1.0
"""A second signal ends a process immediately if it arrives more than this many seconds after the first one.

A signal that arrives sooner counts as a copy of the first one: a launcher and a scheduler may both send it.
"""
ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
"""Signals after which a process ends even while a library waits for a lost process."""
NO_ANSWER = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError")
"""Parts of the messages of Gloo and NCCL after the end of a process that they were connected to."""
LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun")
MODULES = ("accelerate.commands", "torch.distributed")
"""Launchers: names of programs (`LAUNCHERS`), and prefixes of modules for `python -m` (`MODULES`)."""


@dataclass(frozen=True)
class Launch:
    """The launcher of this process."""

    pid: int
    """Process id of the launcher."""
    address: str
    """Name of a socket. The process that binds it first prints its message; the others stay silent."""
    processes: int
    """Number of processes that the launcher has started on this machine."""


_launches: list[Launch] = []
"""The launch of this process; empty without a launcher."""


def detect_launcher() -> None:
    """Detect whether a launcher has started this process. If so, this process ends when the launcher ends."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _end_when_asked()
    if sys.platform != "linux" or not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return
    import psutil  # imported here, because most processes do not need it

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
        seconds: how long to keep checking before the function returns False.
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


def connection_is_lost(error: RuntimeError) -> bool:
    """Whether an error of torch.distributed says that a process, perhaps of another machine, no longer answers."""
    return type(error).__name__ == "DistNetworkError" or any(text in str(error) for text in NO_ANSWER)


def _children(process: int) -> int | None:
    """Number of living children of a process; None if the process itself has ended."""
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
    """Print a line after the launcher has ended, unless another process has already arranged to print one.

    Args:
        line: the message.

    Returns:
        False if there is no launcher; the caller then has to print the line itself.
    """
    if not _launches:
        return False
    import socket
    import subprocess

    launch = _launches[0]
    taken = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        taken.bind(launch.address)  # the program below inherits the socket, which stays bound until that program ends
    except OSError:
        return True
    if launch.pid == 1 or "SLURM_JOB_ID" in os.environ:  # the program below would be killed with such a launcher
        write_to_stderr(line)
    program = Path(__file__).with_name("last_line.py")
    command = [sys.executable, "-I", "-S", str(program), str(launch.pid), line]
    quiet = subprocess.DEVNULL
    subprocess.Popen(command, stdin=quiet, stdout=quiet, start_new_session=True, pass_fds=[taken.fileno()], cwd="/")
    return True


def write_to_stderr(line: str) -> None:
    """Print a line without Python's output buffers, which may be in use when a signal handler runs."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    with suppress(OSError):  # the terminal may be gone
        os.write(2, f"{line}\n".encode(encoding, "backslashreplace"))


def _end_with_launcher(launcher: int) -> None:
    """Wait until the launcher has ended, then send SIGTERM to this process."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _end_when_asked() -> None:
    """Start a thread that ends this process after a signal, even while a library waits for a lost process."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    threading.Thread(target=_wait_for_signals, args=(reads,), daemon=True).start()


def _wait_for_signals(reads: int) -> None:
    """End this process after a signal if Python's own signal handlers have not done so."""
    signal_times: list[float] = []
    while True:
        numbers = os.read(reads, 4096) if select.select([reads], [], [], 0.5)[0] else b""
        now = time.monotonic()
        if ENDING & set(numbers) and (not signal_times or now - signal_times[-1] > IMPATIENT):
            signal_times.append(now)
        if not signal_times:
            continue
        lost = now - signal_times[0] > NOTICE and one_is_lost()
        if lost or now - signal_times[0] > GRACE or (len(signal_times) > 1 and now - signal_times[1] > IMPATIENT):
            line = LOST if lost else "interrupted"
            if not print_after_launcher(line):
                write_to_stderr(line)
            os._exit(130)
