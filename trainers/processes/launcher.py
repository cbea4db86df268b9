"""What the processes of one `accelerate launch` (or torchrun) know of the launcher and of each other.

A launcher whose process fails prints pages of its own. So the first process that ends with something to say, and
therefore knows the cause, leaves a program behind (`last_line.py`) that says it when the launcher has ended; the others
end silently. Linux only; elsewhere each process speaks for itself, at once.
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
"""Seconds from a signal to the end of a process, less than a launcher waits (30) before it kills."""
NOTICE = 3.0
"""Seconds from a signal after which a process that waits for a dead one ends."""
IMPATIENT = 1.0
"""Seconds after which a second signal means: at once. A launcher and its scheduler send the first one twice."""
LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun")
MODULES = ("accelerate.commands", "torch.distributed")
"""Programs, and beginnings of modules (`python -m`), that are a launcher."""


@dataclass(frozen=True)
class Launch:
    """The launcher of this process."""

    pid: int
    address: str
    """Name of a socket that the first process to speak takes."""
    processes: int
    """That it has started on this machine."""


_launches: list[Launch] = []
"""The one launch of this process, or none."""


def begin() -> None:
    """Find out whether a launcher has started this process; if so, end when the launcher ends."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _watch()
    if sys.platform != "linux" or not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return
    import psutil  # Accelerate needs it too; here, because most processes do not

    try:
        parent = psutil.Process(os.getppid())
        words, started = parent.cmdline(), parent.create_time()
    except psutil.Error:
        return
    if any(Path(word).name in LAUNCHERS or word.startswith(MODULES) for word in words[:4]):
        processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
        address = f"\0tailtune-{os.getuid()}-{parent.pid}-{started}"
        _launches.append(Launch(parent.pid, address, int(processes) if processes.isdigit() else 1))
        threading.Thread(target=_outlive, args=(parent.pid,), daemon=True).start()


def launched() -> bool:
    """Whether a launcher has started this process."""
    return bool(_launches)


def one_is_lost(seconds: float = 0) -> bool:
    """Whether fewer processes of the launch live than it started; asks for some seconds."""
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
    """How many children of a process live; None if it does not live itself."""
    import psutil

    alive = 0
    try:
        parent = psutil.Process(process)
        if parent.status() == psutil.STATUS_ZOMBIE:
            return None
        for each in parent.children():
            with suppress(psutil.NoSuchProcess):  # it has ended in between
                alive += each.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return alive


def say_last(line: str) -> bool:
    """Have a line said when the launcher has ended, unless another process has had one; False without a launcher."""
    if not _launches:
        return False
    import socket
    import subprocess

    launch = _launches[0]
    taken = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        taken.bind(launch.address)  # taken as long as the program lives that inherits it
    except OSError:
        return True
    if launch.pid == 1 or "SLURM_JOB_ID" in os.environ:  # with such a launcher everything else ends, too
        write(line)
    program = Path(__file__).with_name("last_line.py")
    command = [sys.executable, "-I", "-S", str(program), str(launch.pid), line]
    quiet = subprocess.DEVNULL
    subprocess.Popen(command, stdin=quiet, stdout=quiet, start_new_session=True, pass_fds=[taken.fileno()], cwd="/")
    return True


def write(line: str) -> None:
    """Print on standard error where that may just be in use, as within the answer to a signal."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    with suppress(OSError):  # the terminal may be gone
        os.write(2, f"{line}\n".encode(encoding, "backslashreplace"))


def _outlive(launcher: int) -> None:
    """Ask this process to end when the launcher has ended."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _watch() -> None:
    """See to it that this process ends when asked, also while it waits, in a library, for one that is dead."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    threading.Thread(target=_answer, args=(reads,), daemon=True).start()


def _answer(reads: int) -> None:
    """End this process where Python's own handlers of signals have not."""
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
            if not say_last(line):
                write(line)
            os._exit(130)
