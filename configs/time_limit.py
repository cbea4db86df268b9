"""A time limit for code of libraries that works on input of a user."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Stop the block after a number of seconds. A regular expression such as `(.*)*x` would never end by itself.

    A signal stops the block. Python's own regular expressions react to it; compiled code of other libraries may not.
    There is no limit where Python cannot receive the signal: on Windows, and in threads other than the main one.

    Args:
        seconds: the limit.
        what: the subject of the message, such as "a pattern of layers".

    Raises:
        TimeoutError: the block took longer.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"{what} takes more than {seconds:g} s")

    earlier_handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier_handler)
