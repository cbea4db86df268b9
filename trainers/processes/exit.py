"""Ends a process with one line on standard error and an exit code, without later output of libraries.

`main.py` imports this module first, so this module imports little itself.
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
from tailtune.trainers.processes.interrupts import HINTS, handled_signals, interruption

Verdict = Callable[[BaseException], tuple[int, str] | None]
"""Takes an exception; returns the exit code and the message. None: the exception is a bug and needs a traceback."""


def end_at_signals(line: str = "interrupted") -> None:
    """From now on, let signals end this process immediately. No library can catch the signal or print a message.

    Do not call this function in a process that also runs code of other programs. There, Ctrl-C should raise
    `KeyboardInterrupt`.

    Args:
        line: the message that is printed when a signal ends the process, outside of `with_hint`.
    """
    process = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        if os.getpid() == process:  # a worker that has just been forked has inherited this handler, and must not run it
            lost = number == signal.SIGTERM and launcher.one_is_lost()
            _finish(130, launcher.LOST if lost else interruption(line, HINTS[-1] if HINTS else ""))

    for number in handled_signals():
        signal.signal(number, stop)
    launcher.detect_launcher()


def run_as_process(main: Callable[[], int], verdict: Verdict) -> NoReturn:
    """Run a function, and end the process with the exit code that the function returns.

    Args:
        main: the function.
        verdict: takes an exception that `main` raises; returns the exit code and the message.
    """
    try:
        code = main()
    except SystemExit as stopped:  # argparse, after --help
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException as error:
        # End the process inside this clause. Later, Python would delete the data loaders of the frames, which would
        # wait for their worker processes.
        ending = verdict(error)
        if ending is None:
            traceback.print_exc()
            ending = 1, f"error: {type(error).__name__}; its traceback stands above" if launcher.has_launcher() else ""
        _finish(*ending)
    _finish(code, "")


def say(line: str) -> None:
    """Print the last message of a process. With a launcher, it is printed after the launcher's own output.

    Args:
        line: the message.
    """
    _flush()
    if not launcher.print_after_launcher(line) and sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


def _finish(code: int, line: str) -> NoReturn:
    """End the process immediately.

    A normal exit of Python and its libraries takes about a second, and prints messages if Ctrl-C is pressed meanwhile.
    """
    for number in handled_signals():
        signal.signal(number, signal.SIG_IGN)
    _flush()
    if line and not launcher.print_after_launcher(line):
        launcher.write_to_stderr(line)  # without Python's print, which a signal may have interrupted
    if sys.gettrace() or sys.getprofile():  # a debugger or profiler writes its report at exit
        sys.exit(code)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError, RuntimeError):  # the stream is missing, closed or in use
            stream.flush()
