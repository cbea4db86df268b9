"""How a process of ours ends: one line on standard error, the exit code, and nothing of any library after it.

`main.py` imports this before all else, so it imports little itself.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from tailtune.trainers.processes import launcher as ranks
from tailtune.trainers.processes.interrupts import answered

Verdict = Callable[[BaseException], tuple[int, str] | None]
"""An exception → exit code and line; None for a bug."""


def end_at_signals(line: str = "interrupted") -> None:
    """From now on a signal ends this process at once: no library can swallow that, or print about it.

    Not for a process that others' code shares; there Ctrl-C stays a `KeyboardInterrupt`.
    """
    process = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        if os.getpid() == process:  # and no worker that was forked a moment ago
            lost = number == signal.SIGTERM and ranks.one_is_lost()
            _finish(130, ranks.LOST if lost else line)

    for each in answered():
        signal.signal(each, stop)
    ranks.begin()


def run_as_process(main: Callable[[], int], verdict: Verdict) -> NoReturn:
    """Run `main` and end the process with its exit code."""
    try:
        code = main()
    except SystemExit as stopped:  # argparse, after --help
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException as error:
        # Within the clause, so that the frames live: a loader in them would wait for its processes.
        found = verdict(error)
        if found is None:
            traceback.print_exc()
            found = 1, f"error: {type(error).__name__}; its traceback stands above" if ranks.launched() else ""
        _finish(*found)
    _finish(code, "")


def say(line: str) -> None:
    """Print the line that says how it ended; below a launcher, which prints pages then, after it."""
    _flush()
    if not ranks.say_last(line) and sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


def _finish(code: int, line: str) -> NoReturn:
    """End the process. What Python and libraries do at exit takes a second, in which Ctrl-C ends in their messages."""
    for each in answered():
        signal.signal(each, signal.SIG_IGN)
    _flush()
    if line and not ranks.say_last(line):
        ranks.write(line)  # print may be what was interrupted
    if sys.gettrace() or sys.getprofile():  # a debugger or profiler reports at exit
        sys.exit(code)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError, RuntimeError):  # none, closed, or just being written to
            stream.flush()
