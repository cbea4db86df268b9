"""Limits the time of library code that processes input of a user."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Stop the block after a number of seconds. For example, a search for the pattern `(.*)*x` may never end.

    A signal stops the block. Python's regular expressions react to it; compiled code of other libraries may not.
    The limit has no effect if Python cannot receive the signal: on Windows, and outside the main thread.

    Args:
        seconds: the limit, in seconds.
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
