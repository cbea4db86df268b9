"""Prints a line on standard error after another process has ended: `python last_line.py PID LINE`.

`trainers/processes/launcher.py` starts this file as a separate program, because it runs longer than its parent.
"""

import os
import sys
import time

LONGEST = 120
"""Longest time to wait, in seconds. A launcher waits 30 seconds for its processes."""
SILENT_AFTER = 5
"""Time in seconds during which other processes, which end because their launcher has ended, print nothing."""


def has_ended(process: int) -> bool:
    """Whether a process has ended or is a zombie (Linux). It need not be a child of this process.

    Args:
        process: its process id.
    """
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


if __name__ == "__main__":
    number, line = int(sys.argv[1]), sys.argv[2]
    end = time.monotonic() + LONGEST
    while not has_ended(number) and time.monotonic() < end:
        time.sleep(0.02)
    os.write(2, f"{line}\n".encode(errors="backslashreplace"))
    os.close(2)  # a program that reads this standard error need not wait for the rest
    time.sleep(SILENT_AFTER)  # while this program holds the socket of `print_after_launcher`, others print nothing
