"""A bound on how long other people's code may work on what a user gave it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """The block ends after so many seconds: a regular expression such as `(.*)*x` would not end by itself.

    It is a signal that ends it, which Python's own matching listens to and compiled code of others does not. Where
    Python takes no signals (another thread than the main one, Windows) nothing is bounded.

    Args:
        what: subject of the message, such as "a pattern of layers".

    Raises:
        TimeoutError: it took longer.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"{what} takes more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
