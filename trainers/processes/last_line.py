"""Prints a line on standard error when a process has ended: `python last_line.py PID LINE`.

`trainers/processes/launcher.py` starts it. It is a program of its own, because it runs longer than its parent.
"""

import os
import sys
import time

LONGEST = 120
"""Seconds to wait at most; a launcher gives its processes 30."""
SILENT_AFTER = 5
"""Seconds in which processes that end later, because their launcher has gone, stay silent."""


def has_ended(process: int) -> bool:
    """Whether a process that is no child of this one is gone or a zombie (Linux)."""
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
    os.close(2)  # programs that read our standard error need not wait
    time.sleep(SILENT_AFTER)  # this program holds the socket of `print_after_launcher`, which keeps others silent
