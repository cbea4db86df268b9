"""How a process ends: with one line on standard error and an exit code, and without later output of libraries.

`main.py` imports this module first, so it imports little itself.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from tailtune.trainers.processes import launcher
from tailtune.trainers.processes.interrupts import handled_signals

Verdict = Callable[[BaseException], tuple[int, str] | None]
"""Exception → exit code and message; None for a bug, which gets a traceback."""


def end_at_signals(line: str = "interrupted") -> None:
    """From now on let signals end this process at once; no library can catch that or print about it.

    Do not use it in a process that runs other programs' code too: there Ctrl-C should stay a `KeyboardInterrupt`.

    Args:
        line: the message that is printed at the end.
    """
    process = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        if os.getpid() == process:  # not in a worker that was forked a moment ago
            lost = number == signal.SIGTERM and launcher.one_is_lost()
            _finish(130, launcher.LOST if lost else line)

    for number in handled_signals():
        signal.signal(number, stop)
    launcher.detect_launcher()


def run_as_process(main: Callable[[], int], verdict: Verdict) -> NoReturn:
    """Run a function, and end the process with the exit code that it returns.

    Args:
        main: the function.
        verdict: exit code and message for an exception that it raises.
    """
    try:
        code = main()
    except SystemExit as stopped:  # argparse, after --help
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException as error:
        # Finish within this clause, while the frames exist: data loaders in them would wait for their processes.
        ending = verdict(error)
        if ending is None:
            traceback.print_exc()
            ending = 1, f"error: {type(error).__name__}; its traceback stands above" if launcher.has_launcher() else ""
        _finish(*ending)
    _finish(code, "")


def say(line: str) -> None:
    """Print the message with which a process ends; with a launcher, after the launcher's own pages.

    Args:
        line: the message.
    """
    _flush()
    if not launcher.print_after_launcher(line) and sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


def _finish(code: int, line: str) -> NoReturn:
    """End the process at once. Python and libraries would take a second, and print messages if Ctrl-C came then."""
    for number in handled_signals():
        signal.signal(number, signal.SIG_IGN)
    _flush()
    if line and not launcher.print_after_launcher(line):
        launcher.write_to_stderr(line)  # a signal may have interrupted print
    if sys.gettrace() or sys.getprofile():  # a debugger or profiler writes its report at exit
        sys.exit(code)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError, RuntimeError):  # none, closed, or in use
            stream.flush()
