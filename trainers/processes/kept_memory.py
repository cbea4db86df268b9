"""`keep_freed_memory`: training on a CPU reuses its memory, instead of asking the system for it anew in every step."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Numbers of parameters of glibc's mallopt (malloc.h)."""
NEVER = -1


def keep_freed_memory() -> None:
    """Let the C library keep what this process frees. It does nothing on systems without glibc.

    By default glibc gives large blocks back to the system at once. The next step then gets the same memory page by
    page, cleared, which can take longer than the arithmetic. torch has no cache of its own for a CPU. The results stay
    the same. The process holds its peak of memory until it ends, and the peak can be higher, because large blocks come
    from one heap, where glibc 2.36 rarely uses a freed aligned block for one of the same size (docs/results.md).
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, NEVER)
